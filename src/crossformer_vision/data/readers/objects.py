"""Images with boxes and masks as arrays: what all readers of object labels have in common.

The training file of COCO has 860,000 objects. A Python object for each would take gigabytes and be copied
into every worker process.
"""

import json
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from crossformer_vision.data.images import StringArray, open_upright
from crossformer_vision.data.rasters import AnyImage, image_size
from crossformer_vision.data.readers.coco_masks import decode_mask
from crossformer_vision.errors import UserError, counted
from crossformer_vision.types import CocoId, JsonObject, ObjectTarget, Polygons

log = logging.getLogger("crossformer_vision")


class ObjectBuffer:
    """Growing arrays of objects, in the order of their files."""

    def __init__(self) -> None:
        self.image, self.label, self.number, self.iscrowd = array("i"), array("i"), array("q"), array("b")
        self.xywh, self.area = array("d"), array("d")
        self.segmentations, self.segmentation_end, self.has_pixels = bytearray(), array("q"), array("b")

    def append(
        self,
        image: int,
        label: int,
        number: object,
        xywh: Sequence[float],
        area: float | None = None,
        iscrowd: int = 0,
    ) -> None:
        """Append an object.

        Args:
            image: Index of its image.
            label: Its label, from 1.
            number: Its id or row, for messages. Numbers that are not 64-bit integers become -1.
            xywh: Its box.
            area: Its area, ``None`` if unknown.
            iscrowd: Whether it is a crowd, which metrics ignore.
        """
        self.image.append(image)
        self.label.append(label)
        self.xywh.extend(xywh)
        self.area.append(area or 0.0)
        self.iscrowd.append(iscrowd != 0)
        self.number.append(number if isinstance(number, int) and abs(number) < 2**63 else -1)

    def append_segmentation(self, segmentation: bytes, has_pixels: bool | None) -> None:
        """Append the JSON of the last object's segmentation."""
        self.segmentations += segmentation
        self.segmentation_end.append(len(self.segmentations))
        self.has_pixels.append(bool(has_pixels))

    def append_polygons(self, polygons: Polygons, has_pixels: bool | None) -> None:
        """Append the polygons of the last object."""
        self.append_segmentation(json.dumps(polygons).encode(), has_pixels)


