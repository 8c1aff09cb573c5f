"""Class folders inside a tar file, read by random access."""

import io
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crossformer_vision.data.images import EXTENSIONS, StringArray, is_hidden, open_upright
from crossformer_vision.data.rasters import AnyImage
from crossformer_vision.errors import UserError


class TarImages:
    """``<class>/.../<image>`` inside a tar file: the class is the first folder, as in a folder of images.

    A nested tar file, as in ImageNet for each class, is treated as a folder of the same name. Each image is
    read through its own file object, so workers do not share a position.

    Args:
        path: The tar file, not compressed.
        classes: Names of the training classes; empty for the file's own, sorted.

    Raises:
        UserError: If the file cannot be read, has no images in class folders, or an unknown class.
    """

    def __init__(self, path: Path, classes: list[str]) -> None:
        self.path = path
        offsets, sizes, labels = array("q"), array("q"), array("i")
        class_ids: dict[str, int] = {}

        def names() -> Iterator[str]:
            for name, offset, size in iterate_members(path):
                offsets.append(offset)
                sizes.append(size)
                labels.append(class_ids.setdefault(name.partition("/")[0], len(class_ids)))
                yield name

        try:
            self.names = StringArray(names())
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path}: cannot be read as a tar file of class folders ({error})") from None
        if not class_ids:
            raise UserError(f"{path}: no images in class folders")
        if classes and (unknown := sorted(set(class_ids) - set(classes))):
            raise UserError(f"{path}/{unknown[0]}: class '{unknown[0]}' is not among the training classes")
        self.classes = list(classes or sorted(class_ids))
        index = [self.classes.index(name) for name in class_ids]
        self.labels = np.array(index, np.int32)[np.array(labels)]
        self.offsets, self.sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[AnyImage, int]:
        """An upright image and its label."""
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[index]))
            content = file.read(int(self.sizes[index]))
        return open_upright(io.BytesIO(content)), int(self.labels[index])

    def name(self, index: int) -> str:
        """Path of an image, for messages."""
        return f"{self.path}/{self.names[index]}"


def iterate_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Images in class folders of a tar file: name, offset in the file and size in bytes.

    Raises:
        tarfile.TarError: If the file is damaged or compressed.
    """
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if not member.isfile() or is_hidden(Path(name)):
                continue
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and "/" in name:
                yield name, member.offset_data, member.size
            elif suffix == ".tar":
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        if image.isfile() and Path(image.name).suffix.lower() in EXTENSIONS:
                            inside = f"{Path(name).stem}/{image.name.removeprefix('./')}"
                            if not is_hidden(Path(inside)):
                                yield inside, member.offset_data + image.offset_data, image.size
