"""Transforms of images with boxes and masks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from crossformer_vision.data.outlines import clip_shape, create_outlines, rasterize
from crossformer_vision.data.rasters import Pixels, image_size
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.types import ObjectTarget, Polygons

Tensors = dict[str, Tensor]
Transform = Callable[[Tensor, Tensors], tuple[Tensor, Tensors]]


class ToTensors:
    """Converts an image and its target to augmented tensors.

    Crowds are dropped in training, and so are objects that a crop has removed.

    Args:
        transform: Transform of ``tv_tensors``: an image, and a dict with ``boxes``, ``labels`` and perhaps
            ``masks``.
        train: Whether the samples are for training.
        crops: Whether the transform crops. Boxes then follow the visible part of the masks.
        max_size: Longer side of resized images. Images so elongated that their shorter side would vanish are
            padded.
    """

    def __init__(self, transform: Transform, train: bool, crops: bool = True, max_size: int = 1333) -> None:
        self.transform, self.train, self.crops, self.max_size = transform, train, train and crops, max_size

    def __call__(self, image: Pixels, target: ObjectTarget) -> tuple[Tensor, Tensors]:
        """Convert a sample.

        Args:
            image: RGB image, or tensor.
            target: Target of ``CocoImages``.

        Returns:
            Image of shape ``(C, H, W)``, with values in 0..1 if RGB, and the target as tensors.
        """
        tensors, shapes = self._to_tv_tensors(image, target)
        pixels = v2.functional.to_image(image)
        if self.train:
            pixels, tensors = self._pad_elongated(pixels, tensors)
        pixels, tensors = self.transform(pixels, tensors)
        plain = {name: value.as_subclass(Tensor) for name, value in tensors.items()}
        if shapes is not None:
            size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            outlines, objects = plain.pop("outlines"), plain.pop("object").tolist()
            plain["masks"] = rasterize(outlines, shapes, objects, size)
        if (self.crops or shapes is not None) and "masks" in plain:
            is_visible = plain["masks"].flatten(1).any(1).bool()
            if not is_visible.all():
                count = len(is_visible)
                plain = {name: v[is_visible] if len(v) == count else v for name, v in plain.items()}
        if self.crops and "masks" in plain:
            plain["boxes"] = masks_to_boxes(plain["masks"]) + torch.tensor([0.0, 0, 1, 1])
        return pixels.as_subclass(Tensor), {**plain, "image_id": torch.tensor(target["image_id"])}

    def _to_tv_tensors(self, image: Pixels, target: ObjectTarget) -> tuple[Tensors, list[Polygons] | None]:
        """Target as ``tv_tensors``, and the polygons to rasterize after the transform, if there are any."""
        width, height = image_size(image)
        canvas = (height, width)
        is_kept = np.ones(len(target["labels"]), bool)
        if self.train:
            is_kept = target["iscrowd"] == 0
            if "masks" in target:
                is_kept &= target["masks"].any((1, 2))
        skipped = ("iscrowd", "area") if self.train else ()
        tensors: Tensors = {
            name: torch.from_numpy(value[is_kept])
            for name, value in target.items()
            if isinstance(value, np.ndarray) and name not in skipped
        }
        tensors["boxes"] = tv_tensors.BoundingBoxes(tensors["boxes"], format="XYXY", canvas_size=canvas)
        if self.train:  # parts outside the image cannot be learned
            tensors["boxes"] = v2.functional.clamp_bounding_boxes(tensors["boxes"])
        if "masks" in tensors:
            tensors["masks"] = tv_tensors.Mask(tensors["masks"])
        shapes = target.get("outlines")
        if shapes is None:
            return tensors, None
        # Clipped, because a crop larger than the image would draw parts outside it over the padding.
        kept_shapes = [shape for shape, kept in zip(shapes, is_kept, strict=True) if kept]
        clipped = [clip_shape(shape, width, height) for shape in kept_shapes if isinstance(shape, list)]
        tensors["outlines"] = create_outlines(clipped, canvas)
        tensors["object"] = torch.arange(len(clipped))
        return tensors, clipped

    def _pad_elongated(self, pixels: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors]:
        """Pad an image whose shorter side would have less than one pixel after resizing."""
        height, width = pixels.shape[-2:]
        min_side = ceil_div(max(height, width), self.max_size)
        padding = [0, 0, max(0, min_side - width), max(0, min_side - height)]
        if not any(padding):
            return pixels, tensors
        padded = {
            name: v2.functional.pad(value, padding) if isinstance(value, tv_tensors.TVTensor) else value
            for name, value in tensors.items()
        }
        return v2.functional.pad(pixels, padding), padded


def object_labels(inputs: tuple[object, Tensors]) -> tuple[Tensor, ...]:
    """Tensors with one entry per box, which lose the entry when the box is removed."""
    return tuple(inputs[1][name] for name in ("labels", "object") if name in inputs[1])
