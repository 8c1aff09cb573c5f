"""Output of predictions: JSON files, and a folder in which files of the user are never overwritten."""

import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from crossformer_vision.data.readers.coco_json import coco_id
from crossformer_vision.errors import UserError, counted
from crossformer_vision.types import JsonObject

log = logging.getLogger("crossformer_vision")

MANIFEST = ".crossformer-predictions"  # in an output folder: lists the files that the last call wrote


def print_line(text: str) -> None:
    """Print a line. After the reader has closed the pipe (``| head``), output is discarded."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def earlier_predictions(folder: Path) -> list[Path]:
    """Files that earlier predictions wrote to a folder; empty if it is no output folder."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    paths = [folder / line for line in lines if line]
    return [path for path in paths if path.resolve().is_relative_to(folder.resolve())]


class OutputFolder:
    """An output folder. Files of the last call are removed, other files are never overwritten.

    Args:
        path: The folder, created if necessary.

    Raises:
        UserError: If it cannot be created or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            earlier = [file for file in earlier_predictions(path) if file.is_file()]
            for file in earlier:
                file.unlink()
        except OSError as error:
            raise UserError(f"{path}: cannot be used as output folder ({error.strerror})") from None
        if len(earlier) > 1:  # more than the manifest
            files = counted(len(earlier), "file")
            print_line(f"replacing {files} of an earlier call in {path}. Choose another with --output")
        self.manifest = (path / MANIFEST).open("w", encoding="utf-8", errors="surrogateescape")

    def claim(self, name: str | Path) -> Path:
        """Create an empty file with this name, numbered if it exists.

        Args:
            name: Path below the folder.

        Returns:
            Path of the file.
        """
        wanted = self.path / name
        path, number = wanted, 1
        while path.exists():
            number += 1
            path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.manifest.write(f"{path.relative_to(self.path)}\n")
        self.manifest.flush()
        path.touch()
        return path


class CocoIds:
    """Ids and file names of images from COCO files beside them; other images are numbered from 1.

    COCO files are searched in the locations that training data use: ``<folder>/_annotations.coco.json``, or
    ``annotations/instances_<split>.json`` beside the folder or one above. If images of several splits share
    an id, all images are numbered.

    Args:
        files: Image files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.known: dict[Path, tuple[int | str, str]] = {}
        for folder in sorted({parent for file in files for parent in list(file.parents)[:4]}):
            name = f"instances_{folder.resolve().name}.json"
            above = (folder.parent, folder.parent.parent)
            paths = [folder / "_annotations.coco.json", *(path / "annotations" / name for path in above)]
            for path in paths:
                if path.is_file():
                    self._read(path, folder)
        ids = [self.known[file][0] for file in files if file in self.known]
        if len(set(ids)) < len(ids):
            log.warning("several images have the same id in their COCO files, so all are numbered from 1")
            self.known, ids = {}, []
        self.numbers = itertools.count(1 + max((i for i in ids if isinstance(i, int)), default=0))

    def _read(self, path: Path, folder: Path) -> None:
        try:
            images = json.loads(path.read_bytes())["images"]
            self.known |= {folder / i["file_name"]: (coco_id(i["id"]), i["file_name"]) for i in images}
        except (OSError, ValueError, KeyError, TypeError):  # not a COCO file
            return

    def entry(self, file: Path, name: Path) -> JsonObject:
        """``id`` and ``file_name`` of an image.

        Args:
            file: Image file.
            name: Its name if no COCO file lists it.
        """
        number, file_name = self.known.get(file) or (next(self.numbers), name.as_posix())
        return {"id": number, "file_name": file_name}


def write_results(
    lines: Path, stream: TextIO, classes: Sequence[str], category_ids: Sequence[int | str] | None = None
) -> None:
    """Combine results into one JSON document without holding them in memory.

    Args:
        lines: File with the JSON of one result per line.
        stream: Output: a list, or a COCO file if the results are detections.
        classes: Class names.
        category_ids: Ids of the classes in a COCO file. ``None`` for 1, 2, …
    """
    if "objects" not in next(_read_lines(lines)):
        _write_list(stream, _read_lines(lines))
    else:
        stream.write('{"images": ')
        _write_list(stream, _coco_images(lines))
        stream.write(',\n"annotations": ')
        _write_list(stream, _coco_annotations(lines))
        ids = category_ids or range(1, 1 + len(classes))
        categories = [{"id": k, "name": name} for k, name in zip(ids, classes, strict=True)]
        stream.write(f',\n"categories": {json.dumps(categories, ensure_ascii=False)}}}')
    stream.write("\n")


def _read_lines(lines: Path) -> Iterator[JsonObject]:
    with lines.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _write_list(stream: TextIO, items: Iterable[object]) -> None:
    separator = "["
    for item in items:
        stream.write(separator + "\n" + json.dumps(item, ensure_ascii=False))
        separator = ","
    stream.write("\n]" if separator == "," else "[]")


def _coco_images(lines: Path) -> Iterator[JsonObject]:
    for result in _read_lines(lines):
        yield {key: result[key] for key in ("id", "file_name", "width", "height")}


def _coco_annotations(lines: Path) -> Iterator[JsonObject]:
    numbers = itertools.count(1)
    for result in _read_lines(lines):
        for predicted in result["objects"]:
            yield {**predicted, "id": next(numbers), "image_id": result["id"]}
