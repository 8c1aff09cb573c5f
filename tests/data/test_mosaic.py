"""Tests for mosaics of four images."""

import numpy as np
import torch
from label_formats import write_coco
from PIL import Image

from crossformer_vision import DetectionData
from crossformer_vision.data.mosaic import GRAY, create_mosaic


def sample(color, size, box):
    mask = np.zeros((1, size[1], size[0]), np.uint8)
    mask[0, box[1] : box[3], box[0] : box[2]] = 1
    target = {
        "image_id": 7,
        "boxes": np.array([box], np.float32),
        "labels": np.array([1]),
        "iscrowd": np.array([0]),
        "area": np.array([100.0], np.float32),
        "masks": mask,
    }
    return Image.new("RGB", size, color), target


def test_images_meet_in_the_middle_and_objects_follow():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    sizes = [(40, 20), (20, 20), (80, 40), (10, 40)]
    samples = [sample(color, size, (0, 0, 10, 10)) for color, size in zip(colors, sizes)]
    image, target = create_mosaic(samples)
    assert image.size == (80, 80) and target["image_id"] == 7
    for dx, dy, color in ((-1, -1, 0), (1, -1, 1), (-1, 1, 2), (1, 1, 3)):
        assert image.getpixel((40 + min(dx, 0), 40 + min(dy, 0))) == colors[color]
    assert image.getpixel((0, 0)) == GRAY
    expected = [[0, 20, 10, 30], [40, 0, 60, 20], [0, 40, 5, 45], [40, 40, 50, 50]]
    np.testing.assert_allclose(target["boxes"], expected)
    np.testing.assert_allclose(target["area"], [100, 400, 25, 100])
    for mask, (x1, y1, x2, y2) in zip(target["masks"], np.array(expected), strict=True):
        assert mask.shape == (80, 80) and mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)


def test_mosaics_are_reproducible_and_optional(tmp_path):
    write_coco(tmp_path)
    options = {"num_workers": 0, "batch_size": 2, "min_size": 64, "detector": "mask_rcnn"}

    def batches(mosaic):
        data = DetectionData(root=str(tmp_path), mosaic=mosaic, **options)
        return list(data.train_dataloader())

    first, second, plain = batches(1.0), batches(1.0), batches(0.0)
    count = sum(len(target["boxes"]) for _, targets in first for target in targets)
    assert count > 2 * sum(len(target["boxes"]) for _, targets in plain for target in targets)
    for (images, targets), (others, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images[0], others[0])
        assert torch.equal(targets[0]["masks"], other_targets[0]["masks"])
        boxes, masks = targets[0]["boxes"], targets[0]["masks"]
        assert len(boxes) == len(masks) and masks.shape[1:] == images[0].shape[1:]
