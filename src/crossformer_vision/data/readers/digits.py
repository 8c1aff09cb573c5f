"""Multi-scale digits: the data that comes with the library, for all four tasks.

Real handwritten digits (scikit-learn's copy of the UCI optical recognition set: 1797 images of 8x8, ten
classes), drawn at many scales and places on textured canvases. Deterministic: an image follows from (seed,
split, index). Training and validation images use the handwriting of different samples.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

CLASSES = tuple(str(digit) for digit in range(10))


@lru_cache(maxsize=2)
def _handwriting(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits (count, 8, 8) in 0..255 and their classes; every fourth sample is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 4 == 0) == (split == "val")
    return (digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen]


class MultiScaleDigits(Dataset[Any]):
    """Handwritten digits at many scales on textured canvases.

    Args:
        split: `"train"` or `"val"`.
        length: images in the split.
        size: side of the square canvas, in pixels.
        digits: fewest and most digits in an image; with one, `label` is the image's class.
        scales: smallest and largest side of a digit, as a share of the canvas.
        seed: of everything drawn.

    Each item is `(image, target)`: a PIL image, RGB, and a dict of

        label     int, class of the first digit
        labels    int64 (n,), class of each digit
        boxes     float32 (n, 4), x1, y1, x2, y2 of each digit's visible ink, in pixels
        masks     uint8 (n, size, size), 1 on the visible ink of each digit
        semantic  uint8 (size, size), 0 the canvas, 1 + class on ink
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
            raise ValueError(f"split is 'train' or 'val', not '{split}'")
        self.split, self.length, self.size = split, length, size
        self.digits, self.scales, self.seed = digits, scales, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        rng = np.random.default_rng((self.seed, self.split == "val", index))
        canvas = _texture(rng, self.size)
        glyphs, classes = _handwriting(self.split)
        count = int(rng.integers(self.digits[0], self.digits[1] + 1))
        chosen = rng.integers(len(glyphs), size=count)
        owner = np.full((self.size, self.size), -1)  # which digit's ink is on top
        for n, which in enumerate(chosen):
            low, high = np.log(self.scales)
            side = max(8, round(self.size * float(np.exp(rng.uniform(low, high)))))
            y, x = rng.integers(0, self.size - side + 1, size=2)
            glyph = Image.fromarray(glyphs[which]).rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
            ink = np.asarray(glyph.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
            area = canvas[y : y + side, x : x + side]
            area += ink[..., None] * (_ink_colour(rng) - area)
            owner[y : y + side, x : x + side][ink > 0.4] = n
        visible = [n for n in range(count) if (owner == n).any()]
        masks = np.stack([owner == n for n in visible])
        labels = classes[chosen[visible]]
        boxes = np.array([_box(mask) for mask in masks], np.float32)
        semantic = np.zeros(owner.shape, np.uint8)
        for mask, label in zip(masks, labels, strict=True):
            semantic[mask] = 1 + label
        image = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
        target = dict(
            label=int(labels[0]), labels=labels, boxes=boxes, masks=masks.astype(np.uint8), semantic=semantic
        )
        return image, target


def _texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A dark canvas of smooth colour noise at two scales, (size, size, 3), about 0.1 to 0.5."""
    canvas = rng.uniform(0.2, 0.4, 3).astype(np.float32) * np.ones((size, size, 3), np.float32)
    for cells, strength in ((3, 0.1), (12, 0.05)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas += (
            np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        ) * strength
    return canvas


def _ink_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light colour, of any hue."""
    return rng.uniform(0.7, 1.0, 3).astype(np.float32)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return cols[0], rows[0], cols[-1] + 1, rows[-1] + 1
