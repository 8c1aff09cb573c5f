"""Detection and instance segmentation: COCO files, or the digits that come with the library -> batches."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from crossformer_vision.data import digits
from crossformer_vision.data.augmentation import PhotometricDistortion, Steps, composed
from crossformer_vision.data.images import upright
from crossformer_vision.data.loading import ReadImages, ResumableData, SeededLoader
from crossformer_vision.errors import NoSuchSplit, UserError, check_names

log = logging.getLogger("crossformer_vision")

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
GREY = (124, 116, 104)  # ImageNet's mean, around images that do not fill their crop


# ------------------------------------------------------------------------------------------------------------
# COCO files
# ------------------------------------------------------------------------------------------------------------


class CocoImages:
    """Images and objects of a file in COCO's format.

    Boxes are kept as the file has them, over the image's border too, for COCO's metrics. Objects of which
    nothing lies inside their image cannot be learned: they are left out of training, with one warning that
    counts them and names the first.

    Args:
        annotations: the JSON file.
        folder: of the images.
        classes: names of the training file, in the order of their labels; None numbers the file's own, in the
            order of ids.
        masks: read the segmentations too.
        train: leave out what cannot be learned.
        skip_empty: leave out images in which no object but crowds is.

    Attributes:
        categories: name of each of the training file's ids; the label of the k-th is k + 1.
        sizes: (width, height) of each image, as the file says.

    Raises:
        UserError: a file that is missing, no JSON or not COCO's; an id that stands twice; an annotation of an
            unknown image or category, without a box, with numbers that are none, with a polygon of fewer than
            three points or a mask of another size; in validation, a mask without a pixel in its image.
    """

    def __init__(
        self,
        annotations: Path,
        folder: Path,
        classes: list[str] | None = None,
        masks: bool = False,
        train: bool = False,
        skip_empty: bool = False,
    ) -> None:
        self.annotations, self.folder, self.masks = annotations, folder, masks
        content = _read_json(annotations)
        try:
            listed = [(_id(c["id"]), str(c["name"])) for c in content["categories"]]
            self.images = [
                (_id(i["id"]), str(i["file_name"]), int(i["width"]), int(i["height"]))
                for i in content["images"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{annotations}: not a COCO file: its images need id, file_name, width and height, its "
                f"categories id and name ({type(error).__name__}: {error})"
            ) from error
        if not self.images or not listed:
            raise UserError(f"{annotations}: lists no {'categories' if self.images else 'images'}")
        for what, ids in (("image", [i[0] for i in self.images]), ("category", [c[0] for c in listed])):
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise UserError(f"{annotations}: two entries have the {what} id {twice}")
        if all(isinstance(category, int) for category, _ in listed):
            listed.sort()
        self.categories = dict(listed)
        names = list(classes or self.categories.values())
        check_names(annotations, list(self.categories.values()))
        self.sizes = [image[2:] for image in self.images]
        number = {image[0]: n for n, image in enumerate(self.images)}
        self.objects: list[list[dict[str, Any]]] = [[] for _ in self.images]
        unseen: list[str] = []
        for annotation in content["annotations"]:
            if not isinstance(annotation, dict):
                raise UserError(f"{annotations}: an annotation that is a {type(annotation).__name__}")
            name = f"{annotations}: annotation {annotation.get('id', '?')}"
            n = self._find(number, annotation, "image_id", name)
            if n is None:
                raise UserError(f"{name}: of image {annotation.get('image_id')}, which is not in the file")
            category = self._find(self.categories, annotation, "category_id", name)
            if category is None or category not in names:
                what = f"{annotation.get('category_id')}{f' ({category})' if category else ''}"
                known = [f"{i} ({c})" for i, c in self.categories.items()] if classes is None else names
                raise UserError(f"{name}: of category {what}; known are {', '.join(known[:5])}")
            found = self._object(name, annotation, n)
            outside, empty = found.pop("outside"), found.pop("empty")
            if train and (outside or empty):
                unseen.append(f"{annotation.get('bbox')} of annotation {annotation.get('id', '?')}")
                continue
            if empty:
                raise UserError(f"{name}: no pixel of its mask is inside the image; remove it from the file")
            self.objects[n].append({**found, "label": names.index(category) + 1})
        if skip_empty:
            full = [n for n, objects in enumerate(self.objects) if any(not o["iscrowd"] for o in objects)]
            if not full:
                raise UserError(f"{annotations}: no image has an object; --data.skip_empty false keeps them")
            self.images = [self.images[n] for n in full]
            self.sizes = [self.sizes[n] for n in full]
            self.objects = [self.objects[n] for n in full]
        if unseen:
            log.warning(
                "%s: %d objects outside their image or of no size are not trained on, the first: %s",
                annotations,
                len(unseen),
                unseen[0],
            )

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.folder / self.images[index][1])

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image_id, file_name, width, height = self.images[index]
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts:  # a link may lead anywhere
            raise UserError(f"{self.annotations}: image {image_id}: {file_name} lies outside {self.folder}")
        path = self.folder / file_name
        image = upright(Image.open(path), labelled=(width, height))
        if image.size != (width, height):
            raise UserError(
                f"{path}: is {image.size[0]}x{image.size[1]} (turned as its EXIF orientation says), "
                f"{self.annotations} says {width}x{height}"
            )
        objects = self.objects[index]
        target: dict[str, Any] = dict(
            image_id=image_id if isinstance(image_id, int) and abs(image_id) < 2**63 else index,
            boxes=np.array([o["box"] for o in objects], np.float32).reshape(-1, 4),
            labels=np.array([o["label"] for o in objects], np.int64),
            iscrowd=np.array([o["iscrowd"] for o in objects], np.int64),
            area=np.array([o["area"] for o in objects], np.float32),
        )
        if self.masks:
            shapes = [self._mask(o, width, height) for o in objects]
            target["masks"] = np.stack(shapes) if shapes else np.zeros((0, height, width), np.uint8)
        return image, target

    def _mask(self, found: dict[str, Any], width: int, height: int) -> NDArray[np.uint8]:
        try:
            return decode_mask(found["segmentation"], width, height)
        except Exception as error:  # of the C code
            raise UserError(f"{found['name']}: its mask cannot be decoded ({error})") from None

    def _find(self, known: dict[Any, Any], annotation: dict[str, Any], key: str, name: str) -> Any:
        try:
            return known.get(_id(annotation.get(key)))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: its {key} is {annotation.get(key)!r}") from None

    def _object(self, name: str, annotation: dict[str, Any], n: int) -> dict[str, Any]:
        """Box (x1, y1, x2, y2), area, crowd and shape of an annotation; whether they are inside the image."""
        width, height = self.sizes[n]
        try:
            x, y, w, h = (float(value) for value in annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{name}: its bbox is not [x, y, width, height]") from None
        area = annotation.get("area")
        try:
            area = w * h if area is None else float(area)
            crowd = int(int(annotation.get("iscrowd") or 0) != 0)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{name}: its area or iscrowd is no number ({area!r}, {annotation.get('iscrowd')!r})"
            ) from None
        if not all(map(math.isfinite, (x, y, w, h, area))):
            raise UserError(
                f"{name}: its bbox or area has a number that is none: {annotation['bbox']}, {area}"
            )
        box = (x, y, x + w, y + h)
        inside = w > 0 and h > 0 and min(width, box[2]) > max(0, x) and min(height, box[3]) > max(0, y)
        shape = annotation.get("segmentation")
        found = dict(name=name, box=box, iscrowd=crowd, area=area, outside=not inside, empty=False)
        if self.masks:
            found |= {"segmentation": shape, "empty": not self._check_shape(name, shape, n)}
        return found

    def _check_shape(self, name: str, shape: Any, n: int) -> bool:
        """Whether any of it may lie inside the image."""
        width, height = self.sizes[n]
        if isinstance(shape, dict):
            counts = shape.get("counts")
            if shape.get("size") not in ([height, width], (height, width)) or not counts:
                raise UserError(
                    f"{name}: its mask is of size {shape.get('size')}, the image of [{height}, {width}]"
                )
            if isinstance(counts, (str, bytes)):
                return True
            if not isinstance(counts, list) or not all(isinstance(c, int) and c >= 0 for c in counts):
                raise UserError(f"{name}: the run lengths of its mask are not whole numbers")
            if sum(counts) != width * height:
                raise UserError(
                    f"{name}: the run lengths of its mask are of {sum(counts)} pixels, the image has "
                    f"{width * height}"
                )
            return any(counts[1::2])
        if not isinstance(shape, list) or not shape:
            raise UserError(f"{name}: has no segmentation; without masks there is --model.detector retinanet")
        if not all(isinstance(polygon, list) for polygon in shape):
            raise UserError(f"{name}: its segmentation is not a list of polygons, [[x1, y1, x2, y2, …], …]")
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
            raise UserError(f"{name}: a polygon of fewer than three points in its segmentation")
        values = [value for polygon in shape for value in polygon]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise UserError(f"{name}: its segmentation has a value that is no number")
        if max(map(abs, values)) > 10 * max(width, height) + 10_000:  # drawing it takes memory by its length
            farthest = max(values, key=abs)
            raise UserError(f"{name}: its segmentation reaches to {farthest:.3g}, far outside the image")
        return any(
            max(p[0::2]) > 0 and min(p[0::2]) < width and max(p[1::2]) > 0 and min(p[1::2]) < height
            for p in shape
        )


def _id(value: Any) -> int | str:
    """An id to look up: whole numbers are the same as integers, floats or text."""
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdecimal() and value.isascii() else value
    number = int(value)
    if number != value:
        raise ValueError(f"id {value}")
    return number


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"{path}: not a COCO file: it needs the lists images, annotations and categories")
    return content


def decode_mask(segmentation: Any, width: int, height: int) -> NDArray[np.uint8]:
    """Polygons or a run-length encoding, as COCO writes them, to (height, width) of 0 and 1."""
    if isinstance(segmentation, list) or not isinstance(segmentation["counts"], (str, bytes)):
        segmentation = rle.segmToRle(segmentation, width, height)
    return rle.decode(segmentation)


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
        least = -(-max(canvas) // self.longest)  # becomes one pixel, where the longer side becomes `longest`
        missing = [0, 0, max(0, least - image.width), max(0, least - image.height)]
        pixels = v2.functional.pil_to_tensor(image)
        if any(missing) and self.train:
            pixels = v2.functional.pad(pixels, missing)
            tensors = {
                k: v2.functional.pad(v, missing) if k in ("boxes", "masks") else v for k, v in tensors.items()
            }
        pixels, tensors = self.transform(pixels, tensors)
        plain = {k: v.as_subclass(Tensor) for k, v in tensors.items()}
        if self.crops and "masks" in plain:  # a crop may leave a part of an object, or none of it
            left = plain["masks"].flatten(1).any(1).bool()
            plain = {k: v[left] if len(v) == len(left) else v for k, v in plain.items()}
            plain["boxes"] = masks_to_boxes(plain["masks"]) + torch.tensor([0.0, 0, 1, 1])
        return pixels.as_subclass(Tensor), {**plain, "image_id": torch.tensor(target["image_id"])}


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
        return CocoImages(*self._find(stage), self.classes or None, self.masks, train, skip_empty)

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
                    v2.RandomCrop(side, pad_if_needed=True, fill={torch.Tensor: GREY, tv_tensors.Mask: 0}),
                ]
            else:
                steps.append(v2.RandomShortestSize(self.min_sizes, self.max_size, antialias=False))
            steps += [v2.RandomHorizontalFlip(self.hflip), v2.RandomVerticalFlip(self.vflip)]
            steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
        # Of the plain tensors a target holds, none is an image.
        steps.append(v2.ToDtype({torch.Tensor: torch.float32, "others": None}, scale=True))
        return v2.Compose(steps)

    def training_size(self) -> tuple[int, int]:
        return self.min_sizes[-1], self.max_size

    def train_dataloader(self) -> SeededLoader:
        source: Any = self.open("train").source
        tall = [int(height > width) for width, height in source.sizes]
        return self.loader("train", collate=lists, kinds=tall)

    def val_dataloader(self) -> SeededLoader:
        return self.loader("val", batch_size=1, collate=lists)
