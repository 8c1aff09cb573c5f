"""Mosaic augmentation for detection: four images in one."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from crossformer_vision.data.rasters import Pixels
from crossformer_vision.data.sampling import ReadImages, Source, unreadable
from crossformer_vision.errors import UserError
from crossformer_vision.types import ObjectTarget

GRAY = (114, 114, 114)  # around images that do not fill their cell


class MosaicImages(ReadImages):
    """Training samples, some of which show four images in a square of two by two cells.

    Each image fits into a cell as large as the longer side of the first one.

    Args:
        source: Images and their objects.
        transform: Function from an image and its objects to a sample.
        skip_corrupt: See ``ReadImages``.
        probability: Probability of a mosaic.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Pixels, Any], object],
        skip_corrupt: bool,
        probability: float,
    ) -> None:
        super().__init__(source, transform, skip_corrupt, min_side=32)
        self.probability = probability

    @override
    def read(self, index: int) -> tuple[Pixels, Any]:
        first = super().read(index)
        if torch.rand(()) >= self.probability:
            return first
        others = torch.randint(len(self), (3,)).tolist()
        return create_mosaic([first, *map(self._read_partner, others)])

    def _read_partner(self, index: int) -> tuple[Pixels, Any]:
        """Read a further image of a mosaic; with ``skip_corrupt``, the next one that is readable."""
        for k in range(len(self)):
            at = (index + k) % len(self)
            try:
                return super().read(at)
            except UserError:
                raise
            except Exception as error:  # decoders raise errors of any kind
                if not self.skip_corrupt:
                    raise UserError(unreadable(self.source.name(at), error)) from None
        raise UserError(f"none of the {len(self)} images can be read")


def create_mosaic(samples: list[tuple[Pixels, ObjectTarget]]) -> tuple[Image.Image, ObjectTarget]:
    """Combine four RGB images and their objects into one.

    Args:
        samples: Images and their objects.
    """
    images = [cast("Image.Image", image) for image, _ in samples]
    side = max(images[0].size)
    canvas = Image.new("RGB", (2 * side, 2 * side), GRAY)
    targets = []
    for n, (image, (_, target)) in enumerate(zip(images, samples, strict=True)):
        factor = side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        row, column = divmod(n, 2)
        # Images meet in the middle of the canvas.
        left = column * side + (0 if column else side - size[0])
        top = row * side + (0 if row else side - size[1])
        canvas.paste(image.resize(size, Image.Resampling.BILINEAR), (left, top))
        scale = (size[0] / image.width, size[1] / image.height)
        targets.append(_place(target, scale, (left, top), size, 2 * side))
    return canvas, _join(targets)


def _place(
    target: ObjectTarget,
    scale: tuple[float, float],
    corner: tuple[int, int],
    size: tuple[int, int],
    side: int,
) -> ObjectTarget:
    """Objects of an image in pixels of the mosaic.

    Args:
        target: Objects in pixels of the image.
        scale: Horizontal and vertical scale.
        corner: Left and top edge of the image in the mosaic.
        size: Width and height of the image in the mosaic.
        side: Side of the mosaic.
    """
    factors, offset = np.array(scale * 2, np.float32), np.array(corner * 2, np.float32)
    placed = ObjectTarget(
        image_id=target["image_id"],
        boxes=target["boxes"] * factors + offset,
        labels=target["labels"],
        iscrowd=target["iscrowd"],
        area=target["area"] * factors[0] * factors[1],
    )
    if "masks" in target:
        masks = np.zeros((len(target["masks"]), side, side), np.uint8)
        rows, columns = slice(corner[1], corner[1] + size[1]), slice(corner[0], corner[0] + size[0])
        for mask, original in zip(masks, target["masks"], strict=True):
            mask[rows, columns] = np.asarray(Image.fromarray(original).resize(size, Image.Resampling.NEAREST))
        placed["masks"] = masks
    return placed


def _join(targets: list[ObjectTarget]) -> ObjectTarget:
    """The objects of several images, with the id of the first one."""

    def join(name: str) -> NDArray[Any]:
        return np.concatenate([target[name] for target in targets])  # type: ignore[literal-required]

    joined = ObjectTarget(
        image_id=targets[0]["image_id"],
        boxes=join("boxes"),
        labels=join("labels"),
        iscrowd=join("iscrowd"),
        area=join("area"),
    )
    if "masks" in targets[0]:
        joined["masks"] = join("masks")
    return joined
