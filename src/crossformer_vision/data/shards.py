"""WebDataset's shards: tar files in which a sample's files follow one another, `0017.jpg`, `0017.cls`.

They are read where they lie on disk, by place: where each image begins is found once, when the data are
opened. So a shard's images have an order as a folder's have, every one is seen once an epoch by any number of
processes and workers, and a run goes on in the middle of an epoch; a stream gives none of that.
"""

import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from crossformer_vision.data.images import EXTENSIONS, Names, is_hidden, upright
from crossformer_vision.errors import UserError

END = bytes(512)  # closes a tar file, at least


def shards_of(root: Path, name: str) -> list[Path]:
    """The shards of a split: the tar files in its folder, or `<name>-0000.tar`, `x-<name>-0000.tar`, ….

    There are none in a folder that has folders, which are classes.
    """
    folder = root / name
    if folder.is_dir():
        entries = [p for p in folder.iterdir() if not is_hidden(Path(p.name))]
        return [] if any(p.is_dir() for p in entries) else sorted(p for p in entries if p.suffix == ".tar")
    numbered = re.compile(rf"(.+[-_])?{re.escape(name)}[-_.]\d+\.tar")
    return sorted(p for p in root.glob("*.tar") if numbered.fullmatch(p.name))


class ShardImages:
    """The images of some shards, each with its class: `key.jpg`, and `key.cls` or `key.json` with a `label`.

    Args:
        paths: of the tar files.
        classes: names by label; numbers if there are none.

    Raises:
        UserError: a shard that is cut or no tar file; an image without a class, or with one that has no name.
    """

    def __init__(self, paths: list[Path], classes: list[str]) -> None:
        self.paths = paths
        shards, offsets, sizes, labels = array("i"), array("q"), array("q"), array("i")

        def names() -> Iterator[str]:
            for number, path in enumerate(paths):
                for key, offset, size, label in _samples(path):
                    shards.append(number)
                    offsets.append(offset)
                    sizes.append(size)
                    labels.append(label)
                    yield key

        self.names = Names(names())
        if not labels:
            raise UserError(f"{paths[0]}: no images in this shard, nor in others of its split")
        self.shards, self.labels = np.array(shards, np.int32), np.array(labels, np.int32)
        self.offsets, self.sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
        self.classes = list(classes) or [str(k) for k in range(1 + int(self.labels.max()))]
        beyond = np.flatnonzero(self.labels >= len(self.classes))
        if len(beyond):
            label = self.labels[beyond[0]]
            raise UserError(
                f"{self.name(int(beyond[0]))}: class {label} is not among the {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        with open(self.paths[self.shards[index]], "rb") as file:
            file.seek(int(self.offsets[index]))
            content = file.read(int(self.sizes[index]))
        return upright(Image.open(io.BytesIO(content))), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.paths[self.shards[index]]}/{self.names[index]}"


def _samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of each image of a shard its name, where it begins, how long it is, and its class."""
    image: tuple[str, int, int] | None = None
    key, label = "", None
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                member = tar.next()
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member is not None and (
                    not member.isfile() or is_hidden(Path(member.name.removeprefix("./")))
                ):
                    continue
                folder, base = os.path.split(member.name) if member else ("", "")
                stem, _, kind = base.partition(".")
                kind, found = kind.lower(), f"{folder}/{stem}" if folder else stem
                if member is None or found != key:
                    if image is not None and label is None:
                        raise UserError(f"{path}/{image[0]}: has no class beside it, no {key}.cls")
                    if image is not None and label is not None:
                        yield *image, label
                    key, image, label = found, None, None
                if member is None:
                    break
                if f".{kind}" in EXTENSIONS and image is None:  # not x.seg.png
                    image = (member.name, member.offset_data, member.size)
                elif kind == "cls" or (kind == "json" and label is None):
                    file = tar.extractfile(member)
                    assert file is not None  # of a regular file
                    value = _label(f"{path}/{member.name}", file.read(), kind)
                    label = label if value is None else value
            with path.open("rb") as whole:  # a damaged header ends what `tarfile` reads, without an error
                whole.seek(tar.offset)
                if whole.read(len(END)) != END:
                    raise tarfile.ReadError("it is cut or damaged")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a shard ({error}); fetch it again") from None


def _label(name: str, content: bytes, kind: str) -> int | None:
    """The class in a `.cls` or a `.json`, which may have none."""
    try:
        if kind == "json":
            value = json.loads(content).get("label")
            if value is None:
                return None
        else:
            value = content.decode().strip()
        label = int(value)
        if label != (float(value) if isinstance(value, str) else value) or not 0 <= label < 2**31:
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{name}: its class is {content[:40]!r}, not a whole number from 0") from None
    return label
