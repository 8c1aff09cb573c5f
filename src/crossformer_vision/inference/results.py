"""Results of predictions, which can be printed, plotted and serialized."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.errors import missing_extra
from crossformer_vision.plotting import drawing
from crossformer_vision.plotting.fonts import shorten
from crossformer_vision.types import JsonObject


class ResultMixin:
    """One-line and notebook representations, and equality."""

    def plot(self) -> Image.Image:
        """The image with the result drawn into it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shorten(str(self), 200)}>"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        ours, theirs = vars(self), vars(other)
        return all(
            np.array_equal(value, theirs[name]) if isinstance(value, np.ndarray) else value == theirs[name]
            for name, value in ours.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        image = self.plot()
        image.thumbnail((1024, 1024))
        image.save(content, "PNG")
        return content.getvalue()


def _import_supervision() -> ModuleType:
    """Import supervision.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise missing_extra(error, "supervision") from None
    return supervision


@dataclass(repr=False, eq=False)
class ClassificationResult(ResultMixin):
    """Class probabilities of an image.

    Attributes:
        name: File name of the image.
        image: RGB image.
        classes: Names of the classes.
        probabilities: Probability of each class, ``(classes,)``.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    probabilities: NDArray[np.float32]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most probable classes and their probabilities, highest first."""
        order = np.argsort(-self.probabilities)[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{name} {p:.1%}" for name, p in self.top(3))

    def to_supervision(self) -> Any:
        """Convert to supervision's ``Classifications``, highest probability first."""
        order = np.argsort(-self.probabilities)
        return _import_supervision().Classifications(class_id=order, confidence=self.probabilities[order])

    def plot(self) -> Image.Image:
        """The image with its three most probable classes as a caption."""
        return drawing.add_caption(self.image, [f"{name} {p:.1%}" for name, p in self.top(3)])

    def to_dict(self) -> JsonObject:
        """The five most probable classes, as written to ``predictions.json``."""
        return {"image": self.name, "classes": [{"class": c, "probability": p} for c, p in self.top()]}


@dataclass(repr=False, eq=False)
class MultiLabelResult(ResultMixin):
    """Classes of an image, any number of which it may have.

    Attributes:
        name: File name of the image.
        image: RGB image.
        classes: Names of the classes.
        probabilities: Probability of each class, ``(classes,)``.
        thresholds: Minimum probability of each class.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    probabilities: NDArray[np.float32]
    thresholds: Sequence[float]

    def labels(self) -> list[tuple[str, float]]:
        """The classes that reach their threshold and their probabilities, highest first."""
        order = np.argsort(-self.probabilities)
        is_found = self.probabilities >= np.array(self.thresholds, np.float32)
        return [(self.classes[i], float(self.probabilities[i])) for i in order if is_found[i]]

    def __str__(self) -> str:
        return f"{self.name}: " + (", ".join(f"{name} {p:.1%}" for name, p in self.labels()) or "no class")

    def to_supervision(self) -> Any:
        """Convert the classes that reach their threshold to supervision's ``Classifications``."""
        class_id = np.array([self.classes.index(name) for name, _ in self.labels()], int)
        return _import_supervision().Classifications(
            class_id=class_id, confidence=self.probabilities[class_id]
        )

    def plot(self) -> Image.Image:
        """The image with its classes as a caption."""
        captions = [f"{name} {p:.1%}" for name, p in self.labels()]
        return drawing.add_caption(self.image, captions or ["no class"])

    def to_dict(self) -> JsonObject:
        """The classes, as written to ``predictions.json``."""
        return {"image": self.name, "classes": [{"class": c, "probability": p} for c, p in self.labels()]}


@dataclass(repr=False, eq=False)
class DetectionResult(ResultMixin):
    """Objects detected in an image.

    Attributes:
        name: File name of the image.
        image: RGB image.
        classes: Names of the classes; label 1 is the first.
        boxes: Boxes as ``x1, y1, x2, y2`` in pixels of the image, ``(n, 4)``.
        labels: Labels from 1, ``(n,)``.
        scores: Scores from 0 to 1 in descending order, ``(n,)``.
        masks: Masks of 0 and 1, ``(n, H, W)``. ``None`` for a detector without masks.
        category_ids: Category ids of the classes in the training annotations. ``None`` is 1, 2, ….
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    category_ids: Sequence[int | str] | None = None

    def __str__(self) -> str:
        counts = [(int((self.labels == k + 1).sum()), name) for k, name in enumerate(self.classes)]
        summary = ", ".join(f"{n} {name}" for n, name in counts if n)
        return f"{self.name}: {summary or 'no objects'}"

    def plot(self) -> Image.Image:
        """The image with boxes, masks, labels and scores."""
        objects: dict[str, NDArray[np.number]]
        objects = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.masks is not None:
            objects["masks"] = self.masks
        return drawing.draw_objects(self.image, objects, self.classes)

    def to_supervision(self) -> Any:
        """Convert to supervision's ``Detections``, with class ids from 0 and names in ``class_name``."""
        class_id = self.labels - 1
        return _import_supervision().Detections(
            xyxy=self.boxes,
            mask=None if self.masks is None else self.masks.astype(bool),
            confidence=self.scores,
            class_id=class_id,
            data={"class_name": np.array([self.classes[k] for k in class_id], str)},
        )

    def to_coco(self, image_id: int = 1, first_id: int = 1) -> list[JsonObject]:
        """Convert to annotations in COCO's format with ``score``; masks are compressed run-length encodings.

        Args:
            image_id: Id of the image.
            first_id: Id of the first annotation.

        Returns:
            One dictionary per object, with the category ids of the training annotations.
        """
        annotations = []
        categories = self.category_ids or range(1, 1 + len(self.classes))
        for n, (x1, y1, x2, y2) in enumerate(self.boxes.astype(float).round(2).tolist()):
            annotation: JsonObject = dict(
                id=first_id + n,
                image_id=image_id,
                category_id=categories[int(self.labels[n]) - 1],
                bbox=[x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                area=round((x2 - x1) * (y2 - y1), 2),
                iscrowd=0,
                score=round(float(self.scores[n]), 4),
            )
            if self.masks is not None:
                encoded = rle.encode(np.asfortranarray(self.masks[n]))
                counts = encoded["counts"]
                counts = counts.decode() if isinstance(counts, bytes) else counts
                annotation["segmentation"] = {"size": list(encoded["size"]), "counts": counts}
                annotation["area"] = int(self.masks[n].sum())
            annotations.append(annotation)
        return annotations

    def to_dict(self) -> JsonObject:
        """Size of the image and COCO annotations, as printed by ``crossformer predict --json``."""
        size = dict(width=self.image.width, height=self.image.height)
        return {"image": self.name, **size, "objects": self.to_coco()}


@dataclass(repr=False, eq=False)
class SegmentationResult(ResultMixin):
    """Class of each pixel of an image.

    Attributes:
        name: File name of the image.
        image: RGB image.
        classes: Names of the classes.
        class_map: Class index of each pixel, ``(H, W)``.
        values: Pixel values of the classes in the training class maps. ``None`` is 0, 1, ….
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    class_map: NDArray[np.uint8]
    values: Sequence[int] | None = None

    def areas(self) -> list[tuple[str, int]]:
        """Classes that occur and their numbers of pixels, in descending order."""
        counts = np.bincount(self.class_map.ravel(), minlength=len(self.classes))
        return [(self.classes[k], int(counts[k])) for k in np.argsort(-counts, kind="stable") if counts[k]]

    def __str__(self) -> str:
        areas = self.areas()
        more = f", {len(areas) - 5} more" if len(areas) > 5 else ""
        shares = ", ".join(f"{name} {n / self.class_map.size:.1%}" for name, n in areas[:5])
        return f"{self.name}: {shares}{more}"

    def plot(self) -> Image.Image:
        """The image overlaid with the colors of its class map, above a legend."""
        return drawing.add_legend(
            drawing.overlay_class_map(self.image, self.class_map), self.class_map, self.classes
        )

    def to_supervision(self) -> Any:
        """Convert to supervision's ``Detections``, one mask for each class that occurs."""
        class_id = np.unique(self.class_map).astype(int)
        masks = self.class_map == class_id[:, None, None]
        supervision = _import_supervision()
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks),
            mask=masks,
            class_id=class_id,
            data={"class_name": np.array([self.classes[k] for k in class_id], str)},
        )

    def to_png(self) -> Image.Image:
        """The class map as a palette image, with the pixel values of the training class maps."""
        values = np.array(self.values or range(len(self.classes)), np.uint8)
        colors = np.zeros((256, 3), np.uint8)
        colors[values] = drawing.class_colors(len(self.classes))
        image = Image.fromarray(values[self.class_map]).convert("P")
        image.putpalette(colors.tobytes())
        return image

    def to_dict(self) -> JsonObject:
        """Size of the image and area of each class, as written to ``predictions.json``."""
        size = self.class_map.size
        areas = [{"class": name, "pixels": n, "share": round(n / size, 6)} for name, n in self.areas()]
        return {"image": self.name, "width": self.image.width, "height": self.image.height, "areas": areas}


Result = ClassificationResult | MultiLabelResult | DetectionResult | SegmentationResult
