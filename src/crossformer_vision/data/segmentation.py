"""Semantic segmentation: images and class maps, or the digits that come with the library -> batches."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from crossformer_vision.data.augmentation import PhotometricDistortion, Steps, composed
from crossformer_vision.data.class_lists import IGNORED, UNKNOWN, ClassList, read_classes, value_table
from crossformer_vision.data.images import EXTENSIONS, files_below, reason, upright
from crossformer_vision.data.loading import ReadImages, ResumableData, SeededLoader
from crossformer_vision.data.readers import digits
from crossformer_vision.errors import NoSuchSplit, UserError
from crossformer_vision.models import find_model

log = logging.getLogger("crossformer_vision")

# fmt: off
VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]
# fmt: on


# ------------------------------------------------------------------------------------------------------------
# Images and class maps
# ------------------------------------------------------------------------------------------------------------


class MappedImages:
    """Images, each with a file of one class index a pixel (greyscale or palette PNG).

    Args:
        pairs: files of image and class map.
        classes: names.
        table: (256,) from the values in the files to 0, 1, … of `classes`; `IGNORED`; `UNKNOWN` for an error.

    Raises:
        UserError: when read: a class map that cannot be read, of another size, in colours, or with a value
            that is no class.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], classes: list[str], table: NDArray[np.uint8]) -> None:
        self.pairs, self.classes, self.table = pairs, classes, table

    def __len__(self) -> int:
        return len(self.pairs)

    def number(self, classes: list[str]) -> list[int]:
        """Give the classes the order of these names; returns the value that each has in the files."""
        known = self.table < len(self.classes)
        order = np.array([classes.index(name) for name in self.classes], np.uint8)
        self.table[known] = order[self.table[known]]
        self.classes = classes
        return [int(np.flatnonzero(self.table == k)[-1]) for k in range(len(classes))]

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        path, label = self.pairs[index]
        image: Image.Image = Image.open(path)
        try:
            drawn = Image.open(label)
            values = stored_values(drawn)
        except Exception as error:  # of any decoder
            raise UserError(f"{label}: cannot read this class map ({reason(error)})") from None
        if values.ndim != 2:
            raise UserError(
                f"{label}: a class map has one class index a pixel (greyscale or palette), not {drawn.mode}"
            )
        image = upright(image, labelled=drawn.size)
        if drawn.size != image.size:
            raise UserError(
                f"{label}: is {_size(drawn)}, its image {path} is {_size(image)} (turned as its EXIF "
                "orientation says)"
            )
        wrong = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))  # NaN is neither
        if wrong.any() or (wrong := (mapped := self.table[values.astype(np.uint8)]) == UNKNOWN).any():
            raise UserError(
                f"{label}: has the value {values[wrong][0]}, which is none of the {len(self.classes)} classes"
            )
        return image, mapped


