"""WebDataset's shards: tar files in which a sample's files follow one another, `0017.jpg`, `0017.cls`.

They are read where they lie on disk, by place: where each image begins is found once, when the data are
opened. So a shard's images have an order as a folder's have, every one is seen once an epoch by any number of
processes and workers, and a run goes on in the middle of an epoch; a stream gives none of that.
"""

import io
import json
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


Member = tuple[str, int, int, int | None]  # name, offset, size, label (of .cls and .json)


def _samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of each image of a shard its name, where it begins, how long it is, and its class."""
    key = ""
    files: list[Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for name, member in _members(tar):
                folder, slash, base = name.rpartition("/")
                stem = folder + slash + base.partition(".")[0]
                if stem != key:
                    yield from _pair(path, key, files)
                    key, files = stem, []
                label = None
                if (kind := name.rpartition(".")[2].lower()) in ("cls", "json"):
                    file = tar.extractfile(member)
                    assert file is not None  # of a regular file
                    label = _label(f"{path}/{name}", file.read(), kind)
                files.append((name, member.offset_data, member.size, label))
            yield from _pair(path, key, files)
            with path.open("rb") as whole:  # a damaged header ends what `tarfile` reads, without an error
                whole.seek(tar.offset)
                if whole.read(len(END)) != END:
                    raise tarfile.ReadError("it is cut or damaged")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a shard ({error}); fetch it again") from None


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of a shard with their names; hidden ones are left out."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
        name = member.name.removeprefix("./")
        if member.isfile() and not is_hidden(Path(name)):
            yield member.name, member


def _pair(path: Path, key: str, files: list[Member]) -> Iterator[tuple[str, int, int, int]]:
    """Pair images with their classes, among files whose names are the same up to the first dot.

    `photo.jpg` belongs to `photo.cls` or `photo.json`, and `photo.v2.jpg` to `photo.v2.cls`. Other images,
    such as `photo.seg.png`, are no samples.
    """
    labels: dict[str, int] = {}
    for name, _, _, label in files:
        stem, _, kind = name.rpartition(".")
        if label is not None and (kind.lower() == "cls" or stem not in labels):
            labels[stem] = label
    taken: set[str] = set()
    for name, offset, size, _ in files:
        stem, _, kind = name.rpartition(".")
        if f".{kind.lower()}" not in EXTENSIONS or stem in taken:
            continue
        if stem in labels:
            taken.add(stem)
            yield name, offset, size, labels[stem]
        elif stem == key or not labels:
            raise UserError(f"{path}/{name}: has no class beside it, no {stem}.cls")


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
