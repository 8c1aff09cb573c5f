"""Resizing and normalization of images before a detector, and of its results afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from typing_extensions import override

from crossformer_vision.models.dense.masks import CHUNK_SIZE, paste_masks
from crossformer_vision.models.grouping import ceil_div


class DetectorTransform(GeneralizedRCNNTransform):
    """torchvision's transform with masks pasted as in OpenMMLab and images of any aspect ratio.

    Args:
        min_size: Target length of the shorter side. Training chooses one of several at random, evaluation
            uses the last.
        max_size: Maximum length of the longer side.
        image_mean: Mean of each channel.
        image_std: Standard deviation of each channel.
        skip_resize: Do not resize in training, because the data module does it.

    Attributes:
        paste: Return masks of whole images. ``False`` returns ``mask_crops`` of the boxes instead, shape
            ``(n, 1, side, side)``, whose memory does not grow with the image.
    """

    paste = True

    def __init__(
        self,
        min_size: int | list[int],
        max_size: int,
        image_mean: list[float],
        image_std: list[float],
        skip_resize: bool = False,
    ) -> None:
        super().__init__(min_size, max_size, image_mean, image_std)
        self.skip_resize = skip_resize

    @override
    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training and self.skip_resize:
            return image, target
        H, W = image.shape[-2:]
        min_side = ceil_div(max(H, W), self.max_size)  # resized to one pixel
        image = F.pad(image, (0, max(0, min_side - W), 0, max(0, min_side - H)))
        masks = target.pop("masks", None) if target is not None else None
        image, target = super().resize(image, target)
        if target is not None and masks is not None:
            target["masks"] = _resize_masks(masks, image)
        return image, target

    @override
    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        masks = [detections.pop("masks", None) for detections in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for detections, probabilities, size in zip(result, masks, original_image_sizes):
            if probabilities is not None and self.paste:
                detections["masks"] = paste_masks(probabilities, detections["boxes"], size)
            elif probabilities is not None:
                detections["mask_crops"] = probabilities
        return result


def _resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Resize masks to the size of an image, by nearest neighbor as torchvision, one chunk at a time."""
    size = image.shape[1:]
    if masks.shape[1:] == size:
        return masks
    resized = masks.new_zeros(len(masks), *size)
    for n in range(0, len(masks), CHUNK_SIZE):
        chunk = masks[n : n + CHUNK_SIZE, None].float()
        resized[n : n + CHUNK_SIZE] = F.interpolate(chunk, size=size)[:, 0].to(masks.dtype)
    return resized


@contextmanager
def return_mask_crops(net: nn.Module) -> Iterator[None]:
    """Make a detector return ``mask_crops`` instead of masks of whole images; see `DetectorTransform`.

    Args:
        net: Detector. Modules without a `DetectorTransform`, such as exported ones, are not changed.
    """
    transform = getattr(net, "transform", None)
    if isinstance(transform, DetectorTransform):
        transform.paste = False
    try:
        yield
    finally:
        if isinstance(transform, DetectorTransform):
            transform.paste = True
