"""Albumentations pipelines as training augmentation.

Random numbers of a pipeline are seeded from PyTorch's, which depend on seed, epoch and image only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from crossformer_vision.errors import UserError, missing_extra


def is_albumentations(step: object) -> bool:
    """Whether an object is a transform or pipeline of Albumentations."""
    return type(step).__module__.startswith("albumentations")


class AlbumentationsPipeline:
    """A pipeline with the interface of torchvision's transforms.

    It takes an image; an image and a class map; or an image and the boxes, labels and masks of its
    objects, and returns the same. Options of the pipeline for boxes are replaced.

    Args:
        steps: Transforms, or one ``Compose``.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        try:
            from albumentations import BboxParams, Compose
        except ModuleNotFoundError as error:
            raise missing_extra(error, "albumentations") from None
        self.pipeline = Compose(list(steps))
        boxes = BboxParams("pascal_voc", label_fields=["indices"], clip=True, min_area=1)
        self.box_pipeline = Compose(list(steps), bbox_params=boxes)

    def __call__(self, image: Image.Image | Tensor, target: Any = None) -> Any:
        """Augment an image and its target."""
        seed = int(torch.randint(2**31, ()))
        pixels = _to_array(image)
        if isinstance(target, dict):
            self.box_pipeline.set_random_seed(seed)
            return self._augment_objects(pixels, target)
        self.pipeline.set_random_seed(seed)
        if target is None:
            augmented = _check_pixels(self.pipeline(image=pixels)["image"], pixels)
            if isinstance(image, Tensor):
                return _to_image(augmented)
            is_gray = augmented.shape[2] == 1
            return Image.fromarray(augmented[..., 0] if is_gray else augmented).convert("RGB")
        found = self.pipeline(image=pixels, mask=target[0].numpy())
        mask = tv_tensors.Mask(torch.from_numpy(found["mask"].copy())[None])
        return _to_image(_check_pixels(found["image"], pixels)), mask

    def _augment_objects(
        self, pixels: NDArray[Any], target: dict[str, Any]
    ) -> tuple[tv_tensors.Image, dict[str, Any]]:
        inputs = {"bboxes": target["boxes"].numpy(), "indices": np.arange(len(target["boxes"]))}
        if "masks" in target and len(target["masks"]):
            inputs["masks"] = list(target["masks"].numpy())
        found = self.box_pipeline(image=pixels, **inputs)
        image = _to_image(_check_pixels(found["image"], pixels))
        remaining = np.array(found["indices"], int).tolist()  # objects inside the augmented image
        indices = torch.tensor(remaining, dtype=torch.int64)
        kept = {name: value[indices] for name, value in target.items() if name not in ("boxes", "masks")}
        boxes = torch.tensor(np.array(found["bboxes"], np.float32).reshape(-1, 4))
        size = (image.shape[1], image.shape[2])
        kept["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        if "masks" in target:
            masks = [found["masks"][n] for n in remaining]
            stacked = np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
            kept["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return image, kept


def _to_array(image: Image.Image | Tensor) -> NDArray[Any]:
    """Pixels of an image, shape ``(H, W, C)``."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.array(image)


def _check_pixels(pixels: object, original: NDArray[Any]) -> NDArray[Any]:
    """Check that a pipeline returned an array of the same type, and add a missing channel dimension.

    Raises:
        UserError: If it did not.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != original.dtype:
        raise UserError(
            "data.augmentation: remove ToTensorV2, Normalize and ToFloat. Images are normalized afterwards"
        )
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_image(pixels: NDArray[Any]) -> tv_tensors.Image:
    """An image of shape ``(C, H, W)`` from pixels of shape ``(H, W, C)``."""
    return tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
