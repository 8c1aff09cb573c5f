"""Masks of detectors: training targets, and pasting of predicted masks into images.

Both sample masks at the centers of pixels from unrounded boxes, as OpenMMLab does. docs/detection.md compares
the maximum IoU of 28x28 masks with torchvision's sampling.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

CHUNK_SIZE = 16  # masks that are converted to float32 at a time


def crop_mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """Crop the masks of objects to boxes.

    Args:
        masks: Masks of 0 and 1, ``(objects, H, W)``, of any dtype.
        boxes: Boxes, ``(n, 4)`` in pixels.
        index: Object of each box, ``(n,)``.
        side: Rows and columns of the result.

    Returns:
        Masks of 0 and 1, ``(n, side, side)``, in the dtype of ``boxes``.
    """
    targets = boxes.new_zeros(len(boxes), side, side)
    for chunk in index.unique().split(CHUNK_SIZE):
        chosen = torch.where(torch.isin(index, chunk))[0]
        positions = torch.searchsorted(chunk, index[chosen])
        rois = torch.cat([positions[:, None].to(boxes), boxes[chosen]], dim=1)
        selected = masks[chunk][:, None].to(boxes)
        coverage = roi_align(selected, rois, (side, side), 1.0, sampling_ratio=0, aligned=True)
        targets[chosen] = (coverage[:, 0] >= 0.5).to(boxes)
    return targets


def iterate_pasted_regions(
    masks: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Sample masks of boxes at the centers of an image's pixels.

    Args:
        masks: Probabilities, ``(n, 1, side, side)``.
        boxes: Boxes, ``(n, 4)`` in pixels.
        size: Height and width of the image.

    Yields:
        Index of a mask, rows and columns of the image that it covers, and its probabilities there. Masks
        that cover no pixel are left out.
    """
    H, W = size
    # A mask reaches half a cell beyond its box's border, where its outermost values fade.
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * masks.shape[-1])
    low = (boxes[:, :2] - reach).floor().clamp(min=0).long().tolist()
    high = (boxes[:, 2:] + reach).ceil().long().tolist()
    for n, (box, (left, top), (right, bottom)) in enumerate(zip(boxes.float(), low, high, strict=True)):
        x = torch.arange(left, min(W, right), device=box.device) + 0.5
        y = torch.arange(top, min(H, bottom), device=box.device) + 0.5
        if not len(x) or not len(y):
            continue
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        sampled = F.grid_sample(masks[n : n + 1].float(), grid[None], align_corners=False)
        yield n, slice(top, top + len(y)), slice(left, left + len(x)), sampled[0, 0]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks of boxes into an image.

    Args:
        masks: Probabilities, ``(n, 1, side, side)``.
        boxes: Boxes, ``(n, 4)`` in pixels.
        size: Height and width of the image.

    Returns:
        Probabilities, ``(n, 1, H, W)``: four bytes for each object and pixel.
    """
    pasted = masks.new_zeros(len(masks), 1, *size)
    for n, rows, columns, probabilities in iterate_pasted_regions(masks, boxes, size):
        pasted[n, 0, rows, columns] = probabilities
    return pasted


def paste_binary_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks of boxes into an image and binarize them.

    Args:
        masks: Probabilities, ``(n, 1, side, side)``.
        boxes: Boxes, ``(n, 4)`` in pixels.
        size: Height and width of the image.

    Returns:
        1 where the probability is above one half, else 0, uint8, ``(n, H, W)``.
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.uint8, device=masks.device)
    for n, rows, columns, probabilities in iterate_pasted_regions(masks, boxes, size):
        pasted[n, rows, columns] = probabilities > 0.5
    return pasted
