"""Annotation files in COCO's format.

msgspec decodes annotations in COCO's own form. All others take a slower path, which reports errors.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from crossformer_vision.data.images import StringArray
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
from crossformer_vision.data.readers.coco_masks import check_segmentation, polygons_have_pixels
from crossformer_vision.data.readers.listed_images import find_listed_images, header_size, is_outside
from crossformer_vision.data.readers.objects import ObjectBuffer, ObjectImages
from crossformer_vision.errors import NoSuchSplit, UserError, check_names, counted, raise_or_collect
from crossformer_vision.types import CocoId, JsonObject

log = logging.getLogger("crossformer_vision")


def find_coco_split(root: Path, split_names: Sequence[str]) -> tuple[Path, Path]:
    """Annotation file and folder of images of a split.

    Args:
        root: Data root.
        split_names: Names that the split may have.

    Raises:
        NoSuchSplit: If there is no annotation file.
        UserError: If there is no folder of images for it.
    """
    for name in split_names:
        for annotations, folders in (
            (root / "annotations" / f"instances_{name}.json", (root / name, root / "images" / name)),
            (root / name / "_annotations.coco.json", (root / name,)),
        ):
            if annotations.exists():
                if folder := next((folder for folder in folders if folder.is_dir()), None):
                    return annotations, folder
                raise UserError(f"{folders[0]}: no such folder, for the images of {annotations}")
    raise NoSuchSplit(
        f"{root / 'annotations' / f'instances_{split_names[0]}.json'}: no such annotation file. "
        "Name the split with --data.train_split or --data.val_split"
    )


class CocoImages(ObjectImages):
    """Images and objects of an annotation file in COCO's format.

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
        super().__init__(annotations, folder, masks, as_outlines)
        content = read_coco_json(annotations)
        image_index = self._read_images(content, skip_missing)
        names = list(classes or self.categories.values())
        label_of = {i: names.index(name) + 1 for i, name in self.categories.items() if name in names}
        self._read_objects(content["annotations"], image_index, label_of, names, classes is None)
        if classes is None:
            self._drop_root_category(content["categories"])
        self._entries = content["annotations"]
        self.skip_unusable(train, skip_empty)
        del self._entries

    def _read_images(self, content: JsonObject, skip_missing: bool) -> dict[CocoId, int]:
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
        index_of: dict[CocoId, int] = {}
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
        ids = [images[n][0] for n in kept]
        # Ids for the metrics. If one is not a 64-bit integer, all are replaced by the position in the file.
        are_integers = all(isinstance(identity, int) and abs(identity) < 2**63 for identity in ids)
        self.ids = np.array(ids if are_integers else kept, np.int64)
        return index_of

    def _find_files(self, images: list[tuple[CocoId, str, int, int]], skip_missing: bool) -> list[str]:
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
            listed[n] = header_size(self.folder / self.names[n])
        if unknown:
            log.warning(
                "%s: lists no size of %d images; the sizes of the image files are used",
                self.annotations,
                len(unknown),
            )
        return np.array(listed, np.int64)

    def _drop_root_category(self, categories: list[JsonObject]) -> None:
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
        annotations: list[object],
        image_index: dict[CocoId, int],
        label_of: dict[CocoId, int],
        names: list[str],
        has_own_classes: bool,
    ) -> None:
        """Read the objects.

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
            try:
                annotation = self._decode(entry)
                image, label = self._look_up(annotation, image_index, label_of, names, has_own_classes)
                name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
                xywh, area, iscrowd = check_numbers(name, annotation)
                segmentation = annotation.get("segmentation")
                has_pixels = not self.masks or check_segmentation(name, segmentation, *sizes[image])
            except UserError as error:
                raise_or_collect(error)
                continue
            if angle := rotation_of(annotation):
                xywh, num_rotated = enclosing_box(xywh, angle), num_rotated + 1
            objects.append(image, label, annotation.get("id"), xywh, area, iscrowd)
            if self.masks:
                objects.append_segmentation(json.dumps(segmentation).encode(), has_pixels)
        if num_rotated:
            boxes = counted(num_rotated, "box is", "boxes are")
            log.warning("%s: %s rotated; their enclosing upright boxes are used", self.annotations, boxes)
        self.store(objects)

    def _append_plain(
        self,
        objects: ObjectBuffer,
        entry: object,
        image_index: dict[CocoId, int],
        label_of: dict[CocoId, int],
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

    def _decode(self, entry: object) -> JsonObject:
        """Decode all fields of an annotation."""
        try:
            annotation = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
        except ValueError as error:  # msgspec does not check the encoding of fields that it skips
            raise UserError(f"{self.annotations}: not JSON ({error})") from None
        if not isinstance(annotation, dict):
            raise UserError(f"{self.annotations}: an annotation that is a {type(annotation).__name__}")
        return annotation

    def _look_up(
        self,
        annotation: JsonObject,
        image_index: dict[CocoId, int],
        label_of: dict[CocoId, int],
        names: list[str],
        has_own_classes: bool,
    ) -> tuple[int, int]:
        """Image index and label of an annotation."""
        name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
        image = image_index.get(self._id_of(annotation, "image_id", name))
        if image is None:
            raise UserError(
                f"{name}: refers to image {annotation.get('image_id')}, which the file does not list"
            )
        category_id = self._id_of(annotation, "category_id", name)
        label = label_of.get(category_id)
        if label is None:
            category = self.categories.get(category_id)
            what = f"{annotation.get('category_id')}{f' ({category})' if category else ''}"
            known = [f"{i} ({c})" for i, c in self.categories.items()] if has_own_classes else names
            raise UserError(f"{name}: of category {what}; known are {', '.join(known[:5])}")
        return image, label

    @override
    def _describe_skipped(self, k: int) -> str:
        annotation = self._decode(self._entries[int(self.order[k])])
        return f"annotation {annotation.get('id', '?')} with bbox {annotation.get('bbox')}"

    def _id_of(self, annotation: JsonObject, key: str, name: str) -> CocoId:
        """Id in a field of an annotation."""
        try:
            return coco_id(annotation.get(key))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: its {key} is {annotation.get(key)!r}") from None
