"""Files in COCO's format: images, boxes and masks, as arrays.

COCO's own training file has 860,000 objects. A Python object for each would take gigabytes and be copied
into every worker process. Annotations as COCO writes them are therefore decoded by msgspec straight into
arrays; only the others go through the slower functions that name what is wrong with them.
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

from crossformer_vision.data.images import Names, upright
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


class CocoImages:
    """Images and objects of a file in COCO's format.

    Boxes are kept as the file has them, over the image's border too, for COCO's metrics. What is left out or
    read in another way than it is written is counted in a warning that names the first such annotation.

    Args:
        annotations: The JSON file.
        folder: Folder of the images.
        classes: Names of the training classes, in the order of their labels. ``None`` numbers the file's own,
            in the order of ids.
        masks: Read segmentations, too.
        train: Leave out what cannot be learned: crowds, objects outside their image or without a size.
        skip_empty: Leave out images without objects other than crowds.
        as_outlines: Read polygons in place of masks, of images in which all objects but crowds have some.
        skip_missing: Warn about listed images that are missing instead of refusing the file.

    Attributes:
        categories: Names by the ids of the file; the label of the k-th is k + 1.
        sizes: Width and height of each image in pixels, ``(images, 2)``.
        first: Number of the first object of each image, ``(images + 1,)``.
        boxes: ``x1, y1, x2, y2`` of the objects in pixels, ``(objects, 4)``.
        labels: Labels of the objects, from 1, ``(objects,)``.
        iscrowd: 1 for crowds, ``(objects,)``.
        area: Areas that the file gives, 0 where it gives none, ``(objects,)``.

    Raises:
        UserError: If the file is missing, no JSON or not COCO's; if an id stands twice, an image is missing,
            nothing can be trained on, or an annotation is of an unknown image or category, has no box, no
            finite numbers, a polygon of fewer than three points or a mask of another size.
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
        number = self._read_images(content, skip_missing)
        names = list(classes or self.categories.values())
        label_of = {i: names.index(name) + 1 for i, name in self.categories.items() if name in names}
        self._read_objects(content["annotations"], number, label_of, names, classes is None)
        if classes is None:
            self._drop_root_category(content["categories"])
        self._leave_out(content["annotations"], train, skip_empty)

    def _read_images(self, content: dict[str, Any], skip_missing: bool) -> dict[Any, int]:
        """Read categories, names and sizes of the images; returns the number of each image id."""
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
        number: dict[Any, int] = {}
        kept: list[int] = []
        for n, (image, file) in enumerate(zip(images, files, strict=True)):
            if file not in first_of:
                first_of[file] = len(kept)
                kept.append(n)
            number[image[0]] = first_of[file]
        if len(kept) < len(images):
            repeated = counted(len(images) - len(kept), "entry repeats", "entries repeat")
            log.warning("%s: %s an image; objects are taken together", self.annotations, repeated)
        self.names = Names(files[n] for n in kept)
        self.sizes = self._read_sizes([images[n][2:] for n in kept])
        usable = [isinstance(images[n][0], int) and abs(int(images[n][0])) < 2**63 for n in kept]
        # Ids for the metrics. Ids that no tensor holds are replaced by the image's place in the file.
        self.ids = np.array([images[n][0] if ok else n for n, ok in zip(kept, usable)], np.int64)
        return number

    def _find_files(self, images: list[tuple[Any, str, int, int]], skip_missing: bool) -> list[str]:
        """Paths of the images below the folder."""
        for identity, name, _, _ in images:
            if is_outside(name.replace("\\", "/")):  # a link may lead anywhere
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
        """Sizes as the file has them; of images without one, those of the image files."""
        unknown = [n for n, (width, height) in enumerate(listed) if width <= 0 or height <= 0]
        for n in unknown:
            try:
                listed[n] = stored_size(self.folder / self.names[n])
            except OSError:
                listed[n] = (0, 0)  # reading the image will name it
        if unknown:
            log.warning(
                "%s: lists no size of %d images; those of the image files are taken",
                self.annotations,
                len(unknown),
            )
        return np.array(listed, np.int64)

    def _drop_root_category(self, categories: list[Any]) -> None:
        """Leave out a category without objects that only stands above the others, as Roboflow exports it."""
        parents = {str(c.get("supercategory")) for c in categories}
        used = set(self.labels.tolist())
        for label, (identity, name) in enumerate(list(self.categories.items()), start=1):
            if name in parents and label not in used and len(self.categories) > 1:
                log.warning(
                    "%s: category '%s' has no objects and stands above the others; it is no class",
                    self.annotations,
                    name,
                )
                del self.categories[identity]
                self.labels[self.labels > label] -= 1
                return

    def _read_objects(
        self,
        annotations: list[Any],
        number: dict[Any, int],
        label_of: dict[Any, int],
        names: list[str],
        own: bool,
    ) -> None:
        """Read the objects, in the file's order; ``own`` tells that the classes are the file's categories."""
        image, label, identity, crowd = array("i"), array("i"), array("q"), array("b")
        box, area, end = array("d"), array("d"), array("q")
        shapes, seen = bytearray(), array("b")
        sizes = self.sizes.tolist()
        is_seen: bool | None = True
        rotated = 0
        for entry in annotations:
            plain: Any = None
            if isinstance(entry, msgspec.Raw):
                try:
                    plain = decode_annotation(entry)
                    n, k = number[plain.image_id], label_of[plain.category_id]
                    if self.masks:
                        is_seen = polygons_have_pixels(decode_polygons(plain.segmentation), *sizes[n])
                        plain = None if is_seen is None else plain
                    if plain is not None and b'"rotation"' in bytes(plain.attributes):
                        plain = None
                except (msgspec.MsgspecError, KeyError, ValueError):
                    plain = None
            if plain is not None:
                xywh, surface, is_crowd = plain.bbox, plain.area, plain.iscrowd
                shape: Any = plain.segmentation
                own_id = plain.id
            else:
                annotation = self._whole(entry)
                n, k = self._places(annotation, number, label_of, names, own)
                name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
                xywh, surface, is_crowd = check_numbers(name, annotation)
                segmentation = annotation.get("segmentation")
                is_seen = not self.masks or check_segmentation(name, segmentation, *sizes[n])
                if angle := rotation_of(annotation):
                    xywh, rotated = enclosing_box(xywh, angle), rotated + 1
                shape = json.dumps(annotation.get("segmentation")).encode()
                own_id = annotation.get("id")
            image.append(n)
            label.append(k)
            box.extend(xywh)
            area.append(surface or 0.0)
            crowd.append(is_crowd != 0)
            identity.append(own_id if isinstance(own_id, int) and abs(own_id) < 2**63 else -1)
            if self.masks:
                shapes += shape
                seen.append(bool(is_seen))
                end.append(len(shapes))
        if rotated:
            boxes = counted(rotated, "box is", "boxes are")
            log.warning("%s: %s rotated; upright boxes around them are taken", self.annotations, boxes)
        self.order = np.argsort(np.array(image, np.int32), kind="stable")  # of the file's, by image
        self.image = np.array(image, np.int32)[self.order]
        self.labels = np.array(label, np.int32)[self.order]
        self.identity = np.array(identity, np.int64)[self.order]
        self.iscrowd = np.array(crowd, np.int8)[self.order]
        self.xywh = np.array(box, np.float64).reshape(-1, 4)[self.order]
        self.area = np.array(area, np.float32)[self.order]
        self.shapes = np.frombuffer(shapes, np.uint8)
        ends = np.array(end, np.int64)
        self.shape_end = ends[self.order] if self.masks else ends
        self.seen = np.array(seen, bool)[self.order] if self.masks else np.ones(len(label), bool)
        self.shape_start = np.concatenate([[0], ends[:-1]])[self.order] if self.masks and len(ends) else ends

    def _whole(self, entry: Any) -> Any:
        """An annotation with all that it has."""
        try:
            return json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
        except ValueError as error:  # bytes that are no text: msgspec does not look at what nobody asks for
            raise UserError(f"{self.annotations}: not JSON ({error})") from None

    def _places(
        self, annotation: Any, number: dict[Any, int], label_of: dict[Any, int], names: list[str], own: bool
    ) -> tuple[int, int]:
        """The image's number and the label of an annotation."""
        if not isinstance(annotation, dict):
            raise UserError(f"{self.annotations}: an annotation that is a {type(annotation).__name__}")
        name = f"{self.annotations}: annotation {annotation.get('id', '?')}"
        n = self._find(number, annotation, "image_id", name)
        if n is None:
            raise UserError(f"{name}: of image {annotation.get('image_id')}, which is not in the file")
        label = self._find(label_of, annotation, "category_id", name)
        if label is None:
            category = self._find(self.categories, annotation, "category_id", name)
            what = f"{annotation.get('category_id')}{f' ({category})' if category else ''}"
            known = [f"{i} ({c})" for i, c in self.categories.items()] if own else names
            raise UserError(f"{name}: of category {what}; known are {', '.join(known[:5])}")
        return n, label

    def _leave_out(self, annotations: list[Any], train: bool, skip_empty: bool) -> None:
        """Leave out what cannot be learned or found, and images without an object if these are skipped."""
        width, height = self.sizes[self.image].T
        x1, y1, w, h = self.xywh.T
        x2, y2 = x1 + w, y1 + h
        inside = (w > 0) & (h > 0)
        inside &= (np.minimum(width, x2) > np.maximum(0, x1)) & (np.minimum(height, y2) > np.maximum(0, y1))
        self.boxes = np.stack([x1, y1, x2, y2], 1).astype(np.float32)
        del self.xywh
        total, crowds = len(inside), int(self.iscrowd.sum())
        if train:
            self._check_trainable(total, crowds)
            self._report(annotations, ~inside, "outside the image or of no size, not trained on")
            if crowds:
                what = counted(crowds, "crowd is", "crowds are")
                log.warning("%s: %s not trained on (iscrowd 1)", self.annotations, what)
        elif not total:
            log.warning("%s: has no annotations; average precision cannot be measured", self.annotations)
        else:  # COCO's metrics count such boxes as objects that were not found
            self._report(annotations, ~inside, "outside the image or of no size, which nothing can match")
        self._report(annotations, ~self.seen, "without a mask pixel in the image, left out")
        kept = (inside | (not train)) & self.seen
        if train and total and not (kept & (self.iscrowd == 0)).any():
            raise UserError(
                f"{self.annotations}: no object of {total} can be trained on. Export the labels again"
            )
        if not kept.all():
            self._keep(kept)
        del self.order, self.seen
        if skip_empty:
            full = np.unique(self.image[self.iscrowd == 0])
            self._keep(np.isin(self.image, full))
            self.image = np.searchsorted(full, self.image).astype(np.int32)
            self.names = Names(self.names[int(n)] for n in full)
            self.sizes, self.ids = self.sizes[full], self.ids[full]
        self.first = np.searchsorted(self.image, np.arange(len(self.sizes) + 1))

    def _check_trainable(self, total: int, crowds: int) -> None:
        if not total:
            raise UserError(
                f"{self.annotations}: has no annotations to train on. Export the labels again, or choose "
                "another --data.train_split"
            )
        if crowds == total:
            raise UserError(
                f"{self.annotations}: all objects ({total}) are crowds (iscrowd 1), which are not trained "
                "on. Set iscrowd to 0 for single objects"
            )

    def _report(self, annotations: list[Any], chosen: NDArray[np.bool_], what: str) -> None:
        """Warn about some objects: how many, and the first in the file."""
        if chosen.any():
            first = self._whole(annotations[int(self.order[chosen].min())])
            log.warning(
                "%s: %s %s; the first is annotation %s with bbox %s",
                self.annotations,
                counted(int(chosen.sum()), "object"),
                what,
                first.get("id", "?"),
                first.get("bbox"),
            )

    def _keep(self, chosen: NDArray[np.bool_]) -> None:
        for name in ("image", "labels", "identity", "iscrowd", "area", "boxes"):
            setattr(self, name, getattr(self, name)[chosen])
        if self.masks:
            self.shape_start, self.shape_end = self.shape_start[chosen], self.shape_end[chosen]

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        file_name, (width, height) = self.names[index], self.sizes[index].tolist()
        path = self.folder / file_name
        image = upright(Image.open(path), labelled=(width, height))
        if image.size != (width, height):
            raise UserError(
                f"{path}: is {image.size[0]}x{image.size[1]} (turned as its EXIF orientation says), "
                f"{self.annotations} says {width}x{height}"
            )
        part = slice(self.first[index], self.first[index + 1])
        target: dict[str, Any] = dict(
            image_id=int(self.ids[index]),
            boxes=self.boxes[part],
            labels=self.labels[part].astype(np.int64),
            iscrowd=self.iscrowd[part].astype(np.int64),
            area=self.area[part],
        )
        if self.as_outlines:
            outlines = [self._shape(k) for k in range(part.start, part.stop)]
            polygons = (isinstance(shape, list) for shape in outlines)
            if all(is_list or crowd for is_list, crowd in zip(polygons, target["iscrowd"], strict=True)):
                return image, {**target, "outlines": outlines}
        if self.masks:
            shapes = [self._mask(k, width, height) for k in range(part.start, part.stop)]
            target["masks"] = np.stack(shapes) if shapes else np.zeros((0, height, width), np.uint8)
        return image, target

    def _shape(self, k: int) -> Any:
        """Polygons or run lengths of an object, as the file has them."""
        return msgspec.json.decode(self.shapes[self.shape_start[k] : self.shape_end[k]].tobytes())

    def _mask(self, k: int, width: int, height: int) -> NDArray[np.uint8]:
        try:
            return decode_mask(self._shape(k), width, height)
        except Exception as error:  # of the C code
            raise UserError(f"{self._named(k)}: its mask cannot be decoded ({error})") from None

    def _named(self, k: int) -> str:
        return f"{self.annotations}: annotation {self.identity[k] if self.identity[k] >= 0 else '?'}"

    def _find(self, known: dict[Any, Any], annotation: dict[str, Any], key: str, name: str) -> Any:
        try:
            return known.get(coco_id(annotation.get(key)))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: its {key} is {annotation.get(key)!r}") from None
