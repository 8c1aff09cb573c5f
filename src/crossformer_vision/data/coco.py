"""Files in COCO's format: images, boxes and masks, as arrays.

COCO's own training file has 860,000 objects. A Python object each would take gigabytes, and be copied into
every worker as it is touched. So what is plain is decoded by msgspec straight into arrays, and only what is
not goes through the functions that name what is wrong with it.
"""

import json
import logging
import math
from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.data.images import Names, upright
from crossformer_vision.errors import UserError, check_names

log = logging.getLogger("crossformer_vision")


class _Image(msgspec.Struct):
    id: Any
    file_name: Any
    width: Any
    height: Any


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[msgspec.Raw]
    categories: list[Any]


class _Annotation(msgspec.Struct):
    """One as COCO has them. Those that differ, with ids as text say, are not wrong, but read the slow way."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int = -1
    area: float | None = None
    iscrowd: int = 0
    segmentation: msgspec.Raw = msgspec.Raw()


_annotation = msgspec.json.Decoder(_Annotation)
_polygons = msgspec.json.Decoder(list[list[float]])


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
        as_outlines: read polygons in place of masks, of images in which all objects but crowds have some.

    Attributes:
        categories: name of each of the training file's ids; the label of the k-th is k + 1.
        sizes: (images, 2), width and height of each, as the file says.
        first: (images + 1,), number of the first object of each image, by which the next ones are sorted.
        boxes, labels, iscrowd, area: of the objects; boxes are x1, y1, x2, y2.

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
        as_outlines: bool = False,
    ) -> None:
        self.annotations, self.folder, self.masks, self.as_outlines = annotations, folder, masks, as_outlines
        content = _read(annotations)
        number = self._read_images(content)
        names = list(classes or self.categories.values())
        label_of = {i: names.index(name) + 1 for i, name in self.categories.items() if name in names}
        self._read_objects(content["annotations"], number, label_of, names, classes is None)
        self._leave_out(content["annotations"], train, skip_empty)

    def _read_images(self, content: dict[str, Any]) -> dict[Any, int]:
        """Categories, and the images' names and sizes; the number of each image's id."""
        try:
            listed = [(coco_id(c["id"]), str(c["name"])) for c in content["categories"]]
            images = [
                (coco_id(i.id), str(i.file_name), int(i.width), int(i.height)) for i in content["images"]
            ]
            self.sizes = np.array([image[2:] for image in images], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(_lacking(self.annotations, error)) from error
        if not images or not listed:
            raise UserError(f"{self.annotations}: lists no {'categories' if images else 'images'}")
        for what, ids in (("image", [i[0] for i in images]), ("category", [c[0] for c in listed])):
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise UserError(f"{self.annotations}: two entries have the {what} id {twice}")
        if all(isinstance(category, int) for category, _ in listed):
            listed.sort()
        self.categories = dict(listed)
        check_names(self.annotations, list(self.categories.values()))
        self.names = Names(image[1] for image in images)
        usable = [isinstance(i[0], int) and abs(i[0]) < 2**63 for i in images]
        # Ids for the metrics; those that no tensor holds are an image's place in the file.
        self.ids = np.array([i[0] if ok else n for n, (i, ok) in enumerate(zip(images, usable))], np.int64)
        return {image[0]: n for n, image in enumerate(images)}

    def _read_objects(
        self,
        annotations: list[Any],
        number: dict[Any, int],
        label_of: dict[Any, int],
        names: list[str],
        own: bool,
    ) -> None:
        """The objects, in the file's order. `own`: the names of the classes are the file's."""
        image, label, identity, crowd = array("i"), array("i"), array("q"), array("b")
        box, area, end = array("d"), array("d"), array("q")
        shapes, seen = bytearray(), array("b")
        sizes = self.sizes.tolist()
        is_seen: bool | None = True
        for entry in annotations:
            plain: Any = None
            if isinstance(entry, msgspec.Raw):
                try:
                    plain = _annotation.decode(entry)
                    n, k = number[plain.image_id], label_of[plain.category_id]
                    if self.masks:
                        is_seen = _is_seen(_polygons.decode(plain.segmentation), *sizes[n])
                        plain = None if is_seen is None else plain
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
                xywh, surface, is_crowd = self._checked(name, annotation)
                is_seen = not self.masks or self._check_shape(name, annotation.get("segmentation"), n)
                shape = json.dumps(annotation.get("segmentation")).encode()
                own_id = annotation.get("id")
            image.append(n)
            label.append(k)
            box.extend(xywh)
            area.append(xywh[2] * xywh[3] if surface is None else surface)
            crowd.append(is_crowd != 0)
            identity.append(own_id if isinstance(own_id, int) and abs(own_id) < 2**63 else -1)
            if self.masks:
                shapes += shape
                seen.append(bool(is_seen))
                end.append(len(shapes))
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
        """What training cannot learn; images without an object, if these are skipped."""
        width, height = self.sizes[self.image].T
        x1, y1, w, h = self.xywh.T
        x2, y2 = x1 + w, y1 + h
        inside = (w > 0) & (h > 0)
        inside &= (np.minimum(width, x2) > np.maximum(0, x1)) & (np.minimum(height, y2) > np.maximum(0, y1))
        self.boxes = np.stack([x1, y1, x2, y2], 1).astype(np.float32)
        del self.xywh
        lost = ~inside | ~self.seen
        if not (train or self.seen.all()):
            unseen = np.flatnonzero(~self.seen)
            k = int(unseen[np.argmin(self.order[unseen])])
            raise UserError(
                f"{self._named(k)}: no pixel of its mask is inside the image; remove it from the file"
            )
        if train and lost.any():
            place = int(self.order[lost].min())
            first = self._whole(annotations[place])
            log.warning(
                "%s: %d objects outside their image or of no size are not trained on, the first: %s",
                self.annotations,
                int(lost.sum()),
                f"{first.get('bbox')} of annotation {first.get('id', '?')}",
            )
            self._keep(~lost)
        del self.order, self.seen
        if skip_empty:
            full = np.unique(self.image[self.iscrowd == 0])
            if not len(full):
                raise UserError(
                    f"{self.annotations}: no image has an object; --data.skip_empty false keeps them"
                )
            self._keep(np.isin(self.image, full))
            self.image = np.searchsorted(full, self.image).astype(np.int32)
            self.names = Names(self.names[int(n)] for n in full)
            self.sizes, self.ids = self.sizes[full], self.ids[full]
        self.first = np.searchsorted(self.image, np.arange(len(self.sizes) + 1))

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
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts:  # a link may lead anywhere
            raise UserError(
                f"{self.annotations}: image {self.ids[index]}: {file_name} lies outside {self.folder}"
            )
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

    def _checked(self, name: str, annotation: dict[str, Any]) -> tuple[list[float], float, int]:
        """Box (x, y, width, height), area and crowd of an annotation, or a UserError."""
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
        return [x, y, w, h], area, crowd

    def _check_shape(self, name: str, shape: Any, n: int) -> bool:
        """Whether any of it may lie inside the image."""
        width, height = self.sizes[n].tolist()
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
        return bool(_is_seen(shape, width, height))


def _is_seen(polygons: list[list[float]], width: int, height: int) -> bool | None:
    """Whether any of them may lie inside the image; None if one needs a closer look."""
    far = 10 * max(width, height) + 10_000
    seen = False
    for p in polygons:
        if len(p) < 6 or len(p) % 2 or min(p) < -far or max(p) > far:
            return None
        if not seen and not (seen := 0 < p[0] < width and 0 < p[1] < height):
            x, y = p[0::2], p[1::2]
            seen = max(x) > 0 and min(x) < width and max(y) > 0 and min(y) < height
    return seen if polygons else None


def coco_id(value: Any) -> int | str:
    """An id to look up: whole numbers are the same as integers, floats or text."""
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdecimal() and value.isascii() else value
    number = int(value)
    if number != value:
        raise ValueError(f"id {value}")
    return number


def _lacking(path: Path, error: Exception) -> str:
    needed = "its images need id, file_name, width and height, its categories id and name"
    return f"{path}: not a COCO file: {needed} ({type(error).__name__}: {error})"


def _read(path: Path) -> dict[str, Any]:
    """The lists of the file: images with their four entries, annotations as msgspec left them, categories."""
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    text = path.read_bytes()
    try:
        found = msgspec.json.decode(text, type=_File)
        return {"images": found.images, "annotations": found.annotations, "categories": found.categories}
    except (msgspec.MsgspecError, RecursionError, ValueError):  # json takes more, and says what it does not
        pass
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"{path}: not a COCO file: it needs the lists images, annotations and categories")
    try:
        images = [_Image(i["id"], i["file_name"], i["width"], i["height"]) for i in content["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(_lacking(path, error)) from error
    return {**content, "images": images}


def decode_mask(segmentation: Any, width: int, height: int) -> NDArray[np.uint8]:
    """Polygons or a run-length encoding, as COCO writes them, to (height, width) of 0 and 1."""
    if isinstance(segmentation, list) or not isinstance(segmentation["counts"], (str, bytes)):
        segmentation = rle.segmToRle(segmentation, width, height)
    return rle.decode(segmentation)
