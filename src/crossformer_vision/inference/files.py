"""Predicting files, folders and videos: pictures and results below a folder of their own."""

import glob
import itertools
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from crossformer_vision.data import images
from crossformer_vision.data.readers.coco_json import coco_id
from crossformer_vision.errors import UserError
from crossformer_vision.inference import video
from crossformer_vision.inference.predictor import Predictor
from crossformer_vision.inference.results import Result, Segmented

log = logging.getLogger("crossformer_vision")

LARGEST = 2048  # longer side of a picture that is written, in pixels
DRAWING = 4  # pictures that wait for a thread to draw them, in memory
OURS = ".crossformer-predictions"  # in a folder of predictions: the files that the last call wrote


def _written(folder: Path) -> list[Path]:
    """The files of earlier predictions in a folder, if it is one of predictions."""
    try:
        lines = (folder / OURS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    paths = [folder / line for line in lines if line]
    return [path for path in paths if path.resolve().is_relative_to(folder.resolve())]


def find_images(paths: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """(file, its name below the folder that was given) of images and videos, sorted; folders, patterns too.

    In folders, what is hidden and what earlier predictions drew is left out.
    """
    known = images.EXTENSIONS | video.EXTENSIONS
    for text in paths:
        path = Path(text)
        if glob.has_magic(text) and not path.exists():  # a shell leaves patterns alone that are quoted
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
            matches = [match for match in matches if match.is_file() and match.suffix.lower() in known]
            if not matches:
                raise UserError(f"{text}: no image or video has such a name")
            yield from ((match, Path(match.name)) for match in matches)
            continue
        if path.is_dir():
            drawn = {file.resolve() for mark in path.rglob(OURS) for file in _written(mark.parent)}
            files = [
                p for p in images.files_below(path) if p.suffix.lower() in known and p.resolve() not in drawn
            ]
            if not files:
                raise UserError(f"{path}: no images in this folder")
            yield from ((p, p.relative_to(path)) for p in files)
        elif path.exists():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder")


def say(text: str) -> None:
    """Print a line; where nobody listens any more, as after `| head`, the work goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def were(count: int) -> str:
    return "was" if count == 1 else "were"


class CocoIds:
    """Ids and file names of images as a COCO file has them that lies beside them, or else numbered from 1.

    Looked for where the data of a training are: `<folder>/_annotations.coco.json`, or
    `annotations/instances_<split>.json` beside the folder or one above it. Where files of several splits have
    one id, all are numbered.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.known: dict[Path, tuple[Any, str]] = {}
        folders: set[Path] = set()
        for file in files:
            folders |= set(list(file.parents)[:4])
        for folder in sorted(folders):
            near = (folder.parent, folder.parent.parent)
            for path in (
                folder / "_annotations.coco.json",
                *(above / "annotations" / f"instances_{folder.resolve().name}.json" for above in near),
            ):
                if path.is_file():
                    self._read(path, folder)
        taken = [self.known[file][0] for file in files if file in self.known]
        if len(set(taken)) < len(taken):
            log.warning(
                "several of these images have one id in their COCO files: they are numbered anew, from 1"
            )
            self.known, taken = {}, []
        self.number = itertools.count(1 + max((i for i in taken if isinstance(i, int)), default=0))

    def _read(self, path: Path, folder: Path) -> None:
        try:
            images = json.loads(path.read_bytes())["images"]
            self.known |= {folder / i["file_name"]: (coco_id(i["id"]), i["file_name"]) for i in images}
        except (OSError, ValueError, KeyError, TypeError):  # not what training reads; no reason to stop
            return

    def of(self, file: Path, name: Path) -> dict[str, Any]:
        known = self.known.get(file)
        number, file_name = known if known else (next(self.number), name.as_posix())
        return {"id": number, "file_name": file_name}


class OutFolder:
    """A folder of predictions, in which nothing that is not ours is written over.

    What the last call wrote there is removed at the start, so that the results of two calls do not mix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = [path for path in _written(folder) if path.is_file()]
            for path in earlier:
                path.unlink()
        except OSError as error:
            raise UserError(f"{folder}: cannot be a folder of predictions ({error.strerror})") from None
        if len(earlier) > 1:  # the mark itself is no file of the person's
            say(f"replaces the {len(earlier)} files of an earlier call in {folder}; --out names another")
        self.mark = (folder / OURS).open("w", encoding="utf-8", errors="surrogateescape")

    def claim(self, name: str | Path) -> Path:
        """A path below the folder that no file has, of this name or with a number behind it."""
        wanted = self.folder / name
        path, n = wanted, 1
        while path.exists():
            n += 1
            path = wanted.with_name(f"{wanted.stem}-{n}{wanted.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.mark.write(f"{path.relative_to(self.folder)}\n")
        self.mark.flush()
        path.touch()
        return path


class Ready:
    """Images that threads read while the network is at work, in order: (file, name, picture or error)."""

    def __init__(
        self, pool: ThreadPoolExecutor, predictor: Predictor, files: Iterable[tuple[Path, Path]]
    ) -> None:
        self.pool, self.predictor = pool, predictor
        self.files = iter(files)
        self.waiting: deque[tuple[Path, Path, Future[Any]]] = deque()

    def __iter__(self) -> Iterator[list[tuple[Path, Path, Any]]]:
        """As many as the network takes at once; of a video None, as it is read frame by frame."""
        size = self.predictor.together
        while True:
            while len(self.waiting) < 2 * size and (found := next(self.files, None)):
                self.waiting.append((*found, self.pool.submit(self._read, found[0])))
            if not self.waiting:
                return
            batch: list[tuple[Path, Path, Any]] = []
            while self.waiting and len(batch) < size:
                file, name, reading = self.waiting.popleft()
                batch.append((file, name, reading.result()))
            yield batch

    def _read(self, file: Path) -> Any:
        if file.suffix.lower() in video.EXTENSIONS:
            return None
        try:
            note_pages(file)
            return self.predictor.opened(file)
        except Exception as error:  # of this image; the rest is done
            return _named(error, file)


def note_pages(file: Path) -> None:
    """Warn about an image of several pages or frames, of which the first is predicted."""
    if file.suffix.lower() not in (".tif", ".tiff", ".gif", ".webp"):
        return
    try:
        with Image.open(file) as image:
            pages = int(getattr(image, "n_frames", 1))
    except Exception:  # reading the image will name it
        return
    if pages > 1:
        log.warning("%s: has %d pages or frames; the first one is predicted", file, pages)


def _named(error: Exception, file: Path) -> UserError:
    return error if isinstance(error, UserError) else UserError(f"{file}: {images.reason(error)}")


def _results(predictor: Predictor, opened: list[tuple[Image.Image, str]]) -> list[Any]:
    """The results of a batch; if it fails, of each image by itself, or its error."""
    try:
        return list(predictor.results(opened))
    except Exception as error:
        if len(opened) == 1:
            return [_named(error, Path(opened[0][1]))]
        return [_results(predictor, [one])[0] for one in opened]


class Writer:
    """What becomes of results: pictures, class maps, a line of JSON each, a line for the person.

    Args:
        out: the folder; None to write nothing.
        pictures: draw them.
        as_json: print results as JSON, one a line, in place of words.
        ids: of the images, for detections.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, out: Path | None, pictures: bool, as_json: bool, ids: CocoIds | None
    ) -> None:
        self.pool, self.pictures, self.as_json, self.ids = pool, pictures, as_json, ids
        self.folder = OutFolder(out) if out else None
        self.lines = self.folder.claim("predictions.jsonl") if self.folder else None
        self.stream = (
            self.lines.open("w", encoding="utf-8", errors="backslashreplace") if self.lines else None
        )
        self.drawing: deque[Future[None]] = deque()
        self.done = 0

    def add(self, result: Result, file: Path, name: Path) -> None:
        """A result of an image."""
        if self.folder and self.pictures:
            jpeg = file.suffix.lower() in (".jpg", ".jpeg")
            picture = self.folder.claim(name.with_suffix(".jpg" if jpeg else ".png"))
            class_map = None
            if isinstance(result, Segmented):
                below = picture.relative_to(self.folder.folder).with_suffix(".png")
                class_map = self.folder.claim(Path("class_maps") / below)
            self.drawing.append(self.pool.submit(draw, result, picture, class_map))
            while len(self.drawing) > DRAWING:
                self.drawing.popleft().result()
        self.say(result, file, name, {})

    def say(self, result: Result, file: Path, name: Path, more: dict[str, Any]) -> None:
        """A result's lines; `more` goes into its JSON."""
        self.done += 1
        content = result.to_dict() | more
        if self.ids is not None:
            content |= self.ids.of(file, name)
        line = json.dumps(content, ensure_ascii=False)
        if self.stream:
            self.stream.write(line + "\n")
            self.stream.flush()
        say(line if self.as_json else str(result))

    def close(self, predictor: Predictor) -> None:
        """Put the results in place."""
        for drawn in self.drawing:
            drawn.result()
        if not (self.folder and self.stream and self.lines):
            return
        self.stream.close()
        if self.done:
            target = self.folder.claim("predictions.json")
            with target.open("w", encoding="utf-8", errors="backslashreplace") as whole:
                write_results(self.lines, whole, predictor.classes, predictor.category_ids)
            if not self.as_json:
                pictures = f"{self.done} picture{'s' * (self.done != 1)} and " if self.pictures else ""
                say(f"{pictures}{target.name} in {self.folder.folder}")
        self.lines.unlink()


def draw(result: Result, picture: Path, class_map: Path | None) -> None:
    drawn = result.plot()
    drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    drawn.save(picture, quality=90)  # of JPEG; PNG has none
    if class_map and isinstance(result, Segmented):
        result.to_png().save(class_map)


def predict_video(predictor: Predictor, file: Path, name: Path, writer: Writer) -> None:
    """Predict each frame; the frames, drawn, are an MP4 file, whose results are `<name>#<frame>`."""
    with ExitStack() as closing:
        append: Any = None
        for number, (seconds, frame) in enumerate(video.frames(file)):
            (result,) = predictor.results([(frame, f"{file}#{number}")])
            if writer.folder and writer.pictures:
                if append is None:
                    path = writer.folder.claim(name.with_suffix(".mp4"))
                    append = closing.enter_context(video.written(path, video.rate(file)))
                drawn = result.plot()
                drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
                append(drawn, seconds)
            writer.say(result, file, name.with_name(f"{name.name}#{number}"), {"seconds": round(seconds, 3)})


def predict_files(
    predictor: Predictor, paths: Sequence[str], out: Path | None, pictures: bool = True, as_json: bool = False
) -> None:
    """Predict images, folders and videos: a picture of each below `out`, all results in `predictions.json`.

    Detections are written as a COCO file, whose annotations have a `score`; class maps as PNGs in
    `class_maps/`, too. Results come into `predictions.jsonl` one by one, and become `predictions.json` at the
    end: a call that is stopped leaves those that are done. An image that cannot be predicted is left out; the
    others are done, then the error is raised. Memory does not grow with the number of images.

    Args:
        predictor: see `load_predictor`.
        paths: files, folders, patterns such as `photos/*.jpg`.
        out: the folder; None to write nothing.
        pictures: draw them.
        as_json: print results as JSON, one a line, in place of words.
    """
    from rich.console import Console
    from rich.progress import Progress

    files = list(find_images(paths))
    ids = CocoIds([file for file, _ in files]) if predictor.task == "detection" else None
    failed: list[UserError] = []

    console = Console(stderr=True) if as_json else None
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        writer = Writer(pool, out, pictures, as_json, ids)
        with Progress(transient=True, console=console) as bar:
            task = bar.add_task("predicting", total=len(files))
            for batch in Ready(pool, predictor, files):
                opened = [one for _, _, one in batch if isinstance(one, tuple)]
                results = iter(_results(predictor, opened) if opened else [])
                for file, name, one in batch:
                    found = next(results) if isinstance(one, tuple) else one
                    try:
                        if found is None:
                            predict_video(predictor, file, name, writer)
                        elif isinstance(found, UserError):
                            raise found
                        else:
                            writer.add(found, file, name)
                    except UserError as error:  # of this file; the rest is done
                        failed.append(error)
                        print(f"left out: {error}", file=sys.stderr, flush=True)
                    bar.advance(task)
        writer.close(predictor)
    if failed:
        raise UserError(f"{failed[0]}; {len(failed)} of {len(files)} images {were(len(failed))} left out")


def write_results(
    lines: Path, whole: TextIO, classes: Sequence[str], category_ids: Sequence[Any] | None = None
) -> None:
    """One JSON of a file of results a line: a list, or of detections COCO's three; held one by one."""

    def results() -> Iterator[dict[str, Any]]:
        with lines.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def write(items: Iterable[Any]) -> None:
        separator = "["
        for item in items:
            whole.write(separator + "\n" + json.dumps(item, ensure_ascii=False))
            separator = ","
        whole.write("\n]" if separator == "," else "[]")

    def images_of() -> Iterator[dict[str, Any]]:
        for result in results():
            size = dict(width=result["width"], height=result["height"])
            yield dict(id=result["id"], file_name=result["file_name"], **size)

    def annotations() -> Iterator[dict[str, Any]]:
        number = itertools.count(1)
        for result in results():
            for found in result["objects"]:
                yield {**found, "id": next(number), "image_id": result["id"]}

    if "objects" not in next(results()):
        write(results())
    else:
        whole.write('{"images": ')
        write(images_of())
        whole.write(',\n"annotations": ')
        write(annotations())
        numbers = category_ids or range(1, 1 + len(classes))
        categories = [dict(id=k, name=name) for k, name in zip(numbers, classes, strict=True)]
        whole.write(f',\n"categories": {json.dumps(categories, ensure_ascii=False)}}}')
    whole.write("\n")
