"""Multi-scale digits: bundled data for all tasks.

Handwritten digits (scikit-learn's copy of the UCI optical recognition set: 1797 images of 8x8 pixels in ten
classes), drawn at many scales and positions on textured canvases. An image depends only on (seed, split,
index). Training and validation use different handwriting.
"""

from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from crossformer_vision.types import ObjectTarget

CLASSES = tuple(str(digit) for digit in range(10))


@lru_cache(maxsize=2)
def _handwriting(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits of shape ``(N, 8, 8)`` in 0..255 and their classes. Every fourth sample is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 4 == 0) == (split == "val")
    return (digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen]


class DigitTarget(TypedDict):
    """Target of an image; see ``MultiScaleDigits``."""

    label: int
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    masks: NDArray[np.uint8]
    semantic: NDArray[np.uint8]


class MultiScaleDigits(Dataset[tuple[Image.Image, DigitTarget]]):
    """Handwritten digits at many scales on textured canvases.

    Args:
        split: ``"train"`` or ``"val"``.
        length: Number of images.
        size: Side of the square canvas, in pixels.
        digits: Minimum and maximum number of digits per image.
        scales: Minimum and maximum side of a digit, relative to the canvas.
        seed: Seed.

    Raises:
        ValueError: If the split is unknown.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 4000,
        size: int = 64,
        digits: tuple[int, int] = (1, 1),
        scales: tuple[float, float] = (0.3, 0.95),
        seed: int = 0,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not '{split}'")
        self.split, self.length, self.size = split, length, size
        self.digits, self.scales, self.seed = digits, scales, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, DigitTarget]:
        """An RGB image and its target.

        Returns:
            The image, and a dict of ``label``, the class of the first digit; ``labels``, shape ``(N,)``;
            ``boxes`` as x1, y1, x2, y2 of the visible ink in pixels, shape ``(N, 4)``; ``masks`` of the
            visible ink, shape ``(N, size, size)``; ``semantic``, 0 for the canvas and 1 + class for ink,
            shape ``(size, size)``.
        """
        rng = np.random.default_rng((self.seed, self.split == "val", index))
        canvas = _texture(rng, self.size)
        glyphs, classes = _handwriting(self.split)
        count = int(rng.integers(self.digits[0], self.digits[1] + 1))
        chosen = rng.integers(len(glyphs), size=count)
        owner = np.full((self.size, self.size), -1)  # digit whose ink is on top
        for n, which in enumerate(chosen):
            low, high = np.log(self.scales)
            side = max(8, round(self.size * float(np.exp(rng.uniform(low, high)))))
            y, x = rng.integers(0, self.size - side + 1, size=2)
            glyph = Image.fromarray(glyphs[which]).rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
            ink = np.asarray(glyph.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
            area = canvas[y : y + side, x : x + side]
            area += ink[..., None] * (_ink_color(rng) - area)
            owner[y : y + side, x : x + side][ink > 0.4] = n
        visible = [n for n in range(count) if (owner == n).any()]
        masks = np.stack([owner == n for n in visible])
        labels = classes[chosen[visible]]
        boxes = np.array([_box(mask) for mask in masks], np.float32)
        semantic = np.zeros(owner.shape, np.uint8)
        for mask, label in zip(masks, labels, strict=True):
            semantic[mask] = 1 + label
        image = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
        target = DigitTarget(
            label=int(labels[0]), labels=labels, boxes=boxes, masks=masks.astype(np.uint8), semantic=semantic
        )
        return image, target


def _texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A dark canvas of smooth color noise at two scales, shape ``(size, size, 3)``, about 0.1 to 0.5."""
    canvas = rng.uniform(0.2, 0.4, 3).astype(np.float32) * np.ones((size, size, 3), np.float32)
    for cells, strength in ((3, 0.1), (12, 0.05)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas += (
            np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        ) * strength
    return canvas


def _ink_color(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light color of any hue."""
    return rng.uniform(0.7, 1.0, 3).astype(np.float32)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return cols[0], rows[0], cols[-1] + 1, rows[-1] + 1


class DigitImages:
    """Images with one digit, for classification.

    Args:
        split: ``train`` or ``val``.
        length: Number of images.
        size: Side of the images in pixels.
        seed: Seed.
    """

    classes = list(CLASSES)

    def __init__(self, split: str, length: int, size: int, seed: int) -> None:
        self.dataset = MultiScaleDigits(split, length, size, seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and its class index."""
        image, target = self.dataset[index]
        return image, target["label"]

    def name(self, index: int) -> str:
        """Name of an image, for messages."""
        return f"digit {index}"


class DigitObjects:
    """Images with up to four digits, for detection.

    Args:
        split: ``train`` or ``val``.
        length: Number of images.
        size: Side of the images in pixels.
        masks: Whether targets have masks.
        seed: Seed.
    """

    categories = {k + 1: name for k, name in enumerate(CLASSES)}

    def __init__(self, split: str, length: int, size: int, masks: bool, seed: int) -> None:
        self.dataset = MultiScaleDigits(split, length, size, (1, 4), (0.2, 0.6), seed)
        self.sizes = [(size, size)] * length
        self.masks = masks

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Name of an image, for messages."""
        return f"digits {index}"

    def read(self, index: int) -> tuple[Image.Image, ObjectTarget]:
        """An image and its target, as from ``CocoImages``."""
        image, digits = self.dataset[index]
        target: ObjectTarget = {
            "image_id": index,
            "boxes": digits["boxes"],
            "labels": digits["labels"] + 1,
            "iscrowd": np.zeros(len(digits["labels"]), np.int64),
            "area": digits["masks"].sum((1, 2)).astype(np.float32),
        }
        return image, {**target, "masks": digits["masks"]} if self.masks else target


class DigitMaps:
    """Images with one or two digits, for segmentation. The canvas is a class.

    Args:
        split: ``train`` or ``val``.
        length: Number of images.
        size: Side of the images in pixels.
        seed: Seed.
    """

    classes = ["canvas", *CLASSES]

    def __init__(self, split: str, length: int, size: int, seed: int) -> None:
        self.dataset = MultiScaleDigits(split, length, size, (1, 2), (0.2, 0.6), seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Name of an image, for messages."""
        return f"digits {index}"

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """An image and its class map."""
        image, target = self.dataset[index]
        return image, target["semantic"]
