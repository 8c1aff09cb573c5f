"""Apply segmenters with sliding windows, scales and flips."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crossformer_vision.models.dense.segmenters import resize

Net = Callable[[Tensor], Tensor]
"""Function from normalized images ``(B, C, H, W)`` to logits ``(B, num_classes, H, W)``."""
MAX_WHOLE_PIXELS = 2048 * 2048  # largest image that is segmented without windows
LARGE_WINDOW = 1024  # side of the windows for larger images


def sliding_window(net: Net, images: Tensor, window: int, stride: int) -> Tensor:
    """Mean logits of overlapping windows.

    Args:
        net: Network.
        images: Shape ``(B, C, H, W)``.
        window: Side of the square windows in pixels.
        stride: Distance between windows. The last ones end at the edge of the image.

    Returns:
        Logits, shape ``(B, num_classes, H, W)``.

    Raises:
        ValueError: If the stride is larger than a window.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} of windows of {window} pixels: must be from 1 to {window}")
    size = images.shape[2:]
    images = pad_to_window(net, images, window)
    H, W = images.shape[2:]
    if max(H, W) <= window:
        return net(images)[..., : size[0], : size[1]]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, H, W)
    for y in window_starts(H, window, stride):
        for x in window_starts(W, window, stride):
            area = (..., slice(y, y + window), slice(x, x + window))
            logits = net(images[area])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], H, W)
            total[area] += logits
            count[area] += 1
    assert total is not None
    return total.div_(count)[..., : size[0], : size[1]]


def pad_to_window(net: Net, images: Tensor, window: int) -> Tensor:
    """Pad images to at least the window size, right and bottom, if the backbone has a fixed input size.

    Args:
        net: Segmenter.
        images: Images, ``(B, C, H, W)``.
        window: Side of the window.
    """
    missing = (0, max(0, window - images.shape[3]), 0, max(0, window - images.shape[2]))
    return F.pad(images, missing) if getattr(net, "has_fixed_size", False) and any(missing) else images


def class_map_in_windows(net: Net, images: Tensor, window: int, stride: int) -> Tensor:
    """Class map by overlapping windows, as from ``sliding_window`` and ``class_map``.

    Only one row of windows is in memory at a time.

    Args:
        net: Network.
        images: Shape ``(B, C, H, W)``, larger than a window.
        window: Side of the square windows in pixels.
        stride: Distance between windows.

    Returns:
        Class indices, shape ``(B, H, W)``.
    """
    size = images.shape[2:]
    images = pad_to_window(net, images, window)
    H, W = images.shape[2:]
    rows = window_starts(H, window, stride)
    class_maps, band = [], None
    count = images.new_zeros(1, 1, min(window, H), W)
    for y, next_y in zip(rows, [*rows[1:], H], strict=True):
        for x in window_starts(W, window, stride):
            logits = net(images[..., y : y + window, x : x + window]).float()
            if band is None:
                band = logits.new_zeros(*logits.shape[:3], W)
            band[..., x : x + window] += logits
            count[..., x : x + window] += 1
            del logits
        assert band is not None
        done, kept = next_y - y, band.shape[2] - (next_y - y)
        best = band[:, :, :done]
        class_maps.append(class_map(best.div_(count[:, :, :done])))
        for channel in range(band.shape[1]):  # a copy of all channels would double the memory
            band[:, channel, :kept] = band[:, channel, done:].clone()
        band[:, :, kept:] = 0
        count[:, :, :kept] = count[:, :, done:].clone()
        count[:, :, kept:] = 0
    return torch.cat(class_maps, dim=1)[:, : size[0], : size[1]]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows along one side. The last window ends at the end of the side.

    Args:
        length: Length of the side.
        window: Side of a window.
        stride: Distance between windows.
    """
    last = max(0, length - window)
    return [min(start, last) for start in range(0, last + stride, stride)]


def segment(
    net: Net,
    views: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Class probabilities, averaged over scales and flips.

    Args:
        net: Network.
        views: The same images at each scale, shape ``(B, C, h, w)``.
        size: Height and width of the result. ``None`` for those of the first view.
        flip: Also average with mirrored views.
        window: Side of sliding windows in pixels. ``None`` for whole images of up to ``MAX_WHOLE_PIXELS``
            pixels and windows of ``LARGE_WINDOW`` beyond.
        stride: Stride of the windows. ``None`` for two thirds of ``window``, as published.

    Returns:
        Probabilities, shape ``(B, num_classes, *size)``. May overwrite the logits of the network.
    """
    size = size or (views[0].shape[2], views[0].shape[3])
    total: Tensor | None = None
    for images in views:
        for is_mirrored in [False, True] if flip else [False]:
            view = images.flip(3) if is_mirrored else images
            logits = view_logits(net, view, size, window, stride)
            probabilities = softmax_(logits.flip(3) if is_mirrored else logits)
            if total is None:
                total = probabilities
            else:  # in place, unless autograd needs the sum
                total = total + probabilities if probabilities.requires_grad else total.add_(probabilities)
    assert total is not None
    count = len(views) * (1 + flip)
    return total if count == 1 else total.div_(count)


