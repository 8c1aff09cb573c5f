"""Image classification: images and classes on disk, or the digits that come with the library -> batches."""

import logging
import zlib
from array import array
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from crossformer_vision.data.augmentation import Steps, composed
from crossformer_vision.data.images import EXTENSIONS, Names, is_hidden, names_below, upright
from crossformer_vision.data.loading import (
    SYNONYMS,
    ReadImages,
    ResumableData,
    SeededLoader,
    Source,
    mix_seed,
)
from crossformer_vision.data.readers import digits
from crossformer_vision.data.readers.named_datasets import HuggingFaceImages, TimmImages
from crossformer_vision.data.readers.shards import ShardImages, shards_of
from crossformer_vision.data.readers.tar import TarImages
from crossformer_vision.errors import NoSuchSplit, UserError, check_choice, check_range, counted
from crossformer_vision.models import find_model

log = logging.getLogger("crossformer_vision")


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")


class LabelledSource(Source, Protocol):
    """Images with a class each."""

    classes: list[str]


class FolderImages:
    """`<class>/…/<image>`: the class is the first folder, however deep the image lies below it.

    So it reads both ImageNet's `train/<class>/x.JPEG` and tiny-ImageNet's `train/<class>/images/x.JPEG`.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self.folder = folder
        labels = array("i")  # in the order of the names, which is that of the classes
        found: dict[str, int] = {}
        others: list[str] = []
        beside: list[str] = []  # images in no class folder

        def images() -> Iterator[str]:
            for name in names_below(folder):
                first, below, _ = name.partition("/")
                if not below:
                    if Path(name).suffix.lower() in EXTENSIONS:
                        beside.append(name)
                    continue
                if name[name.rfind(".") :].lower() in EXTENSIONS:
                    labels.append(found.setdefault(first, len(found)))
                    yield name
                else:
                    others.append(name)

        self.names = Names(images())
        if not found:
            raise UserError(
                f"{folder}: no images in class folders; expected {folder.name}/<class>/<image>.jpg"
            )
        listed = {p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(Path(p.name))}
        if empty := sorted(listed - set(found)):
            raise UserError(
                f"{folder / empty[0]}: a class folder without images. Add images, or choose another "
                "--task if this is no folder of classes"
            )
        if others:
            first = folder / others[0]
            log.warning("%s: left out %d files that are no images: %s, …", folder, len(others), first)
        if beside:
            log.warning(
                "%s: left out %s beside the class folders, such as %s",
                folder,
                counted(len(beside), "image"),
                beside[0],
            )
        number = _number(folder, list(found), classes)
        self.classes = list(number)
        self.labels = np.array([number[name] for name in found], np.int32)[np.array(labels)]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return upright(Image.open(self.name(index))), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.names[index]}"

    def some(self, names: set[str]) -> "FolderImages":
        """Those of these names below the folder."""
        part, kept = copy(self), [n for n, name in enumerate(self.names) if name in names]
        part.names, part.labels = Names(self.names[n] for n in kept), self.labels[kept]
        return part


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


def hold_out(images: FolderImages, share: float, seed: int) -> list[str]:
    """The same share of each class's images at random, at least one of two, for validation; names, sorted."""
    of_class: dict[int, list[str]] = {}
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        of_class.setdefault(label, []).append(name)
    chosen: list[str] = []
    for label, names in of_class.items():
        rng = np.random.default_rng(mix_seed(seed, zlib.crc32(images.classes[label].encode())))
        count = min(len(names) - 1, max(1, round(share * len(names)))) if share < 1 else len(names)
        chosen += rng.permutation(names)[:count].tolist()
    return sorted(chosen)


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
        root: folder with `train/<class>/…` and `val/<class>/…` (or `validation`, `test`), with tar files of
            class folders, with WebDataset's shards (`train/*.tar`, or `x-train-0000.tar`), or with class
            folders alone (see `val_share`); null for the multi-scale digits that come with the library.
        dataset: a dataset by name instead of a folder: `torch/cifar10`, `hfds/ylecun/mnist`, … as timm calls
            them.
        image_column: Hugging Face datasets only: column with the images; null if there is only one.
        label_column: Hugging Face datasets only: column with the classes; null for `label`, or the only one.
        val_share: share of the images that are held out for validation, of each class, where `root` has none
            for it, but class folders, or `train/` alone, and 1 for all; which ones is written to the run's
            `val_list.txt`.
        val_list: file with the names of the images to hold out, one below the folder of classes a line.
        classes: names of the classes in their order; null for the training images' own. The command takes
            those of a run that it validates or goes on with.
        download: let a torchvision dataset download itself into `root`.
        train_split: folder, tar file or split to train on.
        val_split: folder, tar file or split to validate on.
        image_size: side of the square images, in pixels; null for the model's own.
        batch_size: images a step, of each process.
        num_workers: processes that read images; null for one less than there are cores, at most 8.
        crop: `resized` crops a random area of 8 to 100 % (ImageNet's way), `padded` pads by an eighth and
            crops at random (CIFAR's way), `none` takes whole images, stretched to the square, in validation
            and prediction, too.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy, such as `rand-m9-mstd0.5-inc1`.
        color_jitter: strength; unused beside `auto_augment`.
        erasing: probability of random erasing.
        augmentation: your own for training, in place of the five above: a callable from an image, PIL's in
            RGB, to an image, PIL's or a tensor (3, H, W) of bytes or of floats in 0..1, which is then brought
            to `image_size` and normalised; or a list of such. The command takes one as `module.function`.
        crop_pct: share of the image that validation crops from the centre, unless `crop` is `none`; null for
            the model's own.
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
        augmentation: Steps | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        train_images: int = 4000,
        val_images: int = 1000,
        skip_corrupt: bool = False,
        val_share: float = 0.2,
        val_list: str | None = None,
        classes: list[str] | None = None,
        seed: int = 0,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed, classes)
        check_choice("crop", crop, ("resized", "padded", "none"))
        if interpolation is not None:
            check_choice("interpolation", interpolation, INTERPOLATIONS)
        for name, value in (("hflip", hflip), ("erasing", erasing), ("val_share", val_share)):
            check_range(name, value, 0, 1)
        for name, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and not (dataset or "").startswith("hfds/"):
                raise UserError(
                    f"--data.{name} {column}: only for a Hugging Face dataset (--data.dataset hfds/NAME)"
                )
        self.val_share, self.val_list = val_share, val_list
        self.held_out: list[str] = []  # of one folder, for validation
        self.model_cfg = find_model(model)
        self.dataset, self.download = dataset, download
        self.image_column, self.label_column = image_column, label_column
        self.image_size, self.crop_pct, self.interpolation = image_size, crop_pct, interpolation
        self.crop, self.hflip, self.auto_augment = crop, hflip, auto_augment
        self.color_jitter, self.erasing, self.augmentation = color_jitter, erasing, augmentation
        self.lengths = {"train": train_images, "val": val_images}

    def _read(self, stage: str) -> ReadImages:
        source = self._source(stage)
        self.classes = self.classes or source.classes
        if not isinstance(source, (FolderImages, TarImages, ShardImages)) and source.classes != self.classes:
            name = self.dataset or "the digits"
            raise UserError(f"{name}: other classes than the run's: {', '.join(self.classes[:5])}, …")
        if len(self.classes) < 2:
            only = f"{self.root or self.dataset}: has one class, '{self.classes[0]}'"
            raise UserError(f"{only}; a classifier needs two or more")
        if stage == "train" and (lacking := sorted(set(self.classes) - set(source.classes))):
            raise UserError(f"{self.root or self.dataset}: has no class '{lacking[0]}', which the run has")
        transform = partial(_with_label, self._transform(stage))
        return ReadImages(source, transform, self.skip_corrupt, stage == "train")

    def _find(self, stage: str) -> Path:
        """The folder or tar file of a split under `root`."""
        root, split = Path(str(self.root)), self.splits[stage]
        if "://" in str(self.root):
            raise UserError(
                f"{self.root}: data are read from a disk; fetch the files first, as by wget -r -np"
            )
        if not root.is_dir():
            here = "" if root.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"{root}: no such folder{here}; --data.root needs train/<class>/… and val/<class>/… in it, "
                "or <class>/…"
            )
        for name in self.split_names(stage):
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
        raise NoSuchSplit(
            f"{root / split}: no such folder or tar file, nor class folders in {root}; name the split with "
            f"--data.{stage}_split"
        )

    def _shards(self, stage: str) -> list[Path]:
        names = self.split_names(stage)
        return next((found for name in names if (found := shards_of(Path(str(self.root)), name))), [])

    def _unsplit(self) -> Path | None:
        """The class folders of which some images are held out, where no folder has the validation's."""
        root, found = Path(str(self.root)), {}
        if self._shards("train"):
            return None
        for stage in ("train", "val"):
            try:
                found[stage] = self._find(stage)
            except NoSuchSplit:
                continue
        if "val" in found or not self.val_share or self.splits["val"] not in SYNONYMS["val"]:
            return None
        if "train" in found:
            return found["train"] if found["train"].is_dir() else None
        own = self.splits["train"] in SYNONYMS["train"] and any(p.is_dir() for p in root.iterdir())
        return root if own else None

    def _part(self, folder: Path, stage: str) -> FolderImages:
        """The images of a folder without splits that are held out, or those that are not."""
        whole = FolderImages(folder, self.classes)
        names = set(whole.names)
        if not self.held_out:
            if self.val_list:
                self.held_out = self._listed(Path(self.val_list), names)
            else:
                self.held_out = hold_out(whole, self.val_share, self.seed)
                log.warning(
                    "%s: no folder for validation: %d of %d images are held out, %.0f %% of each class",
                    folder,
                    len(self.held_out),
                    len(whole),
                    100 * self.val_share,
                )
            if not self.held_out:
                raise UserError(f"{folder}: too few images to hold some out for validation")
        held_out = set(self.held_out)
        return whole.some(held_out if stage == "val" else names - held_out)

    @staticmethod
    def _listed(path: Path, names: set[str]) -> list[str]:
        try:
            listed = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise UserError(f"{path}: cannot read this list of images ({error})") from None
        listed = [line for line in listed if line]
        found = [line for line in listed if line in names]
        if found and len(found) < len(listed):
            log.warning("%s: %d of its %d images are gone", path, len(listed) - len(found), len(listed))
        if not found:
            raise UserError(f"{path}: none of its {len(listed)} lines names an image of --data.root")
        return found

    def _source(self, stage: str) -> LabelledSource:
        if self.dataset and self.dataset.startswith("wds"):
            raise UserError(
                f"dataset '{self.dataset}': give the folder of WebDataset's shards as --data.root"
            )
        if self.dataset:
            split = {"train": "train", "val": "validation"}.get(self.splits[stage], self.splits[stage])
            if self.dataset.startswith("hfds/"):
                columns = self.image_column, self.label_column
                return HuggingFaceImages(self.dataset, self.root, split, *columns, self.classes)
            return TimmImages(self.dataset, self.root, split, self.download)
        if not self.root:
            return DigitImages(stage, self.lengths[stage], self._size(), self.seed)
        if shards := self._shards(stage):
            self.note_split(stage, shards[0].parent)
            return ShardImages(shards, self.classes)
        if folder := self._unsplit():
            return self._part(folder, stage)
        path = self._find(stage)
        self.note_split(stage, path)
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
        crop: dict[str, Any] = {"crop_pct": self.crop_pct or self.model_cfg.crop_pct}
        if self.crop == "none":
            crop = {"crop_pct": 1.0, "crop_mode": "squash"}
        return {"classes": self.classes, "image": {**self._image(), **crop}}

    def _transform(self, stage: str) -> Callable[[Image.Image], Tensor]:
        if stage == "val":
            return create_transform(**self.describe()["image"])
        common = self._image()
        if self.augmentation is not None:
            size = [*common["input_size"][1:]]
            interpolation = str_to_interp_mode(common["interpolation"])
            to_pixels: list[Any] = [
                v2.ToImage(),
                v2.Resize(size, interpolation),
                v2.ToDtype(torch.float32, scale=True),
            ]
            finish = [*to_pixels, v2.Normalize(common["mean"], common["std"]), v2.ToPureTensor()]
            return v2.Compose([composed(self.augmentation), *finish])
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

    def training_size(self) -> tuple[int, int]:
        return self._size(), self._size()

    def train_dataloader(self) -> SeededLoader:
        return self.loader("train")

    def val_dataloader(self) -> SeededLoader:
        return self.loader("val")