def stored_values(drawn: Image.Image) -> NDArray[Any]:
    """The numbers in a class map's file: PIL spreads greyscale of two or four bits over 0 to 255."""
    tiles = getattr(drawn, "tile", None)  # of a file, not decoded yet
    raw = tiles[0][3] if tiles else None
    raw = raw[0] if isinstance(raw, tuple) else raw
    values = np.asarray(drawn)
    spread = {"L;2": 85, "L;4": 17}.get(str(raw))
    return (
        values // spread
        if spread and drawn.mode == "L"
        else values.astype(np.uint8)
        if drawn.mode == "1"
        else values
    )


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def takes_255_for_a_class(pairs: list[tuple[Path, Path]], classes: ClassList) -> bool:
    """Whether class maps of two classes are of 0 and 255, as drawing programs make them.

    Looks at up to 50 maps, where `classes.json` does not say what is ignored.
    """
    if len(classes.names) != 2 or classes.says_what_is_ignored:
        return False
    values: set[int] = set()
    telling = 0
    for _, path in pairs[:: max(1, -(-len(pairs) // 50))]:
        try:
            found = set(np.unique(stored_values(Image.open(path))).tolist())
        except Exception:  # said when it is read
            return False
        values |= found
        telling += found != {0}
        if telling == 10:
            break
    return values == {0, 255}


def pair_files(images: Path, maps: Path) -> list[tuple[Path, Path]]:
    """Images and their class maps: of the same name, below the same folder."""
    found: list[dict[Path, Path]] = []
    for folder, kinds in ((images, EXTENSIONS), (maps, {".png", ".bmp", ".tif", ".tiff"})):
        named: dict[Path, Path] = {}
        for path in files_below(folder):
            name = path.relative_to(folder).with_suffix("")
            if path.suffix.lower() not in kinds:
                continue
            if name in named:
                raise UserError(
                    f"{path}: has the name of {named[name].name}, but a class map is of one image"
                )
            named[name] = path
        found.append(named)
    if not found[0]:
        raise UserError(f"{images}: no images in this folder")
    for one, other, what in ((0, 1, f"class map in {maps}"), (1, 0, f"image in {images}")):
        alone = sorted(str(found[one][name]) for name in found[one].keys() - found[other].keys())
        if alone:
            more = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
            raise UserError(f"{alone[0]}: has no {what}{more}")
    return [(path, found[1][name]) for name, path in found[0].items()]


class DigitMaps:
    """The multi-scale digits, one or two in an image (more hide each other); the canvas is a class, too."""

    classes = ["canvas", *digits.CLASSES]

    def __init__(self, stage: str, length: int, size: int, seed: int) -> None:
        self.dataset = digits.MultiScaleDigits(stage, length, size, (1, 2), (0.2, 0.6), seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"digits {index}"

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        image, drawn = self.dataset[index]
        return image, drawn["semantic"]


# ------------------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------------------


class ToInput:
    """An image as the network takes it: resized, normalised, (3, H, W).

    Args:
        mean, std: of the backbone's inputs.
        short_side: pixels of the shorter side; None for the image's own size.
        long_side: but at most so many of the longer one.
        size_divisor: in evaluation, each side is then stretched up to a multiple of this.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        short_side: int | None,
        long_side: int | None = None,
        size_divisor: int = 1,
    ) -> None:
        self.mean, self.std = list(mean), list(std)
        self.short_side, self.long_side, self.size_divisor = short_side, long_side, size_divisor

    def __call__(self, image: Image.Image, scale: float = 1.0) -> Tensor:
        """For evaluation; `scale` is a factor of the size."""
        return self.normalise(self.resize(image, scale, self.size_divisor))

    def resize(self, image: Image.Image, scale: float, divisor: int = 1) -> Tensor:
        """(3, H, W) of bytes."""
        factor = scale
        if self.short_side:
            factor *= min(self.short_side / min(image.size), (self.long_side or math.inf) / max(image.size))
        sides = (max(1, round(side * factor)) for side in (image.height, image.width))
        size = [-(-side // divisor) * divisor for side in sides]
        # As published, without antialiasing.
        return VF.resize(VF.pil_to_tensor(image), size, antialias=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        return VF.normalize(VF.to_dtype(pixels, torch.float32, scale=True), self.mean, self.std)


class Validation:
    """(image, class map) -> network's input at each of some scales, and the class map at its own size."""

    def __init__(self, to_input: ToInput, scales: Sequence[float]) -> None:
        self.to_input, self.scales = to_input, scales

    def __call__(self, image: Image.Image, classes: NDArray[np.uint8]) -> tuple[list[Tensor], Tensor]:
        views = [self.to_input(image, scale) for scale in self.scales]
        return views, torch.from_numpy(classes.astype(np.int64))


class Augmentation:
    """(image, class map) -> a crop of a fixed size: resized at random, flipped, recoloured.

    Args:
        to_input: whose `short_side` the scales refer to.
        crop_size: side of the square crop; smaller images are padded with the mean, and ignored there.
        scales: smallest and largest factor of the size.
        max_share: most that one class may take of a crop's labelled pixels, if one of ten crops has less.
        hflip: probability of a flip.
        photometric: distort brightness, contrast, saturation and hue.
        own: in place of all this, from (image, class map) as torchvision's `tv_tensors`, bytes, to the same.
    """

    def __init__(
        self,
        to_input: ToInput,
        crop_size: int,
        scales: tuple[float, float],
        max_share: float,
        hflip: float,
        photometric: bool,
        own: Steps | None = None,
    ) -> None:
        self.own = None if own is None else composed(own)
        self.to_input, self.crop_size, self.scales = to_input, crop_size, scales
        self.max_share = max_share
        self.after: list[Callable[..., Any]] = [v2.RandomHorizontalFlip(hflip)]
        if photometric:
            self.after.append(PhotometricDistortion())

    def __call__(self, image: Image.Image, classes: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        if self.own is not None:
            mask = tv_tensors.Mask(torch.from_numpy(classes)[None])
            return self._cut(*self.own(v2.functional.to_image(image), mask))
        pixels = self.to_input.resize(image, float(torch.empty(1).uniform_(*self.scales)))
        labels = VF.resize(
            torch.from_numpy(classes)[None], list(pixels.shape[1:]), v2.InterpolationMode.NEAREST_EXACT
        )
        top, left = self._corner(labels[0])
        side = self.crop_size
        area = (slice(None), slice(top, top + side), slice(left, left + side))
        pair: Any = tv_tensors.Image(pixels[area]), tv_tensors.Mask(labels[area])
        for step in self.after:
            pair = step(*pair)
        return self._cut(*pair)

    def _cut(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised, and both of `crop_size`: what is more is cut off, what lacks is padded and ignored."""
        pixels = self.to_input.normalise(image.as_subclass(Tensor))
        labels = mask.as_subclass(Tensor)[0]
        missing = [0, self.crop_size - pixels.shape[2], 0, self.crop_size - pixels.shape[1]]
        pixels = torch.nn.functional.pad(pixels, missing)
        return pixels, torch.nn.functional.pad(labels, missing, value=IGNORED).long()

    def _corner(self, labels: Tensor) -> tuple[int, int]:
        """Top and left of a crop in which no class takes too much."""
        H, W = labels.shape
        for _ in range(10):
            top = int(torch.randint(max(0, H - self.crop_size) + 1, ()))
            left = int(torch.randint(max(0, W - self.crop_size) + 1, ()))
            if self.max_share >= 1:
                break
            crop = labels[top : top + self.crop_size, left : left + self.crop_size]
            counts = torch.bincount(crop.flatten(), minlength=256)[:IGNORED]
            if counts.count_nonzero() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return top, left


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


class SegmentationData(ResumableData):
    """Images with a class index a pixel.

    Training reads crops of one size; validation whole images one by one, and their class maps unresized.

    Args:
        root: folder in ADE20K's layout (`images/training/`, `annotations/training/` with PNGs of the same
            names, and the same of `validation`; classes from ADE20K's `objectInfo150.txt`, or from
            `classes.json`: `{"classes": ["sky", …], "ignore_index": 255}`), in that of Cityscapes
            (`leftImg8bit/`, `gtFine/`) or of VOC 2012 (`VOCdevkit/`). Null for the multi-scale digits that
            come with the library.
        train_split: split to train on; `train` finds `training`, too.
        val_split: split to validate on; `val` finds `validation`, too.
        model: timm name of the backbone, which gives the normalisation. The command takes it from the model.
        crop_size: side of the training crops, in pixels; for digits, of the images.
        short_side: an image's shorter side is brought to this many pixels, in training before `scales`; null
            for its own size,
        long_side: but its longer side to at most so many; null for any.
        size_divisor: validation and prediction then stretch each side up to a multiple of this.
        test_scales: factors of the size at which validation reads an image. The command takes them from the
            model.
        scales: smallest and largest factor by which a training image is resized at random.
        max_share: most that one class may take of a training crop, if one of ten crops has less.
        hflip: probability of a horizontal flip.
        photometric: distort brightness, contrast, saturation and hue.
        augmentation: your own for training, in place of the four above: a callable from image and class map,
            torchvision's `tv_tensors` of bytes, to the same, which are then cut or padded to `crop_size` and
            normalised; or a list of such. The command takes one as `module.function`.
        batch_size: crops a step, of each process.
        num_workers: processes that read images; null for one less than there are cores, at most 8.
        train_images: digits only: images an epoch.
        val_images: digits only: images to validate on.
        skip_corrupt: leave unreadable images out and count them, instead of stopping at the first.
        classes: names of the classes in their order; null for the data's own. The command takes those of a
            run that it validates or goes on with.
        seed: of the order, the augmentation and the digits.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        model: str = "crossformer_nano",
        crop_size: int = 512,
        short_side: int | None = None,
        long_side: int | None = None,
        size_divisor: int = 1,
        test_scales: tuple[float, ...] = (1.0,),
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        augmentation: Steps | None = None,
        batch_size: int = 2,
        num_workers: int | None = None,
        train_images: int = 1000,
        val_images: int = 200,
        skip_corrupt: bool = False,
        classes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed, classes)
        cfg = find_model(model)
        self.to_input = ToInput(tuple(cfg.mean), tuple(cfg.std), short_side, long_side, size_divisor)
        self.test_scales = test_scales
        ours = crop_size, scales, max_share, hflip, photometric
        self.augmentation = Augmentation(self.to_input, *ours, augmentation)
        self.lengths = {"train": train_images, "val": val_images}
        self.white_is_a_class = False
        self.values: list[int] = []  # of the classes, in the files of class maps

    def _read(self, stage: str) -> ReadImages:
        source = self._source(stage)
        self.classes = self.classes or list(source.classes)
        if set(source.classes) != set(self.classes):
            odd = sorted(set(source.classes) ^ set(self.classes))[0]
            raise UserError(f"{self.root or 'the digits'}: class '{odd}' is not of the run's {self.classes}")
        if isinstance(source, MappedImages):
            self.values = source.number(self.classes)
        transform: Any = (
            self.augmentation if stage == "train" else Validation(self.to_input, self.test_scales)
        )
        return ReadImages(source, transform, self.skip_corrupt, stage == "train", least=32)

    def describe(self) -> dict[str, Any]:
        image = dict(vars(self.to_input))
        return {"classes": self.classes, "image": image, "values": self.values}

    def _source(self, stage: str) -> MappedImages | DigitMaps:
        if self.root is None:
            return DigitMaps(stage, self.lengths[stage], self.augmentation.crop_size, self.seed)
        root, split = Path(self.root), self.splits[stage]
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; --data.root needs images/ and annotations/ in it")
        try:
            if (root / "leftImg8bit").is_dir():
                return cityscapes(root, split)
            if (root / "VOCdevkit").is_dir():
                return pascal_voc(root, split)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{root}: {str(error).splitlines()[0]}") from error
        for name in self.split_names(stage):
            images, maps = root / "images" / name, root / "annotations" / name
            if images.is_dir():
                if not maps.is_dir():
                    raise UserError(f"{maps}: no such folder, for the class maps of {images}")
                self.note_split(stage, images)
                pairs, listed = pair_files(images, maps), read_classes(root)
                names, values = listed.names, listed.values
                if not self.images and takes_255_for_a_class(pairs, listed):
                    log.warning(
                        "%s: its values are 0 and 255 alone: 255 is taken for '%s'. If it is to be ignored, "
                        'say so in classes.json: "ignore_index": 255',
                        maps,
                        names[1],
                    )
                    self.white_is_a_class = True
                if self.white_is_a_class:
                    values[IGNORED] = 1
                return MappedImages(pairs, names, values)
        raise NoSuchSplit(
            f"{root / 'images' / split}: no such folder; name the split with --data.{stage}_split"
        )

    def training_size(self) -> tuple[int, int]:
        return self.augmentation.crop_size, self.augmentation.crop_size

    def train_dataloader(self) -> SeededLoader:
        return self.loader("train")

    def val_dataloader(self) -> SeededLoader:
        return self.loader("val", batch_size=1)


def pascal_voc(root: Path, split: str) -> MappedImages:
    """Class maps of Pascal VOC, of the latest year in ``VOCdevkit``.

    Raises:
        UserError: If no year has class maps of this split, or one of its files is missing.
    """
    years = sorted((root / "VOCdevkit").glob("VOC*"), reverse=True)
    for year in years:
        listed = year / "ImageSets/Segmentation" / f"{split}.txt"
        if listed.is_file():
            names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            pairs = [(year / f"JPEGImages/{n}.jpg", year / f"SegmentationClass/{n}.png") for n in names]
            for path in (path for pair in pairs for path in pair):
                if not path.is_file():
                    raise UserError(f"{path}: no such file, which {listed} names. Add what is missing")
            return MappedImages(pairs, VOC_CLASSES, value_table(len(VOC_CLASSES)))
    raise UserError(
        f"{root}/VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt: no such file, nor of another year. "
        "Unpack Pascal VOC there, or name another split"
    )


def cityscapes(root: Path, split: str) -> MappedImages:
    """Cityscapes' finely annotated images, with the 19 classes that are evaluated."""
    found = Cityscapes(str(root), split, mode="fine", target_type="semantic")
    values = np.full(256, IGNORED, np.uint8)
    kinds = [kind for kind in Cityscapes.classes if not kind.ignore_in_eval]
    for kind in kinds:
        values[kind.id] = kind.train_id
    names = [kind.name for kind in sorted(kinds, key=lambda kind: kind.train_id)]
    pairs = [(Path(image), Path(maps[0])) for image, maps in zip(found.images, found.targets, strict=True)]
    return MappedImages(pairs, names, values)
