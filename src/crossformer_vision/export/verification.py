"""Compare an exported graph with the original PyTorch model."""

import torch
from torch import Tensor, nn

from crossformer_vision.export.formats import Call
from crossformer_vision.models.dense.masks import paste_masks
from crossformer_vision.models.dense.transform import DetectorTransform
from crossformer_vision.models.grouping import ceil_div

BATCH_SIZES = (1, 3)
PATCH = 24  # side of the colored patches in test images, in pixels


def random_images(batch_size: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Images of colored patches and noise, in which detectors find objects.

    Args:
        batch_size: Number of images, which is also the seed.
        channels: Number of channels.
        size: Height and width.

    Returns:
        Values in 0..1, shape ``(batch_size, channels, *size)``.
    """
    generator = torch.Generator().manual_seed(batch_size)
    rows, columns = ceil_div(size[0], PATCH), ceil_div(size[1], PATCH)
    patches = torch.rand(batch_size, channels, rows, columns, generator=generator)
    patches = nn.functional.interpolate(patches, size=size, mode="nearest")
    return (patches + 0.1 * torch.randn(patches.shape, generator=generator)).clamp(0, 1)


def difference(net: nn.Module, call: Call, channels: int, size: tuple[int, int]) -> tuple[float, int]:
    """Largest difference of outputs relative to the largest output, for batches of one and three images.

    Args:
        net: The PyTorch model.
        call: The exported graph.
        channels: Number of channels of the images.
        size: Height and width of the images.

    Returns:
        The difference, and 0 for the number of compared objects.
    """
    largest = 0.0
    for batch_size in BATCH_SIZES:
        images = 4 * random_images(batch_size, channels, size) - 2
        with torch.no_grad():
            expected = net(images)
        expected = [expected] if isinstance(expected, Tensor) else expected
        for actual, output in zip(call(images), expected, strict=True):
            if actual.shape != output.shape or not torch.isfinite(actual).all():
                return float("inf"), 0
            relative = (actual - output).abs().max() / output.abs().max().clamp(min=1e-9)
            largest = max(largest, float(relative))
    return largest, 0


def different_objects(net: nn.Module, call: Call, channels: int, size: tuple[int, int]) -> tuple[float, int]:
    """Share of a detector's objects that the graph does not find, for batches of one and three images.

    Objects are equal if they have the same label, borders within half a pixel, scores within 0.001 and the
    same mask.

    Args:
        net: The PyTorch detector.
        call: The exported graph.
        channels: Number of channels of the images.
        size: Height and width of the images, which are not resized.

    Returns:
        The share, and the number of objects.
    """
    transform = net.transform
    assert isinstance(transform, DetectorTransform)
    transform.min_size, transform.max_size = (min(size),), max(size)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (transform.image_mean, transform.image_std))
    missing = total = 0
    for batch_size in BATCH_SIZES:
        images = random_images(batch_size, channels, size)
        if channels != 3:  # other values than 0..1
            images = mean + std * (4 * images - 2)
        with torch.no_grad():
            expected = net(list(images))
        boxes, labels, scores, *masks = call((images - mean) / std)
        for n, objects in enumerate(expected):
            is_equal = (objects["boxes"][:, None] - boxes[n]).abs().amax(2) <= 0.5
            is_equal &= objects["labels"][:, None] == labels[n]
            is_equal &= (objects["scores"][:, None] - scores[n]).abs() <= 1e-3
            is_found = is_equal.any(1)
            if masks:
                matches = masks[0][n][is_equal.int().argmax(1)][:, None]
                pasted = paste_masks(matches, objects["boxes"], size)
                is_other = (pasted - objects["masks"]).abs() > 0.02
                is_found &= is_other.flatten(1).float().mean(1) < 1e-3
            missing += int((~is_found).sum()) + abs(int((scores[n] > 0).sum()) - len(is_found))
            total += len(is_found)
    return missing / max(1, total), total


def worst_difference(differences: dict[str, float], counts: dict[str, int]) -> float:
    """Largest difference of all sizes; for detectors the share of all objects.

    Args:
        differences: Difference, or share of objects, by size.
        counts: Number of compared objects by size, 0 for other models than detectors.
    """
    if total := sum(counts.values()):
        return sum(differences[size] * max(1, counts[size]) for size in counts) / total
    return max(differences.values())