class ObjectImages:
    """Images with objects, from label files of any format. Base class of their readers.

    Boxes are not clipped to their image, as COCO's metrics expect. A warning counts skipped objects and
    names the first of them. A subclass reads the files, sets ``names``, ``sizes``, ``ids`` and
    ``categories``, and calls ``store`` and ``skip_unusable``.

    Args:
        annotations: Annotation file or folder, for messages.
        folder: Folder of the images.
        masks: Read segmentations.
        as_outlines: Return polygons instead of masks, for images in which all objects but crowds have them.

    Attributes:
        categories: Category names by id. Without ``classes``, labels follow this order, from 1.
        names: Paths of the images below the folder.
        sizes: Width and height of each image in pixels, ``(images, 2)``.
        ids: Id of each image for the metrics, ``(images,)``.
        first: Index of the first object of each image, ``(images + 1,)``.
        boxes: ``x1, y1, x2, y2`` of the objects in pixels, ``(objects, 4)``.
        labels: Labels of the objects, from 1, ``(objects,)``.
        iscrowd: 1 for crowds, ``(objects,)``.
        area: Areas in the file, 0 if missing, ``(objects,)``.
    """

    crowds = "crowd regions (iscrowd 1)"
    """Name of objects that metrics ignore, for messages."""
    categories: dict[CocoId, str]
    names: StringArray
    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __init__(self, annotations: Path, folder: Path, masks: bool, as_outlines: bool) -> None:
        self.annotations, self.folder, self.masks, self.as_outlines = annotations, folder, masks, as_outlines

    def store(self, objects: ObjectBuffer) -> None:
        """Store objects, sorted by image."""
        indices = np.array(objects.image, np.int32)
        self.order = order = np.argsort(indices, kind="stable")  # position in the files, by image
        self.image = indices[order]
        self.labels = np.array(objects.label, np.int32)[order]
        self.numbers = np.array(objects.number, np.int64)[order]
        self.iscrowd = np.array(objects.iscrowd, np.int8)[order]
        self.xywh = np.array(objects.xywh, np.float64).reshape(-1, 4)[order]
        self.area = np.array(objects.area, np.float32)[order]
        self.has_pixels = np.ones(len(order), bool)
        if self.masks:
            self.has_pixels = np.array(objects.has_pixels, bool)[order]
            self.segmentations = np.frombuffer(objects.segmentations, np.uint8)
            ends = np.array(objects.segmentation_end, np.int64)
            self.segmentation_end = ends[order]
            self.segmentation_start = np.concatenate([[0], ends[:-1]])[order] if len(ends) else ends

    def skip_unusable(self, train: bool, skip_empty: bool) -> None:
        """Skip unusable objects and, with ``skip_empty``, images without objects.

        Args:
            train: Skip crowds and objects that are outside their image or have no area.
            skip_empty: Skip images without objects other than crowds.

        Raises:
            UserError: If no object can be trained on.
        """
        width, height = self.sizes[self.image].T
        x1, y1, w, h = self.xywh.T
        x2, y2 = x1 + w, y1 + h
        is_inside = (np.minimum(width, x2) > np.maximum(0, x1)) & (np.minimum(height, y2) > np.maximum(0, y1))
        is_inside |= (width == 0) | (height == 0)  # the image cannot be read, which is reported later
        is_inside &= (w > 0) & (h > 0)
        self.boxes = np.stack([x1, y1, x2, y2], 1).astype(np.float32)
        total, crowds = len(is_inside), int(self.iscrowd.sum())
        if train:
            self._check_trainable(total, crowds)
            self._report(~is_inside, "outside the image or without area, skipped")
            if crowds:
                log.warning("%s: skipped in training: %d %s", self.annotations, crowds, self.crowds)
        elif not total:
            log.warning("%s: has no annotations; average precision cannot be measured", self.annotations)
        else:  # COCO's metrics count such boxes as missed objects
            self._report(~is_inside, "outside the image or without area, which no detection can match")
        self._report(is_inside & ~self.has_pixels, "without a mask pixel in the image, skipped")
        kept = (is_inside | (not train)) & self.has_pixels
        if train and total and not (kept & (self.iscrowd == 0)).any():
            raise UserError(
                f"{self.annotations}: no object of {total} can be trained on. Export the labels again"
            )
        del self.xywh
        if not kept.all():
            self._select(kept)
        del self.order, self.has_pixels
        if skip_empty:
            non_empty = np.unique(self.image[self.iscrowd == 0])
            self._select(np.isin(self.image, non_empty))
            self.image = np.searchsorted(non_empty, self.image).astype(np.int32)
            self.names = StringArray(self.names[int(n)] for n in non_empty)
            self.sizes, self.ids = self.sizes[non_empty], self.ids[non_empty]
        self.first = np.searchsorted(self.image, np.arange(len(self.sizes) + 1))

    def _check_trainable(self, total: int, crowds: int) -> None:
        if not total:
            raise UserError(
                f"{self.annotations}: has no annotations to train on. Export the labels again, or choose "
                "another --data.train_split"
            )
        if crowds == total:
            raise UserError(
                f"{self.annotations}: all objects ({total}) are {self.crowds}, which training skips. Label "
                "single objects"
            )

    def _report(self, chosen: NDArray[np.bool_], what: str) -> None:
        """Log a warning with the number of chosen objects and the first of them."""
        if chosen.any():
            positions = np.flatnonzero(chosen)
            first = int(positions[self.order[positions].argmin()])
            count = counted(int(chosen.sum()), "object")
            example = self._describe_skipped(first)
            log.warning("%s: %s %s; the first is %s", self.annotations, count, what, example)

    def _describe_skipped(self, k: int) -> str:
        """Describe an object, with its box, before any was skipped."""
        return f"{self._describe(k)} with box {[round(float(value), 2) for value in self.boxes[k]]}"

    def _describe(self, k: int) -> str:
        """Describe an object for messages."""
        return f"annotation {self.numbers[k] if self.numbers[k] >= 0 else '?'}"

    def _select(self, chosen: NDArray[np.bool_]) -> None:
        for name in ("image", "labels", "numbers", "iscrowd", "area", "boxes"):
            setattr(self, name, getattr(self, name)[chosen])
        if self.masks:
            self.segmentation_start = self.segmentation_start[chosen]
            self.segmentation_end = self.segmentation_end[chosen]

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        """Path of an image."""
        return str(self.folder / self.names[index])

    def label_file(self, index: int) -> Path:
        """File with the labels of an image."""
        return self.annotations

    def read(self, index: int) -> tuple[AnyImage, ObjectTarget]:
        """Read an image and its objects.

        Args:
            index: Index of the image.

        Returns:
            The image, opened and upright, and a dictionary with ``image_id``, ``boxes``, ``labels``,
            ``iscrowd``, ``area`` and ``masks`` ``(n, H, W)`` or ``outlines``.

        Raises:
            UserError: If the image has another size than in the annotation file, or a mask cannot be decoded.
        """
        width, height = self.sizes[index].tolist()
        path = self.folder / self.names[index]
        image = open_upright(path, label_size=(width, height))
        found = image_size(image)
        if found != (width, height):
            raise UserError(
                f"{path}: is {found[0]}x{found[1]} (after its EXIF orientation is applied), but "
                f"{width}x{height} in {self.label_file(index)}"
            )
        rows = slice(self.first[index], self.first[index + 1])
        target = ObjectTarget(
            image_id=int(self.ids[index]),
            boxes=self.boxes[rows],
            labels=self.labels[rows].astype(np.int64),
            iscrowd=self.iscrowd[rows].astype(np.int64),
            area=self.area[rows],
        )
        if self.as_outlines:
            outlines = [self._segmentation(k) for k in range(rows.start, rows.stop)]
            polygons = (isinstance(shape, list) for shape in outlines)
            if all(is_list or crowd for is_list, crowd in zip(polygons, target["iscrowd"], strict=True)):
                return image, {**target, "outlines": outlines}
        if self.masks:
            shapes = [self._mask(k, width, height) for k in range(rows.start, rows.stop)]
            target["masks"] = np.stack(shapes) if shapes else np.zeros((0, height, width), np.uint8)
        return image, target

    def _segmentation(self, k: int) -> Polygons | JsonObject:
        """Polygons or run-length encoding of an object, as in the file."""
        start, end = self.segmentation_start[k], self.segmentation_end[k]
        return msgspec.json.decode(self.segmentations[start:end].tobytes())

    def _mask(self, k: int, width: int, height: int) -> NDArray[np.uint8]:
        try:
            return decode_mask(self._segmentation(k), width, height)
        except Exception as error:  # the C++ decoder raises errors of several types
            raise UserError(
                f"{self.annotations}: {self._describe(k)}: its mask cannot be decoded ({error})"
            ) from None
