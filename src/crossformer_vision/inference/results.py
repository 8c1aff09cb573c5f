"""What predictions are: results that print, draw and serialise themselves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.plotting import visualize
from crossformer_vision.plotting.fonts import shortened


class Shown:
    """What all results do: print themselves in a line, draw themselves in a notebook, and compare."""

    def plot(self) -> Image.Image:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shortened(str(self), 200)}>"

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
        page = io.BytesIO()
        drawn = self.plot()
        drawn.thumbnail((1024, 1024))
        drawn.save(page, "PNG")
        return page.getvalue()


@dataclass(repr=False, eq=False)
class Classified(Shown):
    """The classes of an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names.
        probabilities: (classes,), of each.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    probabilities: NDArray[np.float32]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest classes and their probabilities."""
        order = np.argsort(-self.probabilities)[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{name} {p:.1%}" for name, p in self.top(3))

    def plot(self) -> Image.Image:
        """The image under its likeliest classes."""
        return visualize.captioned(self.image, [f"{name} {p:.1%}" for name, p in self.top(3)])

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.name, "classes": [{"class": c, "probability": p} for c, p in self.top()]}


@dataclass(repr=False, eq=False)
class Detected(Shown):
    """The objects in an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names; that of label 1 comes first.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        labels: (n,) from 1.
        scores: (n,) in 0..1, falling.
        masks: (n, H, W) of 0 and 1, or None from a detector without masks.
        category_ids: of the classes in the training file; None numbers them from 1.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    category_ids: Sequence[Any] | None = None

    def __str__(self) -> str:
        counts = [(int((self.labels == k + 1).sum()), name) for k, name in enumerate(self.classes)]
        found = ", ".join(f"{n} {name}" for n, name in counts if n)
        return f"{self.name}: {found or 'nothing found'}"

    def plot(self) -> Image.Image:
        """The image with boxes, masks, labels and scores."""
        objects: dict[str, Any] = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.masks is not None:
            objects["masks"] = self.masks
        return visualize.draw_objects(self.image, objects, self.classes)

    def to_coco(self, image_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """Annotations in COCO's format, each with its `score`; masks as compressed run lengths.

        Categories have the ids of the file that the detector was trained on.
        """
        annotations = []
        categories = self.category_ids or range(1, 1 + len(self.classes))
        for n, (x1, y1, x2, y2) in enumerate(self.boxes.astype(float).round(2).tolist()):
            annotation: dict[str, Any] = dict(
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

    def to_dict(self) -> dict[str, Any]:
        size = dict(width=self.image.width, height=self.image.height)
        return {"image": self.name, **size, "objects": self.to_coco()}


@dataclass(repr=False, eq=False)
class Segmented(Shown):
    """The class of each pixel of an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names.
        class_map: (H, W), index of each pixel's class.
        values: of the classes in the class maps that were trained on; None for their indices.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    class_map: NDArray[np.uint8]
    values: Sequence[int] | None = None

    def areas(self) -> list[tuple[str, int]]:
        """The classes that occur and their pixels, the largest first."""
        counts = np.bincount(self.class_map.ravel(), minlength=len(self.classes))
        return [(self.classes[k], int(counts[k])) for k in np.argsort(-counts, kind="stable") if counts[k]]

    def __str__(self) -> str:
        areas = self.areas()
        more = f", {len(areas) - 5} more" if len(areas) > 5 else ""
        shares = ", ".join(f"{name} {n / self.class_map.size:.1%}" for name, n in areas[:5])
        return f"{self.name}: {shares}{more}"

    def plot(self) -> Image.Image:
        """The image under its class map's colours, above their legend."""
        return visualize.with_legend(
            visualize.overlay(self.image, self.class_map), self.class_map, self.classes
        )

    def to_png(self) -> Image.Image:
        """The class map as a palette image, with the values that classes had in the maps of training."""
        values = np.array(self.values or range(len(self.classes)), np.uint8)
        colours = np.zeros((256, 3), np.uint8)
        colours[values] = visualize.palette(len(self.classes))
        drawn = Image.fromarray(values[self.class_map]).convert("P")
        drawn.putpalette(colours.tobytes())
        return drawn

    def to_dict(self) -> dict[str, Any]:
        size = self.class_map.size
        areas = [{"class": name, "pixels": n, "share": round(n / size, 6)} for name, n in self.areas()]
        return {"image": self.name, "width": self.image.width, "height": self.image.height, "areas": areas}


Result = Classified | Detected | Segmented
