"""WebDataset shards: tar files with adjacent files of each sample, such as ``0017.jpg`` and ``0017.cls``.

Shards are read by random access: the position of each image is found once, when the data are opened. Unlike
with a stream, each image occurs once per epoch for any number of processes and workers, and a run can resume
in the middle of an epoch.
"""

import io
import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crossformer_vision.data.images import EXTENSIONS, StringArray, is_hidden, open_upright
from crossformer_vision.data.rasters import AnyImage
from crossformer_vision.errors import UserError

END_OF_ARCHIVE = bytes(512)


def find_shards(root: Path, name: str) -> list[Path]:
    """Find the shards of a split: tar files in its folder, or ``<name>-0000.tar``, ``x-<name>-0000.tar``, ….

    Args:
        root: Data root.
        name: Name of the split.

    Returns:
        Sorted paths. Empty if the split's folder contains folders, which are classes.
    """
    folder = root / name
    if folder.is_dir():
        entries = [p for p in folder.iterdir() if not is_hidden(Path(p.name))]
        return [] if any(p.is_dir() for p in entries) else sorted(p for p in entries if p.suffix == ".tar")
    numbered = re.compile(rf"(.+[-_])?{re.escape(name)}[-_.]\d+\.tar")
    return sorted(p for p in root.glob("*.tar") if numbered.fullmatch(p.name))


class ShardImages:
    """Images of shards with their class: ``key.jpg`` and ``key.cls``, or ``key.json`` with a ``label``.

    Args:
        paths: Tar files.
        classes: Class names by label. If empty, classes are named by their number.

    Raises:
        UserError: If a shard is truncated or not a tar file, or an image has no class or an invalid one.
    """

    def __init__(self, paths: list[Path], classes: list[str]) -> None:
        self.paths = paths
        shards, offsets, sizes, labels = array("i"), array("q"), array("q"), array("i")

        def names() -> Iterator[str]:
            for shard, path in enumerate(paths):
                for key, offset, size, label in _read_samples(path):
                    shards.append(shard)
                    offsets.append(offset)
                    sizes.append(size)
                    labels.append(label)
                    yield key

        self.names = StringArray(names())
        if not labels:
            raise UserError(f"{paths[0]}: no images in this shard, nor in others of its split")
        self.shards, self.labels = np.array(shards, np.int32), np.array(labels, np.int32)
        self.offsets, self.sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
        self.classes = list(classes) or [str(k) for k in range(1 + int(self.labels.max()))]
        unnamed = np.flatnonzero(self.labels >= len(self.classes))
        if len(unnamed):
            label = self.labels[unnamed[0]]
            raise UserError(
                f"{self.name(int(unnamed[0]))}: class {label} is not among the {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[AnyImage, int]:
        """An upright image and its label."""
        with open(self.paths[self.shards[index]], "rb") as file:
            file.seek(int(self.offsets[index]))
            content = file.read(int(self.sizes[index]))
        return open_upright(io.BytesIO(content)), int(self.labels[index])

    def name(self, index: int) -> str:
        """Path of an image, for messages."""
        return f"{self.paths[self.shards[index]]}/{self.names[index]}"


Member = tuple[str, int, int, int | None]  # name, offset, size, label (.cls and .json only)


def _read_samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset in the file, size in bytes and label of each image."""
    key = ""
    files: list[Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for name, member in _iterate_members(tar):
                folder, slash, base = name.rpartition("/")
                stem = folder + slash + base.partition(".")[0]
                if stem != key:
                    yield from _pair_labels(path, key, files)
                    key, files = stem, []
                label = None
                if (kind := name.rpartition(".")[2].lower()) in ("cls", "json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    label = _parse_label(f"{path}/{name}", file.read(), kind)
                files.append((name, member.offset_data, member.size, label))
            yield from _pair_labels(path, key, files)
            with path.open("rb") as file_object:  # tarfile stops at a damaged header without an error
                file_object.seek(tar.offset)
                if file_object.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
                    raise tarfile.ReadError("it is truncated or damaged")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a shard ({error}). Download it again") from None


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Files of a shard with their names, except hidden ones."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps all members in memory
        name = member.name.removeprefix("./")
        if member.isfile() and not is_hidden(Path(name)):
            yield name, member


def _pair_labels(path: Path, key: str, files: list[Member]) -> Iterator[tuple[str, int, int, int]]:
    """Pair images with their labels, among files whose names are equal up to the first dot.

    ``photo.jpg`` belongs to ``photo.cls`` or ``photo.json``, and ``photo.v2.jpg`` to ``photo.v2.cls``. Other
    images, such as ``photo.seg.png``, are ignored.
    """
    labels: dict[str, int] = {}
    for name, _, _, label in files:
        stem, _, kind = name.rpartition(".")
        if label is not None and (kind.lower() == "cls" or stem not in labels):
            labels[stem] = label
    paired: set[str] = set()
    for name, offset, size, _ in files:
        stem, _, kind = name.rpartition(".")
        if f".{kind.lower()}" not in EXTENSIONS or stem in paired:
            continue
        if stem in labels:
            paired.add(stem)
            yield name, offset, size, labels[stem]
        elif stem == key or not labels:
            raise UserError(f"{path}/{name}: has no class file {stem}.cls")


def _parse_label(name: str, content: bytes, kind: str) -> int | None:
    """Label in a ``.cls`` or ``.json`` file. ``None`` if a ``.json`` file has none."""
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
