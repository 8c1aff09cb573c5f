"""Facts about the images of a data set: size, values, duplicates."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.data.images import orientation_of
from crossformer_vision.data.rasters import AnyImage, as_raster, image_size

MAX_DISTANCE = 3  # differing bits of the fingerprints of near duplicates, of 64
MIN_BITS = 10  # minimum number of set and of unset bits of an informative fingerprint
BIT_COUNTS = np.array([n.bit_count() for n in range(256)], np.uint8)
CHUNK = 256  # images whose distances to all others are computed together


@dataclass(frozen=True)
class ImageFacts:
    """What a check records about an image.

    Attributes:
        split: ``train`` or ``val``.
        name: Path, or name in an archive.
        size: Width and height in pixels.
        channels: Number of stored channels.
        dtype: Type of the stored values.
        low: Smallest value.
        high: Largest value.
        digest: Hash of the pixels, equal for exact copies.
        fingerprint: Difference hash of 64 bits, similar for similar images.
        is_rotated: Whether EXIF rotates or flips it.
    """

    split: str
    name: str
    size: tuple[int, int]
    channels: int
    dtype: str
    low: float
    high: float
    digest: bytes
    fingerprint: int
    is_rotated: bool

    @property
    def is_constant(self) -> bool:
        """Whether all pixels have one value."""
        return self.low == self.high


def describe_image(image: AnyImage, split: str, name: str) -> ImageFacts:
    """Facts about an opened image. Decodes it.

    Args:
        image: Image of a reader.
        split: Its split.
        name: Its name.
    """
    values = as_raster(image)
    digest = hashlib.sha1(repr(values.shape).encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(values).data)
    return ImageFacts(
        split,
        name,
        image_size(image),
        values.shape[2],
        str(values.dtype),
        float(values.min()),
        float(values.max()),
        digest.digest(),
        fingerprint(values.mean(2)),
        _is_rotated(name),
    )


def fingerprint(gray: NDArray[np.floating]) -> int:
    """Difference hash: whether each of 8x8 cells is darker than its right neighbor.

    Args:
        gray: Gray values, ``(H, W)``.
    """
    small = np.asarray(Image.fromarray(gray.astype(np.float32)).resize((9, 8), Image.Resampling.BOX))
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _is_rotated(name: str) -> bool:
    """Whether a file has an EXIF orientation other than upright."""
    if Path(name).suffix.lower() not in (".jpg", ".jpeg", ".tif", ".tiff", ".png", ".webp"):
        return False
    try:
        with Image.open(name) as image:
            return orientation_of(image) != 1
    except Exception:  # in an archive, or not readable by Pillow
        return False


def find_exact_duplicates(images: Iterable[ImageFacts]) -> list[list[ImageFacts]]:
    """Groups of images with equal pixels. Images of one color are not compared."""
    groups: dict[bytes, list[ImageFacts]] = defaultdict(list)
    for image in images:
        if not image.is_constant:
            groups[image.digest].append(image)
    return [group for group in groups.values() if len(group) > 1]


def find_near_duplicates(images: Sequence[ImageFacts]) -> list[tuple[ImageFacts, ImageFacts]]:
    """Pairs of images that look alike without being equal. Images without structure are not compared."""
    unique = list({image.digest: image for image in images}.values())
    structured = [image for image in unique if MIN_BITS <= image.fingerprint.bit_count() <= 64 - MIN_BITS]
    hashes = np.array([image.fingerprint for image in structured], np.uint64)
    pairs = []
    for start in range(0, len(hashes), CHUNK):
        rows = hashes[start : start + CHUNK, None]
        different = (rows ^ hashes[None, start:])[..., None].view(np.uint8)
        distance = BIT_COUNTS[different].sum(-1)
        for row, column in np.argwhere(distance <= MAX_DISTANCE).tolist():
            if column > row:
                pairs.append((structured[start + row], structured[start + column]))
    return pairs
