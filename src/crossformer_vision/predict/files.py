"""Predicting files and folders: pictures and results below a folder of their own."""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from crossformer_vision.data import images
from crossformer_vision.errors import UserError
from crossformer_vision.predict import Predictor
from crossformer_vision.predict.results import Segmented

LARGEST = 2048  # longer side of a picture that is written, in pixels
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
    """(file, its name below the folder that was given) of image files and of those in folders, sorted.

    In folders, what is hidden and what earlier predictions drew is left out.
    """
    for text in paths:
        path = Path(text)
        if path.is_dir():
            drawn = {file.resolve() for mark in path.rglob(OURS) for file in _written(mark.parent)}
            files = [
                p
                for p in images.files_below(path)
                if p.suffix.lower() in images.EXTENSIONS and p.resolve() not in drawn
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
        print(text.encode("utf-8", "replace").decode("utf-8"), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def were(count: int) -> str:
    return "was" if count == 1 else "were"


class CocoIds:
    """Ids and file names of images as a COCO file has them that lies beside them, or else numbered from 1.

    Looked for where the data of a training are: `<folder>/_annotations.coco.json`, or
    `annotations/instances_<split>.json` beside the folder or one above it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
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
        self.number = itertools.count(
            1 + max((i for i, _ in self.known.values() if isinstance(i, int)), default=0)
        )

    def _read(self, path: Path, folder: Path) -> None:
        try:
            images = json.loads(path.read_bytes())["images"]
            self.known |= {folder / image["file_name"]: (image["id"], image["file_name"]) for image in images}
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


def predict_files(predictor: Predictor, paths: Sequence[str], out: Path) -> None:
    """Predict images and folders: a picture of each below `out`, and all results in `predictions.json`.

    Detections are written as a COCO file, whose annotations have a `score`; class maps as PNGs in
    `class_maps/`, too. Results come into `predictions.jsonl` one by one, and become `predictions.json` at the
    end: a call that is stopped leaves those that are done. An image that cannot be predicted is left out; the
    others are done, then the error is raised.
    """
    from rich.progress import track

    files = list(find_images(paths))
    ids = CocoIds(file for file, _ in files) if predictor.task == "detection" else None
    folder = OutFolder(out)
    lines = folder.claim("predictions.jsonl")
    failed: list[UserError] = []
    done = 0
    with lines.open("w", encoding="utf-8") as stream:
        for file, name in track(files, "predicting", transient=True):
            try:
                result = predictor(file)
            except Exception as error:  # of this image; the rest is done
                named = (
                    error if isinstance(error, UserError) else UserError(f"{file}: {images.reason(error)}")
                )
                failed.append(named)
                print(f"left out: {named}", file=sys.stderr, flush=True)
                continue
            done += 1
            jpeg = file.suffix.lower() in (".jpg", ".jpeg")
            picture = folder.claim(name.with_suffix(".jpg" if jpeg else ".png"))
            drawn = result.plot()
            drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            drawn.save(picture, quality=90)  # of JPEG; PNG has none
            if isinstance(result, Segmented):
                class_map = folder.claim(Path("class_maps") / picture.relative_to(out).with_suffix(".png"))
                result.to_png().save(class_map)
            content = result.to_dict()
            if ids is not None:
                content |= ids.of(file, name)
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")
            stream.flush()
            say(str(result))
    if done:
        target = folder.claim("predictions.json")
        with target.open("w", encoding="utf-8") as whole:
            write_results(lines, whole, predictor.classes, predictor.category_ids)
        say(f"{done} picture{'s' * (done != 1)} and {target.name} in {out}")
    lines.unlink()
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
