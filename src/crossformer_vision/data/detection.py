"""Detection and instance segmentation: COCO files, or the digits that come with the library -> batches."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from crossformer_vision.data.augmentation import PhotometricDistortion, Steps, composed
from crossformer_vision.data.loading import ReadImages, ResumableData, SeededLoader
from crossformer_vision.data.outlines import clip_shape, drawn, outlines_of
from crossformer_vision.data.readers import digits
from crossformer_vision.data.readers.coco import CocoImages
from crossformer_vision.errors import NoSuchSplit, UserError

log = logging.getLogger("crossformer_vision")

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
GREY = (124, 116, 104)  # ImageNet's mean, around images that do not fill their crop


class DigitObjects:
    """The multi-scale digits, several in an image."""

    categories = {k + 1: name for k, name in enumerate(digits.CLASSES)}

    def __init__(self, stage: str, length: int, size: int, masks: bool, seed: int) -> None:
        self.dataset = digits.MultiScaleDigits(stage, length, size, (1, 4), (0.2, 0.6), seed)
        self.sizes = [(size, size)] * length
        self.masks = masks

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"digits {index}"

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image, drawn = self.dataset[index]
        target = dict(
            image_id=index,
            boxes=drawn["boxes"],
            labels=drawn["labels"] + 1,
            iscrowd=np.zeros(len(drawn["labels"]), np.int64),
            area=drawn["masks"].sum((1, 2)).astype(np.float32),
        )
        return image, {**target, "masks": drawn["masks"]} if self.masks else target


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


class ToTensors:
    """(image, target) in NumPy -> the same as torchvision's tensors, augmented; crowds are not trained on."""

    def __init__(
        self, transform: Callable[..., Any], train: bool, crops: bool = True, longest: int = 1333
    ) -> None:
        self.transform, self.train, self.crops, self.longest = transform, train, train and crops, longest

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        canvas = (image.height, image.width)
        kept = np.ones(len(target["labels"]), bool)
        outlines = target.get("outlines")
        if self.train:
            kept = target["iscrowd"] == 0
            if "masks" in target:
                kept &= target["masks"].any((1, 2))
        tensors: dict[str, Any] = {
            name: torch.from_numpy(value[kept])
            for name, value in target.items()
            if isinstance(value, np.ndarray) and not (self.train and name in ("iscrowd", "area"))
        }
        tensors["boxes"] = tv_tensors.BoundingBoxes(tensors["boxes"], format="XYXY", canvas_size=canvas)
        if self.train:  # what is not in the picture cannot be learned; rounding may leave it, too
            tensors["boxes"] = v2.functional.clamp_bounding_boxes(tensors["boxes"])
        if "masks" in tensors:
            tensors["masks"] = tv_tensors.Mask(tensors["masks"])
        if outlines is not None:
            # Or a crop that is larger than the image would draw them over its padding.
            outlines = [
                clip_shape(shape, image.width, image.height)
                for shape, stays in zip(outlines, kept, strict=True)
                if stays
            ]
            tensors["outlines"] = outlines_of(outlines, canvas)
            tensors["object"] = torch.arange(len(outlines))
        least = -(-max(canvas) // self.longest)  # becomes one pixel, where the longer side becomes `longest`
        missing = [0, 0, max(0, least - image.width), max(0, least - image.height)]
        pixels = v2.functional.to_image(image)
        if any(missing) and self.train:
            pixels = v2.functional.pad(pixels, missing)
            tensors = {
                k: v2.functional.pad(v, missing) if isinstance(v, tv_tensors.TVTensor) else v
                for k, v in tensors.items()
            }
        pixels, tensors = self.transform(pixels, tensors)
        plain = {k: v.as_subclass(Tensor) for k, v in tensors.items()}
        if outlines is not None:
            size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            plain["masks"] = drawn(plain.pop("outlines"), outlines, plain.pop("object").tolist(), size)
        if (self.crops or outlines is not None) and "masks" in plain:  # a crop may leave none of an object
            left = plain["masks"].flatten(1).any(1).bool()
            if not left.all():
                plain = {k: v[left] if len(v) == len(left) else v for k, v in plain.items()}
        if self.crops and "masks" in plain:  # or a part
            plain["boxes"] = masks_to_boxes(plain["masks"]) + torch.tensor([0.0, 0, 1, 1])
        return pixels.as_subclass(Tensor), {**plain, "image_id": torch.tensor(target["image_id"])}


def of_each_object(inputs: tuple[Any, dict[str, Any]]) -> tuple[Tensor, ...]:
    """What has an entry for each box, and loses it with the box."""
    return tuple(inputs[1][name] for name in ("labels", "object") if name in inputs[1])


def lists(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    """Images of many sizes cannot be stacked: a batch is a list of them, and one of targets."""
    return [image for image, _ in samples], [target for _, target in samples]


class DetectionData(ResumableData):
    """Images with boxes, and masks where the detector learns them, in COCO's format.

    Training batches hold images that are all wide or all tall. Validation reads image by image, so that a
    result does not depend on its neighbours' size.

    Args:
        root: folder with COCO's layout: `annotations/instances_<split>.json` and the images in `<split>/` or
            `images/<split>/`; or `<split>/_annotations.coco.json` beside the images. Null for the multi-scale
            digits that come with the library.
        train_split: split to train on; `train` finds `train2017`, too.
        val_split: split to validate on; `val` finds `val2017` and `valid`, too.
        detector: that is trained; `mask_rcnn` learns masks, too. The command takes it from the model.
        min_size: a training image's shorter side is brought to this many pixels, or to one of several,
        max_size: but its longer side to at most so many. The command takes both from the model.
        batch_size: images a step, of each process.
        num_workers: processes that read images; null for one less than there are cores, at most 8.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        scale_jitter: smallest and largest factor by which an image is resized at random, before a crop of
            `min_size` squared; null to resize to `min_size` and `max_size` without a crop.
        photometric: distort brightness, contrast, saturation and hue.
        augmentation: your own for training, in place of the four above and of the resizing: a callable from
            an image and its target, as torchvision's `transforms.v2` take them (`tv_tensors`; `boxes`,
            `labels` and, for `mask_rcnn`, `masks`), to the same; or a list of such. What it leaves without a
            box is taken out. The command takes one as `module.function`.
        skip_empty: leave images without objects out of training.
        image_size: digits only: side of the images, in pixels.
        train_images: digits only: images an epoch.
        val_images: digits only: images to validate on.
        skip_corrupt: leave unreadable images out and count them, instead of stopping at the first.
        classes: names of the classes in the order of their labels; null for those of the training file, in
            the order of their ids. The command takes those of a run that it validates or goes on with.
        seed: of the order, the augmentation and the digits.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        detector: Literal["retinanet", "mask_rcnn"] = "retinanet",
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        batch_size: int = 2,
        num_workers: int | None = None,
        hflip: float = 0.5,
        vflip: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        photometric: bool = False,
        augmentation: Steps | None = None,
        skip_empty: bool = False,
        image_size: int = 128,
        train_images: int = 1000,
        val_images: int = 200,
        skip_corrupt: bool = False,
        classes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed, classes)
        self.masks = detector == "mask_rcnn"
        self.min_sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size = max_size
        self.hflip, self.vflip = hflip, vflip
        self.scale_jitter, self.photometric, self.skip_empty = scale_jitter, photometric, skip_empty
        self.image_size, self.augmentation = image_size, augmentation
        self.lengths = {"train": train_images, "val": val_images}
        self.category_ids: list[Any] = []  # of the classes, as the file that names them has them

    def _read(self, stage: str) -> ReadImages:
        """See `CocoImages` for what may be wrong with a file."""
        source = self._source(stage)
        self.classes = self.classes or list(source.categories.values())
        ids = {name: category for category, name in source.categories.items()}
        if isinstance(source, DigitObjects) and set(ids) != set(self.classes):
            raise UserError(f"the digits are other classes than the run's: {', '.join(self.classes[:5])}")
        if stage == "train" and (lacking := [name for name in self.classes if name not in ids]):
            raise UserError(f"{source.annotations}: has no category '{lacking[0]}', which the run has")
        if not self.category_ids and set(self.classes) <= set(ids):
            self.category_ids = [ids[name] for name in self.classes]
        jitter = self.scale_jitter
        longest = max(1, int(self.min_sizes[-1] * jitter[0])) if jitter else self.max_size
        transform = ToTensors(
            self._transform(stage), stage == "train", bool(jitter or self.augmentation), longest
        )
        return ReadImages(source, transform, self.skip_corrupt, stage == "train", least=32)

    def describe(self) -> dict[str, Any]:
        return {"classes": self.classes, "category_ids": self.category_ids}

    def _source(self, stage: str) -> Any:
        if self.root is None:
            return DigitObjects(stage, self.lengths[stage], self.image_size, self.masks, self.seed)
        train = stage == "train"
        skip_empty = self.skip_empty and train
        outlines = self.masks and train and self.augmentation is None
        options = (self.masks, train, skip_empty, outlines, self.skip_corrupt)
        return CocoImages(*self._find(stage), self.classes or None, *options)

    def _find(self, stage: str) -> tuple[Path, Path]:
        """The annotation file and the folder of images of a split."""
        root, split = Path(str(self.root)), self.splits[stage]
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; --data.root needs annotations and images in it")
        for name in self.split_names(stage):
            for annotations, folders in (
                (root / "annotations" / f"instances_{name}.json", (root / name, root / "images" / name)),
                (root / name / "_annotations.coco.json", (root / name,)),
            ):
                if annotations.exists():
                    for folder in folders:
                        if folder.is_dir():
                            self.note_split(stage, folder)
                            return annotations, folder
                    raise UserError(f"{folders[0]}: no such folder, for the images of {annotations}")
        raise NoSuchSplit(
            f"{root / 'annotations' / f'instances_{split}.json'}: no such annotation file; "
            f"name the split with --data.{stage}_split"
        )

    def _transform(self, stage: str) -> Callable[..., Any]:
        steps: list[Any] = []
        if stage == "train" and self.augmentation is not None:
            steps += [composed(self.augmentation), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
        elif stage == "train":
            if self.photometric:
                steps.append(PhotometricDistortion())
            # Without antialiasing, as torchvision's detectors resize an image when they are evaluated.
            if self.scale_jitter:
                side = (self.min_sizes[-1],) * 2
                steps += [
                    v2.ScaleJitter(side, self.scale_jitter, antialias=False),
                    v2.RandomCrop(
                        side, pad_if_needed=True, fill={tv_tensors.Image: GREY, tv_tensors.Mask: 0}
                    ),
                ]
            else:
                steps.append(v2.RandomShortestSize(self.min_sizes, self.max_size, antialias=False))
            steps += [v2.RandomHorizontalFlip(self.hflip), v2.RandomVerticalFlip(self.vflip)]
            steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=of_each_object)]
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        return v2.Compose(steps)

    def training_size(self) -> tuple[int, int]:
        return self.min_sizes[-1], self.max_size

    def train_dataloader(self) -> SeededLoader:
        source: Any = self.open("train").source
        tall = [int(height > width) for width, height in np.asarray(source.sizes).tolist()]
        return self.loader("train", collate=lists, kinds=tall)

    def val_dataloader(self) -> SeededLoader:
        return self.loader("val", batch_size=1, collate=lists)