def predict_class_map(
    net: Net,
    views: Sequence[Tensor],
    size: tuple[int, int],
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Class map of images.

    Args:
        net: Segmenter.
        views: Images at several scales, ``(B, C, H, W)`` each.
        size: Height and width of the result.
        flip: Average with the prediction of the flipped image.
        window: Side of sliding windows, ``None`` for whole images.
        stride: Distance between windows, ``None`` for two thirds of a window.

    Returns:
        Class indices, shape ``(B, *size)``.
    """
    images = views[0]
    side = window_side(images, window)
    is_plain = len(views) == 1 and not flip and (images.shape[2], images.shape[3]) == size
    if is_plain and side and max(size) > side:
        return class_map_in_windows(net, images, side, stride or 2 * side // 3)
    if len(views) == 1 and not flip:  # softmax does not change the best class
        return class_map(view_logits(net, images, size, window, stride))
    return class_map(segment(net, views, size, flip, window, stride))


def window_side(images: Tensor, window: int | None) -> int | None:
    """Side of the windows: as given, or ``LARGE_WINDOW`` for large images, or ``None`` for whole images."""
    return window or (LARGE_WINDOW if images.shape[2] * images.shape[3] > MAX_WHOLE_PIXELS else None)


def view_logits(
    net: Net, images: Tensor, size: tuple[int, int], window: int | None, stride: int | None
) -> Tensor:
    """Logits of one view in float32, shape ``(B, num_classes, *size)``.

    Args:
        net: Segmenter.
        images: Images, ``(B, C, H, W)``.
        size: Height and width of the result.
        window: Side of sliding windows, or ``None``.
        stride: Distance between windows, or ``None``.
    """
    side = window_side(images, window)
    logits = sliding_window(net, images, side, stride or 2 * side // 3) if side else net(images)
    logits = logits.float()
    return logits if logits.shape[2:] == size else resize(logits, size)


# Logits of a large photo take hundreds of MB. The functions below do not copy them, and work on strips of
# rows that stay in the CPU cache.


def strips(x: Tensor, channels: int) -> Iterator[slice]:
    """Strips of rows of a map ``(B, C, H, W)`` with a number of channels: 1 MB on CPUs, else 256 MB."""
    values = 1 << (18 if x.device.type == "cpu" else 26)
    step = max(1, values // max(1, x.shape[0] * channels * x.shape[3]))
    return (slice(y, y + step) for y in range(0, x.shape[2], step))


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the classes of logits ``(B, num_classes, H, W)``, in place unless autograd needs them."""
    if logits.requires_grad:
        return logits.softmax(1)
    for rows in strips(logits, logits.shape[1]):
        logits[:, :, rows] = logits[:, :, rows].softmax(1)
    return logits


def class_map(scores: Tensor) -> Tensor:
    """Class with the highest score of each pixel; the first one if scores are equal.

    On CPUs, classes are compared one by one in strips of rows, which is faster than ``argmax``.

    Args:
        scores: Shape ``(B, num_classes, H, W)``.

    Returns:
        Class indices, shape ``(B, H, W)``.
    """
    if scores.device.type != "cpu":
        return scores.argmax(1)
    indices = torch.zeros(scores.shape[0], *scores.shape[2:], dtype=torch.int64)
    for rows in strips(scores, 1):
        best = scores[:, 0, rows].clone()
        for k in range(1, scores.shape[1]):
            one = scores[:, k, rows]
            indices[:, rows].masked_fill_(one > best, k)
            torch.maximum(best, one, out=best)
    return indices


def log_prob_at(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each pixel's label.

    Args:
        logits: Shape ``(B, num_classes, H, W)``.
        labels: Class indices, shape ``(B, H, W)``.

    Returns:
        Shape ``(B, H, W)``.
    """
    result = logits.gather(1, labels[:, None])[:, 0]
    for rows in strips(logits, logits.shape[1]):
        result[:, rows] -= logits[:, :, rows].logsumexp(1)
    return result
