"""Predict files, folders and videos, and write pictures and results."""

import glob
import json
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from crossformer_vision.data.images import EXTENSIONS, error_summary, files_below
from crossformer_vision.data.rasters import RGB, PixelFormat
from crossformer_vision.devices import count_cores
from crossformer_vision.errors import UserError, counted
from crossformer_vision.inference import video
from crossformer_vision.inference.inputs import open_image
from crossformer_vision.inference.output import (
    MANIFEST,
    CocoIds,
    OutputFolder,
    earlier_predictions,
    print_line,
    write_results,
)
from crossformer_vision.inference.predictor import NamedImage, Predictor
from crossformer_vision.inference.results import Result, SegmentationResult

log = logging.getLogger("crossformer_vision")

MAX_SIDE = 2048  # maximum side of written pictures, in pixels
MAX_WAITING = 4  # pictures in memory that wait for a thread to draw them
READERS = 4  # threads that read and draw images
SUFFIXES = EXTENSIONS | video.EXTENSIONS


def find_images(paths: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Find images and videos in files, folders and patterns. Skips hidden files and earlier predictions.

    Args:
        paths: Paths and patterns.

    Yields:
        Each file, sorted within a folder, and its path below the folder.

    Raises:
        UserError: If a path does not exist or has no images.
    """
    for text in paths:
        path = Path(text)
        if glob.has_magic(text) and not path.exists():
            yield from _match_pattern(text)
        elif path.is_dir():
            yield from _search_folder(path)
        elif path.exists():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder")


def _match_pattern(pattern: str) -> Iterator[tuple[Path, Path]]:
    """Files that match a quoted pattern, which the shell has not expanded."""
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    matches = [match for match in matches if match.is_file() and match.suffix.lower() in SUFFIXES]
    if not matches:
        raise UserError(f"{pattern}: matches no image or video")
    yield from ((match, Path(match.name)) for match in matches)


def _search_folder(folder: Path) -> Iterator[tuple[Path, Path]]:
    predictions = {
        file.resolve() for mark in folder.rglob(MANIFEST) for file in earlier_predictions(mark.parent)
    }
    files = [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]
    files = [path for path in files if path.resolve() not in predictions]
    if not files:
        raise UserError(f"{folder}: no images in this folder")
    yield from ((path, path.relative_to(folder)) for path in files)


class ImagePrefetcher:
    """Reads images in threads while the network is busy.

    Args:
        pool: Threads.
        batch_size: Images per batch.
        files: Files and their names.
        pixel_format: Format of the images.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        batch_size: int,
        files: Iterable[tuple[Path, Path]],
        pixel_format: PixelFormat = RGB,
    ) -> None:
        self.pool, self.batch_size, self.pixel_format = pool, batch_size, pixel_format
        self.files = iter(files)
        self.pending: deque[tuple[Path, Path, Future[NamedImage | UserError | None]]] = deque()

    def __iter__(self) -> Iterator[list[tuple[Path, Path, NamedImage | UserError | None]]]:
        """Batches of file, name, and image or error; ``None`` for a video, which is read frame by frame."""
        while True:
            while len(self.pending) < 2 * self.batch_size and (item := next(self.files, None)):
                self.pending.append((*item, self.pool.submit(read_file, item[0], self.pixel_format)))
            if not self.pending:
                return
            count = min(self.batch_size, len(self.pending))
            batch = [self.pending.popleft() for _ in range(count)]
            yield [(file, name, future.result()) for file, name, future in batch]


def read_file(file: Path, pixel_format: PixelFormat = RGB) -> NamedImage | UserError | None:
    """An image and its name, an error, or ``None`` for a video."""
    if file.suffix.lower() in video.EXTENSIONS:
        return None
    try:
        if pixel_format.is_rgb:
            warn_about_pages(file)
        return open_image(file, pixel_format)
    except Exception as error:  # decoders raise errors of any kind
        return as_user_error(error, file)


