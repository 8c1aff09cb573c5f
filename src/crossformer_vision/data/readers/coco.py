"""Annotation files in COCO's format: images, boxes and masks as arrays.

The training file of COCO has 860,000 objects. A Python object for each would take gigabytes and be copied
into every worker process. msgspec decodes annotations in COCO's own form into arrays. All others
take a slower path, which reports errors.
"""

import json
import logging
from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.data.images import StringArray, apply_orientation
from crossformer_vision.data.readers.coco_json import (
    check_numbers,
    coco_id,
    decode_annotation,
    decode_polygons,
    describe_missing,
    enclosing_box,
    first_duplicate,
    read_coco_json,
    rotation_of,
)
from crossformer_vision.data.readers.coco_masks import check_segmentation, decode_mask, polygons_have_pixels
from crossformer_vision.data.readers.listed_images import find_listed_images, is_outside, stored_size
from crossformer_vision.errors import UserError, check_names, counted

log = logging.getLogger("crossformer_vision")


class ObjectBuffer:
    """Growing arrays of objects, in the order of their file."""

    def __init__(self) -> None:
        self.image, self.label, self.annotation_id, self.iscrowd = (
            array("i"),
            array("i"),
            array("q"),
            array("b"),
        )
        self.xywh, self.area = array("d"), array("d")
        self.segmentations, self.segmentation_end, self.has_pixels = bytearray(), array("q"), array("b")

    def append(
        self, image: int, label: int, annotation_id: Any, xywh: Any, area: float | None, iscrowd: int
    ) -> None:
        """Append an object.

        Args:
            image: Index of its image.
            label: Its label, from 1.
            annotation_id: Its id. Ids that are not 64-bit integers become -1.
            xywh: Its box.
            area: Its area, ``None`` if unknown.
            iscrowd: Whether it is a crowd.
        """
        self.image.append(image)
        self.label.append(label)
        self.xywh.extend(xywh)
        self.area.append(area or 0.0)
        self.iscrowd.append(iscrowd != 0)
        is_int64 = isinstance(annotation_id, int) and abs(annotation_id) < 2**63
        self.annotation_id.append(annotation_id if is_int64 else -1)

    def append_segmentation(self, segmentation: Any, has_pixels: bool | None) -> None:
        """Append the JSON of the last object's segmentation."""
        self.segmentations += segmentation
        self.segmentation_end.append(len(self.segmentations))
        self.has_pixels.append(bool(has_pixels))


