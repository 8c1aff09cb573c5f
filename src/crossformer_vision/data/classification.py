"""Image classification: images and classes on disk, or the digits that come with the library -> batches."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from timm.data import create_transform, str_to_interp_mode
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader
from torch import Tensor
from torchvision import transforms

from crossformer_vision.data import digits
from crossformer_vision.data.images import EXTENSIONS, files_below, is_hidden, upright
from crossformer_vision.data.loading import ReadImages, ResumableData, SeededLoader, Source
from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model

log = logging.getLogger("crossformer_vision")


class LabelledSource(Source, Protocol):
    """Images with a class each."""

    classes: list[str]


class FolderImages:
    """`<class>/…/<image>`: the class is the first folder, however deep the image lies below it.

    So it reads both ImageNet's `train/<class>/x.JPEG` and tiny-ImageNet's `train/<class>/images/x.JPEG`.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        below = [p for p in files_below(folder) if len(p.relative_to(folder).parts) > 1]
        files = [p for p in below if p.suffix.lower() in EXTENSIONS]
        if not files:
            raise UserError(
                f"{folder}: no images in class folders; expected {folder.name}/<class>/<image>.jpg"
            )
        names = [p.relative_to(folder).parts[0] for p in files]
        listed = {p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(Path(p.name))}
        if empty := sorted(listed - set(names)):
            raise UserError(
                f"{folder / empty[0]}: a class without images; put some there, or remove the folder"
            )
        if others := [p for p in below if p.suffix.lower() not in EXTENSIONS]:
            log.warning("%s: left out %d files that are no images: %s, …", folder, len(others), others[0])
        number = _number(folder, sorted(set(names)), classes)
        self.classes = list(number)
        self.samples = [(str(p), number[name]) for p, name in zip(files, names, strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return upright(Image.open(path)), label

    def name(self, index: int) -> str:
        return self.samples[index][0]


class TarImages:
    """`<class>/<image>` inside a tar file, through timm's reader."""

    def __init__(self, path: Path, classes: list[str]) -> None:
        try:
            self.reader = create_reader("", root=str(path))
        except Exception as error:
            raise UserError(f"{path}: cannot be read as a tar file of class folders ({error})") from error
        if not len(self.reader):
            raise UserError(f"{path}: no images in class folders")
        self.path = path
        number = _number(path, list(self.reader.class_name_to_idx), classes)
        self.classes = list(number)
        self.labels = {theirs: number[name] for name, theirs in self.reader.class_name_to_idx.items()}

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        return upright(Image.open(file)), self.labels[label]

    def name(self, index: int) -> str:
        return f"{self.path}/{self.reader.filename(index)}"


class NamedImages:
    """A torchvision or Hugging Face dataset, by timm's name for it."""

    def __init__(self, dataset: str, root: str | None, split: str, download: bool) -> None:
        root = root or str(Path("~/.cache/crossformer-vision").expanduser())
        try:
            self.dataset = create_dataset(dataset, root=root, split=split, download=download)
        except Exception as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"dataset '{dataset}', split '{split}': {message}") from error
        self.label = f"{dataset} {split}"
        reader = getattr(self.dataset, "reader", None)
        classes = getattr(self.dataset, "classes", None) or list(getattr(reader, "class_to_idx", None) or ())
        self.classes = [str(c) for c in classes or range(1 + max(self.read(i)[1] for i in range(len(self))))]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return upright(image), int(label)

    def name(self, index: int) -> str:
        return f"{self.label}, image {index}"


class DigitImages:
    """The multi-scale digits, one in an image."""

    classes = list(digits.CLASSES)

    def __init__(self, stage: str, length: int, size: int, seed: int) -> None:
        self.dataset = digits.MultiScaleDigits(stage, length, size, seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return image, target["label"]

    def name(self, index: int) -> str:
        return f"digit {index}"


def _number(path: Path, found: list[str], classes: list[str]) -> dict[str, int]:
    """Class name -> index: those of the training split, or else the ones found."""
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise UserError(f"{path / unknown[0]}: class '{unknown[0]}' is not among the training classes")
    return {name: i for i, name in enumerate(classes or found)}


def _with_label(
    transform: Callable[[Image.Image], Tensor], image: Image.Image, label: int
) -> tuple[Tensor, int]:
    return transform(image), label


class ClassificationData(ResumableData):
    """Images with one class each, through timm's readers and augmentation.

    Args:
        model: timm name of the model, whose image size, normalisation and crop hold where none is given.
        root: folder with `train/<class>/…` and `val/<class>/…` (or `validation`, `test`), or with tar files
            of class folders; null for the multi-scale digits that come with the library.
        dataset: a dataset by name instead of a folder: `torch/cifar10`, `hfds/ylecun/mnist`, … as timm calls
            them.
        download: let a torchvision dataset download itself into `root`.
        train_split: folder, tar file or split to train on.
        val_split: folder, tar file or split to validate on.
        image_size: side of the square images, in pixels; null for the model's own.
        batch_size: images a step, of each process.
        num_workers: processes that read images; null for one less than there are cores, at most 8.
        crop: `resized` crops a random area of 8 to 100 % (ImageNet's way), `padded` pads by an eighth and
            crops at random (CIFAR's way), `none` only resizes.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy, such as `rand-m9-mstd0.5-inc1`.
        color_jitter: strength; unused beside `auto_augment`.
        erasing: probability of random erasing.
        crop_pct: share of the image that validation crops from the centre; null for the model's own.
        interpolation: `bicubic` or `bilinear`; null for the model's own.
        train_images: digits only: images an epoch.
        val_images: digits only: images to validate on.
        skip_corrupt: leave unreadable images out and count them, instead of stopping at the first.
        seed: of the order, the augmentation and the digits.
    """

    def __init__(
        self,
        model: str = "crossformer_nano",
        root: str | None = None,
        dataset: str | None = None,
        download: bool = False,
        train_split: str = "train",
        val_split: str = "val",
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        crop: Literal["resized", "padded", "none"] = "resized",
        hflip: float = 0.5,
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        erasing: float = 0.0,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        train_images: int = 4000,
        val_images: int = 1000,
        skip_corrupt: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed)
        self.model_cfg = find_model(model)
        self.dataset, self.download = dataset, download
        self.image_size, self.crop_pct, self.interpolation = image_size, crop_pct, interpolation
        self.crop, self.hflip, self.auto_augment = crop, hflip, auto_augment
        self.color_jitter, self.erasing = color_jitter, erasing
        self.lengths = {"train": train_images, "val": val_images}
        self.classes: list[str] = []

    @property
    def num_classes(self) -> int:
        """How many classes there are; looks for the images if that has not been done.

        Raises:
            UserError: a folder is missing or has no images, or a class stands in validation alone.
        """
        if not self.images:
            for stage in ("train", "val"):  # the training classes number the validation ones
                source = self._source(stage)
                self.classes = self.classes or source.classes
                transform = partial(_with_label, self._transform(stage))
                self.images[stage] = ReadImages(source, transform, self.skip_corrupt, stage == "train")
        if len(self.classes) < 2:
            only = f"{self.root or self.dataset}: has one class, '{self.classes[0]}'"
            raise UserError(f"{only}; a classifier needs two or more")
        return len(self.classes)

    def _find(self, stage: str) -> Path:
        """The folder or tar file of a split under `root`."""
        root, split = Path(str(self.root)), self.splits[stage]
        if not root.is_dir():
            raise UserError(
                f"{root}: no such folder; --data.root needs train/<class>/… and val/<class>/… in it"
            )
        for name in self.split_names(stage):
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
        raise UserError(
            f"{root / split}: no such folder or tar file; name the split with --data.{stage}_split"
        )

    def _source(self, stage: str) -> LabelledSource:
        if self.dataset:
            split = {"train": "train", "val": "validation"}.get(self.splits[stage], self.splits[stage])
            return NamedImages(self.dataset, self.root, split, self.download)
        if not self.root:
            return DigitImages(stage, self.lengths[stage], self._size(), self.seed)
        path = self._find(stage)
        return TarImages(path, self.classes) if path.suffix == ".tar" else FolderImages(path, self.classes)

    def _size(self) -> int:
        return self.image_size or self.model_cfg.input_size[-1]

    def _image(self) -> dict[str, Any]:
        """Size and normalisation, as timm's `create_transform` takes them."""
        return dict(
            input_size=(3, self._size(), self._size()),
            mean=tuple(self.model_cfg.mean),
            std=tuple(self.model_cfg.std),
            interpolation=self.interpolation or self.model_cfg.interpolation,
        )

    def describe(self) -> dict[str, Any]:
        crop_pct = self.crop_pct or self.model_cfg.crop_pct
        return {"classes": self.classes, "image": {**self._image(), "crop_pct": crop_pct}}

    def _transform(self, stage: str) -> Callable[[Image.Image], Tensor]:
        if stage == "val":
            return create_transform(**self.describe()["image"])
        common = self._image()
        crop_and_flip, recolour, finish = create_transform(
            **common,
            is_training=True,
            hflip=self.hflip,
            color_jitter=self.color_jitter or 0.0,
            auto_augment=self.auto_augment,
            re_prob=self.erasing,
            re_mode="pixel",
            separate=True,
        )
        if self.crop != "resized":
            size, interpolation = common["input_size"][1:], str_to_interp_mode(common["interpolation"])
            crop_and_flip = transforms.Compose([transforms.Resize(size, interpolation)])
            if self.crop == "padded":
                crop_and_flip.transforms.append(transforms.RandomCrop(size, padding=size[0] // 8))
            crop_and_flip.transforms.append(transforms.RandomHorizontalFlip(self.hflip))
        return transforms.Compose([crop_and_flip, recolour, finish])

    def _loader(self, stage: str) -> SeededLoader:
        assert self.num_classes  # the images are found
        return self.loader(stage)

    def train_dataloader(self) -> SeededLoader:
        return self._loader("train")

    def val_dataloader(self) -> SeededLoader:
        return self._loader("val")