def warn_about_pages(file: Path) -> None:
    """Warn about an image with several pages or frames, of which only the first is predicted."""
    if file.suffix.lower() not in (".tif", ".tiff", ".gif", ".webp"):
        return
    try:
        with Image.open(file) as image:
            pages = int(getattr(image, "n_frames", 1))
    except Exception:  # reported when the image is read
        return
    if pages > 1:
        log.warning("%s: has %d pages or frames; the first one is predicted", file, pages)


def as_user_error(error: Exception, file: Path) -> UserError:
    """An error that names the file."""
    return error if isinstance(error, UserError) else UserError(f"{file}: {error_summary(error)}")


def predict_batch(predictor: Predictor, images: list[NamedImage]) -> list[Result | UserError]:
    """Predict a batch. If it fails, predict images one by one and return a result or error for each."""
    if not images:
        return []
    try:
        return list(predictor.predict(images))
    except Exception as error:
        if len(images) == 1:
            return [as_user_error(error, Path(images[0][1]))]
        return [predict_batch(predictor, [image])[0] for image in images]


class ResultWriter:
    """Writes pictures, class maps and JSON, and prints one line per result.

    Args:
        pool: Threads that draw pictures.
        output_dir: Output folder. ``None`` to write nothing.
        draw_pictures: Whether to draw pictures.
        print_json: Print JSON instead of text.
        ids: Ids of the images, for detections.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        output_dir: Path | None,
        draw_pictures: bool,
        print_json: bool,
        ids: CocoIds | None,
    ) -> None:
        self.pool, self.draw_pictures, self.print_json, self.ids = pool, draw_pictures, print_json, ids
        self.folder = OutputFolder(output_dir) if output_dir else None
        self.lines = self.folder.claim("predictions.jsonl") if self.folder else None
        self.stream = (
            self.lines.open("w", encoding="utf-8", errors="backslashreplace") if self.lines else None
        )
        self.pending: deque[Future[None]] = deque()
        self.count = 0

    def add(self, result: Result, file: Path, name: Path) -> None:
        """Draw, write and print the result of an image.

        Args:
            result: The result.
            file: Image file.
            name: Its path below the folder that is predicted.
        """
        if self.folder and self.draw_pictures:
            is_jpeg = file.suffix.lower() in (".jpg", ".jpeg")
            picture = self.folder.claim(name.with_suffix(".jpg" if is_jpeg else ".png"))
            class_map = None
            if isinstance(result, SegmentationResult):
                below = picture.relative_to(self.folder.path).with_suffix(".png")
                class_map = self.folder.claim(Path("class_maps") / below)
            self.pending.append(self.pool.submit(save_pictures, result, picture, class_map))
            while len(self.pending) > MAX_WAITING:
                self.pending.popleft().result()
        self.add_line(result, file, name)

    def add_line(self, result: Result, file: Path, name: Path, **extra: object) -> None:
        """Write and print a result without a picture.

        Args:
            result: The result.
            file: Image or video file.
            name: Name of the image.
            **extra: Further values for the JSON.
        """
        self.count += 1
        content = {**result.to_dict(), **extra}
        if self.ids is not None:
            content |= self.ids.entry(file, name)
        line = json.dumps(content, ensure_ascii=False)
        if self.stream:
            self.stream.write(line + "\n")
            self.stream.flush()
        print_line(line if self.print_json else str(result))

    def close(self, predictor: Predictor) -> None:
        """Finish pictures and write ``predictions.json``."""
        for future in self.pending:
            future.result()
        if not (self.folder and self.stream and self.lines):
            return
        self.stream.close()
        if self.count:
            target = self.folder.claim("predictions.json")
            with target.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                write_results(self.lines, stream, predictor.classes, predictor.info.category_ids)
            if not self.print_json:
                pictures = f"{counted(self.count, 'picture')} and " if self.draw_pictures else ""
                print_line(f"{pictures}{target.name} in {self.folder.path}")
        self.lines.unlink()


def save_pictures(result: Result, picture: Path, class_map: Path | None) -> None:
    """Save the plot of a result, and its class map.

    Args:
        result: The result.
        picture: File of the plot.
        class_map: File of the class map, for segmentation.
    """
    plot = result.plot()
    plot.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    plot.save(picture, quality=90)  # of JPEG
    if class_map and isinstance(result, SegmentationResult):
        result.to_png().save(class_map)


def predict_video(predictor: Predictor, file: Path, name: Path, writer: ResultWriter) -> None:
    """Predict each frame, named ``<name>#<frame>``, and write the drawn frames as MP4.

    Args:
        predictor: Predictor of the network.
        file: Video file.
        name: Path of the video in the results.
        writer: Writer of the results.
    """
    predictor.require_rgb("prediction of videos")
    with ExitStack() as stack:
        append: Callable[[Image.Image, float], None] | None = None
        for number, (seconds, frame) in enumerate(video.frames(file)):
            (result,) = predictor.predict([(frame, f"{file}#{number}")])
            if writer.folder and writer.draw_pictures:
                if append is None:
                    path = writer.folder.claim(name.with_suffix(".mp4"))
                    append = stack.enter_context(video.mp4_writer(path, video.frame_rate(file)))
                plot = result.plot()
                plot.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
                append(plot, seconds)
            writer.add_line(result, file, name.with_name(f"{name.name}#{number}"), seconds=round(seconds, 3))


def predict_files(
    predictor: Predictor,
    paths: Sequence[str],
    output_dir: Path | None,
    draw_pictures: bool = True,
    print_json: bool = False,
) -> None:
    """Predict images, folders and videos.

    Writes a picture for each image and all results to ``predictions.json``; detections as a COCO file whose
    annotations have a ``score``, class maps also as PNG in ``class_maps/``. Until all images are done,
    results are in ``predictions.jsonl``, so an interrupted call keeps finished results. An image that cannot
    be predicted is skipped, and the error is raised at the end. Memory does not grow with the number of
    images.

    Args:
        predictor: Predictor of ``load_predictor``.
        paths: Files, folders, and patterns such as ``photos/*.jpg``.
        output_dir: Output folder. ``None`` to write nothing.
        draw_pictures: Whether to draw pictures.
        print_json: Print results as JSON, one per line, instead of text.

    Raises:
        UserError: If a path does not exist, or images were skipped.
    """
    files = list(find_images(paths))
    ids = CocoIds([file for file, _ in files]) if predictor.task == "detection" else None
    errors: list[UserError] = []
    console = Console(stderr=True) if print_json else None
    with ThreadPoolExecutor(min(READERS, count_cores())) as pool:
        writer = ResultWriter(pool, output_dir, draw_pictures, print_json, ids)
        with Progress(transient=True, console=console) as bar:
            progress = bar.add_task("predicting", total=len(files))
            for batch in ImagePrefetcher(pool, predictor.batch_size, files, predictor.info.pixel_format):
                images = [image for _, _, image in batch if isinstance(image, tuple)]
                results = iter(predict_batch(predictor, images))
                for file, name, image in batch:
                    outcome = next(results) if isinstance(image, tuple) else image
                    try:
                        _write_outcome(predictor, outcome, file, name, writer)
                    except UserError as error:
                        errors.append(error)
                        print(f"skipped: {error}", file=sys.stderr, flush=True)
                    bar.advance(progress)
        writer.close(predictor)
    if errors:
        verb = "was" if len(errors) == 1 else "were"
        raise UserError(f"{errors[0]}; {len(errors)} of {len(files)} images {verb} skipped")


def _write_outcome(
    predictor: Predictor, outcome: Result | UserError | None, file: Path, name: Path, writer: ResultWriter
) -> None:
    """Write a result, predict a video, or raise an error."""
    if outcome is None:
        predict_video(predictor, file, name, writer)
    elif isinstance(outcome, UserError):
        raise outcome
    else:
        writer.add(outcome, file, name)