class CocoImages:
    """Images and objects of an annotation file in COCO's format.

    Boxes are not clipped to their image, as COCO's metrics expect. A warning counts skipped annotations and
    names the first of them.

    Args:
        annotations: Annotation file.
        folder: Folder of the images.
        classes: Names of the training classes, in the order of their labels. ``None`` uses the file's
            categories, in the order of their ids.
        masks: Read segmentations.
        train: Skip crowds and objects that are outside their image or have no area.
        skip_empty: Skip images without objects other than crowds.
        as_outlines: Return polygons instead of masks, for images in which all objects but crowds have them.
        skip_missing: Warn about missing images instead of raising an error.

    Attributes:
        categories: Names of the categories by their ids. The k-th has label k + 1.
        sizes: Width and height of each image in pixels, ``(images, 2)``.
        first: Index of the first object of each image, ``(images + 1,)``.
        boxes: ``x1, y1, x2, y2`` of the objects in pixels, ``(objects, 4)``.
        labels: Labels of the objects, from 1, ``(objects,)``.
        iscrowd: 1 for crowds, ``(objects,)``.
        area: Areas in the file, 0 if missing, ``(objects,)``.

    Raises:
        UserError: If the file is missing, is not JSON or not in COCO's format, has a duplicate id, lists an
            image that does not exist, has no usable objects, or has an annotation of an unknown image or
            category, without a valid box, or with an invalid segmentation.
    """

    def __init__(
        self,
        annotations: Path,
        folder: Path,
        classes: list[str] | None = None,
        masks: bool = False,
        train: bool = False,
        skip_empty: bool = False,
        as_outlines: bool = False,
        skip_missing: bool = False,
    ) -> None:
        self.annotations, self.folder, self.masks, self.as_outlines = annotations, folder, masks, as_outlines
        content = read_coco_json(annotations)
        image_index = self._read_images(content, skip_missing)
        names = list(classes or self.categories.values())
        label_of = {i: names.index(name) + 1 for i, name in self.categories.items() if name in names}
        self._read_objects(content["annotations"], image_index, label_of, names, classes is None)
        if classes is None:
            self._drop_root_category(content["categories"])
        self._skip_unusable(content["annotations"], train, skip_empty)

    def _read_images(self, content: dict[str, Any], skip_missing: bool) -> dict[Any, int]:
        """Read categories, names and sizes of the images; returns the index of each image id."""
        try:
            listed = [(coco_id(c["id"]), str(c["name"])) for c in content["categories"]]
            images = [
                (coco_id(i.id), str(i.file_name), int(i.width or 0), int(i.height or 0))
                for i in content["images"]
            ]
            np.array([image[2:] for image in images], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(describe_missing(self.annotations, error)) from error
        if not images or not listed:
            raise UserError(f"{self.annotations}: lists no {'categories' if images else 'images'}")
        for what, ids in (("image", [i[0] for i in images]), ("category", [c[0] for c in listed])):
            if (twice := first_duplicate(ids)) is not None:
                raise UserError(f"{self.annotations}: two entries have the {what} id {twice}")
        if all(isinstance(category, int) for category, _ in listed):
            listed.sort()
        self.categories = dict(listed)
        check_names(self.annotations, list(self.categories.values()))
        files = self._find_files(images, skip_missing)
        first_of: dict[str, int] = {}
        index_of: dict[Any, int] = {}
        kept: list[int] = []
        for n, (image, file) in enumerate(zip(images, files, strict=True)):
            if file not in first_of:
                first_of[file] = len(kept)
                kept.append(n)
            index_of[image[0]] = first_of[file]
        if len(kept) < len(images):
            repeated = counted(len(images) - len(kept), "entry repeats", "entries repeat")
            log.warning("%s: %s an image; their objects are merged", self.annotations, repeated)
        self.names = StringArray(files[n] for n in kept)
        self.sizes = self._read_sizes([images[n][2:] for n in kept])
        usable = [isinstance(images[n][0], int) and abs(int(images[n][0])) < 2**63 for n in kept]
        # Ids for the metrics. Ids that are not 64-bit integers are replaced by the position in the file.
        self.ids = np.array([images[n][0] if ok else n for n, ok in zip(kept, usable)], np.int64)
        return index_of

    def _find_files(self, images: list[tuple[Any, str, int, int]], skip_missing: bool) -> list[str]:
        """Paths of the images below the folder."""
        for identity, name, _, _ in images:
            if is_outside(name.replace("\\", "/")):
                raise UserError(f"{self.annotations}: image {identity}: {name} lies outside {self.folder}")
        found = find_listed_images([image[1] for image in images], self.folder)
        missing = [image for image, file in zip(images, found, strict=True) if file is None]
        if missing:
            others = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
            identity, name, *_ = missing[0]
            message = f"{self.annotations}: image {identity}: {name} is not in {self.folder}{others}"
            if not skip_missing:
                raise UserError(f"{message}. Add what is missing, or pass --data.skip_corrupt true")
            log.warning("%s", message)
        return [file or image[1] for image, file in zip(images, found, strict=True)]

    def _read_sizes(self, listed: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Sizes in the annotation file or, where missing, of the image files."""
        unknown = [n for n, (width, height) in enumerate(listed) if width <= 0 or height <= 0]
        for n in unknown:
            try:
                listed[n] = stored_size(self.folder / self.names[n])
            except OSError:
                listed[n] = (0, 0)  # reported when the image is read
        if unknown:
            log.warning(
                "%s: lists no size of %d images; the sizes of the image files are used",
                self.annotations,
                len(unknown),
            )
        return np.array(listed, np.int64)

    def _drop_root_category(self, categories: list[Any]) -> None:
        """Remove an unused category that is the supercategory of others, as Roboflow exports it."""
        parents = {str(c.get("supercategory")) for c in categories}
        used = set(self.labels.tolist())
        for label, (identity, name) in enumerate(list(self.categories.items()), start=1):
            if name in parents and label not in used and len(self.categories) > 1:
                log.warning(
                    "%s: category '%s' has no objects and is the supercategory of others; it is ignored",
                    self.annotations,
                    name,
                )
                del self.categories[identity]
                self.labels[self.labels > label] -= 1
                return

    def _read_objects(
        self,
        annotations: list[Any],
        image_index: dict[Any, int],
        label_of: dict[Any, int],
        names: list[str],
        has_own_classes: bool,
    ) -> None:
        """Read the objects and sort them by image.

        Args:
            annotations: Annotations of the file, undecoded or decoded.
            image_index: Index of each image id.
            label_of: Label of each category id.
            names: Names of the training classes.
            has_own_classes: Whether these are the file's categories.
        """
        objects = ObjectBuffer()
        sizes = self.sizes.tolist()
        num_rotated = 0
        for entry in annotations:
            if self._append_plain(objects, entry, image_index, label_of, sizes):
                continue
            annotation = self._decode(entry)
            image, label = self._look_up(annotation, image_index, label_of, names, has_own_classes)
            name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
            xywh, area, iscrowd = check_numbers(name, annotation)
            segmentation = annotation.get("segmentation")
            has_pixels = not self.masks or check_segmentation(name, segmentation, *sizes[image])
            if angle := rotation_of(annotation):
                xywh, num_rotated = enclosing_box(xywh, angle), num_rotated + 1
            objects.append(image, label, annotation.get("id"), xywh, area, iscrowd)
            if self.masks:
                objects.append_segmentation(json.dumps(segmentation).encode(), has_pixels)
        if num_rotated:
            boxes = counted(num_rotated, "box is", "boxes are")
            log.warning("%s: %s rotated; their enclosing upright boxes are used", self.annotations, boxes)
        indices = np.array(objects.image, np.int32)
        self.order = order = np.argsort(indices, kind="stable")  # position in the file, by image
        self.image = indices[order]
        self.labels = np.array(objects.label, np.int32)[order]
        self.annotation_ids = np.array(objects.annotation_id, np.int64)[order]
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

    def _append_plain(
        self,
        objects: "ObjectBuffer",
        entry: Any,
        image_index: dict[Any, int],
        label_of: dict[Any, int],
        sizes: list[list[int]],
    ) -> bool:
        """Append an annotation in COCO's own form. Return whether it has this form."""
        if not isinstance(entry, msgspec.Raw):
            return False
        has_pixels: bool | None = True
        try:
            plain = decode_annotation(entry)
            image, label = image_index[plain.image_id], label_of[plain.category_id]
            if self.masks:
                has_pixels = polygons_have_pixels(decode_polygons(plain.segmentation), *sizes[image])
            if has_pixels is None or b'"rotation"' in bytes(plain.attributes):
                return False
        except (msgspec.MsgspecError, KeyError, ValueError):
            return False
        objects.append(image, label, plain.id, plain.bbox, plain.area, plain.iscrowd)
        if self.masks:
            objects.append_segmentation(plain.segmentation, has_pixels)
        return True

    def _decode(self, entry: Any) -> Any:
        """Decode all fields of an annotation."""
        try:
            return json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
        except ValueError as error:  # msgspec does not check the encoding of fields that it skips
            raise UserError(f"{self.annotations}: not JSON ({error})") from None

    def _look_up(
        self,
        annotation: Any,
        image_index: dict[Any, int],
        label_of: dict[Any, int],
        names: list[str],
        has_own_classes: bool,
    ) -> tuple[int, int]:
        """Image index and label of an annotation."""
        if not isinstance(annotation, dict):
            raise UserError(f"{self.annotations}: an annotation that is a {type(annotation).__name__}")
        name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
        image = self._find(image_index, annotation, "image_id", name)
        if image is None:
            raise UserError(f"{name}: of image {annotation.get('image_id')}, which is not in the file")
        label = self._find(label_of, annotation, "category_id", name)
        if label is None:
            category = self._find(self.categories, annotation, "category_id", name)
            what = f"{annotation.get('category_id')}{f' ({category})' if category else ''}"
            known = [f"{i} ({c})" for i, c in self.categories.items()] if has_own_classes else names
            raise UserError(f"{name}: of category {what}; known are {', '.join(known[:5])}")
        return image, label

    def _skip_unusable(self, annotations: list[Any], train: bool, skip_empty: bool) -> None:
        """Skip unusable objects and, with ``skip_empty``, images without objects."""
        width, height = self.sizes[self.image].T
        x1, y1, w, h = self.xywh.T
        x2, y2 = x1 + w, y1 + h
        is_inside = (w > 0) & (h > 0)
        is_inside &= (np.minimum(width, x2) > np.maximum(0, x1)) & (
            np.minimum(height, y2) > np.maximum(0, y1)
        )
        self.boxes = np.stack([x1, y1, x2, y2], 1).astype(np.float32)
        del self.xywh
        total, crowds = len(is_inside), int(self.iscrowd.sum())
        if train:
            self._check_trainable(total, crowds)
            self._report(annotations, ~is_inside, "outside the image or without area, skipped")
            if crowds:
                what = counted(crowds, "crowd is", "crowds are")
                log.warning("%s: %s skipped in training (iscrowd 1)", self.annotations, what)
        elif not total:
            log.warning("%s: has no annotations; average precision cannot be measured", self.annotations)
        else:  # COCO's metrics count such boxes as missed objects
            self._report(
                annotations, ~is_inside, "outside the image or without area, which no detection can match"
            )
        self._report(annotations, ~self.has_pixels, "without a mask pixel in the image, skipped")
        kept = (is_inside | (not train)) & self.has_pixels
        if train and total and not (kept & (self.iscrowd == 0)).any():
            raise UserError(
                f"{self.annotations}: no object of {total} can be trained on. Export the labels again"
            )
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
                f"{self.annotations}: all objects ({total}) are crowds (iscrowd 1), which training "
                "skips. Set iscrowd to 0 for single objects"
            )

    def _report(self, annotations: list[Any], chosen: NDArray[np.bool_], what: str) -> None:
        """Log a warning with the number of chosen objects and the first of them."""
        if chosen.any():
            first = self._decode(annotations[int(self.order[chosen].min())])
            log.warning(
                "%s: %s %s; the first is annotation %s with bbox %s",
                self.annotations,
                counted(int(chosen.sum()), "object"),
                what,
                first.get("id", "?"),
                first.get("bbox"),
            )

    def _select(self, chosen: NDArray[np.bool_]) -> None:
        for name in ("image", "labels", "annotation_ids", "iscrowd", "area", "boxes"):
            setattr(self, name, getattr(self, name)[chosen])
        if self.masks:
            self.segmentation_start = self.segmentation_start[chosen]
            self.segmentation_end = self.segmentation_end[chosen]

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        """Path of an image."""
        return str(self.folder / self.names[index])

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """Read an image and its objects.

        Args:
            index: Index of the image.

        Returns:
            The image, opened and upright, and a dictionary with ``image_id``, ``boxes``, ``labels``,
            ``iscrowd``, ``area`` and ``masks`` ``(n, H, W)`` or ``outlines``.

        Raises:
            UserError: If the image has another size than in the annotation file, or a mask cannot be decoded.
        """
        file_name, (width, height) = self.names[index], self.sizes[index].tolist()
        path = self.folder / file_name
        image = apply_orientation(Image.open(path), label_size=(width, height))
        if image.size != (width, height):
            raise UserError(
                f"{path}: is {image.size[0]}x{image.size[1]} (after its EXIF orientation is applied), but "
                f"{width}x{height} in {self.annotations}"
            )
        rows = slice(self.first[index], self.first[index + 1])
        target: dict[str, Any] = dict(
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

    def _segmentation(self, k: int) -> Any:
        """Polygons or run-length encoding of an object, as in the file."""
        start, end = self.segmentation_start[k], self.segmentation_end[k]
        return msgspec.json.decode(self.segmentations[start:end].tobytes())

    def _mask(self, k: int, width: int, height: int) -> NDArray[np.uint8]:
        try:
            return decode_mask(self._segmentation(k), width, height)
        except Exception as error:  # the C++ decoder raises errors of several types
            raise UserError(f"{self._describe(k)}: its mask cannot be decoded ({error})") from None

    def _describe(self, k: int) -> str:
        return (
            f"{self.annotations}: annotation {self.annotation_ids[k] if self.annotation_ids[k] >= 0 else '?'}"
        )

    def _find(self, known: dict[Any, Any], annotation: dict[str, Any], key: str, name: str) -> Any:
        """Look up an id of an annotation."""
        try:
            return known.get(coco_id(annotation.get(key)))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: its {key} is {annotation.get(key)!r}") from None
