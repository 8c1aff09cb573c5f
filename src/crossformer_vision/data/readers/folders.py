"""Class folders: ``<class>/…/<image>``."""

import logging
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossformer_vision.data.images import EXTENSIONS, StringArray, is_hidden, names_below, open_upright
from crossformer_vision.data.randomness import mix_seed
from crossformer_vision.data.rasters import AnyImage
from crossformer_vision.errors import UserError, counted

log = logging.getLogger("crossformer_vision")


class LabeledImages:
    """Image files below a folder, with one class each.

    Args:
        folder: Folder of the images.
        names: Their paths below it.
        labels: Class index of each image.
        classes: Class names.
    """

    def __init__(
        self, folder: Path, names: StringArray, labels: NDArray[np.integer], classes: list[str]
    ) -> None:
        self.folder, self.names, self.classes = folder, names, classes
        self.labels = labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[AnyImage, int]:
        """An upright image and its class index."""
        return open_upright(self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        """Path of an image."""
        return f"{self.folder}/{self.names[index]}"

    def select(self, names: set[str]) -> "LabeledImages":
        """The images with given names below the folder."""
        indices, chosen = self.find(names)
        return LabeledImages(self.folder, chosen, self.labels[indices], self.classes)

    def find(self, names: set[str]) -> tuple[list[int], StringArray]:
        """Indices and names of the images with given names."""
        indices = [n for n, name in enumerate(self.names) if name in names]
        return indices, StringArray(self.names[n] for n in indices)


class FolderImages(LabeledImages):
    """``<class>/…/<image>``: the class is the first folder, however deep the image lies below it.

    It reads ImageNet's ``train/<class>/x.JPEG`` and tiny-ImageNet's ``train/<class>/images/x.JPEG``.

    Args:
        folder: Folder of the class folders.
        classes: Names of the training classes; empty for the folder's own, sorted.

    Raises:
        UserError: If there are no images, a class folder is empty, or a class is unknown.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = folder
        labels = array("i")  # in the order of the names
        found: dict[str, int] = {}
        other_files: list[str] = []
        outside: list[str] = []  # images in no class folder

        def image_names() -> Iterator[str]:
            for name in names_below(folder):
                first, below, _ = name.partition("/")
                is_image = name[name.rfind(".") :].lower() in EXTENSIONS
                if below and is_image:
                    labels.append(found.setdefault(first, len(found)))
                    yield name
                elif is_image:
                    outside.append(name)
                elif below:
                    other_files.append(name)

        names = StringArray(image_names())
        self._check_folders(set(found))
        if other_files:
            example = folder / other_files[0]
            log.warning("%s: skipped %d files that are not images: %s, …", folder, len(other_files), example)
        if outside:
            count = counted(len(outside), "image")
            log.warning("%s: skipped %s outside the class folders, such as %s", folder, count, outside[0])
        indices = class_indices(folder, list(found), classes)
        by_order = np.array([indices[name] for name in found], np.int32)
        super().__init__(folder, names, by_order[np.array(labels)], list(indices))

    def _check_folders(self, found: set[str]) -> None:
        folder = self.folder
        if not found:
            raise UserError(
                f"{folder}: no images in class folders; expected {folder.name}/<class>/<image>.jpg"
            )
        folders = {path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(Path(path.name))}
        if empty := sorted(folders - found):
            raise UserError(
                f"{folder / empty[0]}: a class folder without images. Add images, or choose another --task "
                "if this is not a folder of classes"
            )


def class_indices(path: Path, found: list[str], classes: Sequence[str]) -> dict[str, int]:
    """Index of each class.

    Args:
        path: Folder or file, for messages.
        found: Class names in it.
        classes: Names of the training classes; empty for the found ones.

    Raises:
        UserError: If a class is not among the training classes.
    """
    if unknown := sorted(set(found) - set(classes or found)):
        place = path / unknown[0] if path.is_dir() else path
        raise UserError(f"{place}: class '{unknown[0]}' is not among the training classes")
    return {name: i for i, name in enumerate(classes or found)}


def hold_out(images: LabeledImages, share: float, seed: int) -> list[str]:
    """Choose validation images: the same share of each class at random, at least one of two.

    Args:
        images: All images. Those with several classes are not divided by class.
        share: Share to hold out, from 0 to 1.
        seed: Seed of the choice.

    Returns:
        Names of the images, sorted.
    """
    names_by_class: dict[int, list[str]] = {}
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        names_by_class.setdefault(label, []).append(name)
    chosen: list[str] = []
    for label, names in names_by_class.items():
        rng = np.random.default_rng(mix_seed(seed, zlib.crc32(images.classes[label].encode())))
        count = min(len(names) - 1, max(1, round(share * len(names)))) if share < 1 else len(names)
        chosen += rng.permutation(names)[:count].tolist()
    return sorted(chosen)
