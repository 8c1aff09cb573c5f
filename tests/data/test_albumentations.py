"""Tests for Albumentations pipelines as training augmentation."""

import numpy as np
import pytest
import torch
from label_formats import write_coco
from PIL import Image
from spectral_images import write_segmentation
from torchvision.transforms import v2

from crossformer_vision import ClassificationData, DetectionData, SegmentationData, UserError

A = pytest.importorskip("albumentations")
MIRROR = A.HorizontalFlip(p=1)


def test_classification(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[:, :16] = 255
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    options = {"num_workers": 0, "image_size": 32, "batch_size": 2}
    mirrored = ClassificationData(root=str(tmp_path), augmentation=A.Compose([MIRROR]), **options)
    images, _ = next(iter(mirrored.train_dataloader()))
    assert (images[..., 31] > images[..., 0]).all()
    noisy = [
        next(
            iter(
                ClassificationData(
                    root=str(tmp_path), augmentation=[A.GaussNoise(p=1)], **options
                ).train_dataloader()
            )
        )
        for _ in range(2)
    ]
    assert torch.equal(noisy[0][0], noisy[1][0]) and not torch.equal(noisy[0][0], images)
    with pytest.raises(UserError, match="mixes Albumentations"):
        next(
            iter(
                ClassificationData(
                    root=str(tmp_path), augmentation=[MIRROR, v2.Identity()]
                ).train_dataloader()
            )
        )


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_detection(detector, tmp_path):
    write_coco(tmp_path)
    options = {"num_workers": 0, "batch_size": 2, "min_size": 64, "detector": detector}
    plain = DetectionData(root=str(tmp_path), augmentation=v2.Identity(), **options)
    mirrored = DetectionData(root=str(tmp_path), augmentation=A.Compose([MIRROR]), **options)
    for (images, targets), (others, other_targets) in zip(
        plain.train_dataloader(), mirrored.train_dataloader()
    ):
        torch.testing.assert_close(images[0].flip(2), others[0])
        x1, y1, x2, y2 = targets[0]["boxes"].unbind(1)
        torch.testing.assert_close(other_targets[0]["boxes"], torch.stack([64 - x2, y1, 64 - x1, y2], 1))
        assert torch.equal(targets[0]["labels"], other_targets[0]["labels"])
        if detector == "mask_rcnn":
            assert torch.equal(targets[0]["masks"].flip(2), other_targets[0]["masks"])
    cropped = DetectionData(root=str(tmp_path), augmentation=[A.RandomCrop(32, 32, p=1)], **options)
    for images, targets in cropped.train_dataloader():
        assert images[0].shape == (3, 32, 32)
        assert len(targets[0]["boxes"]) == len(targets[0]["labels"]) and targets[0]["boxes"].le(32).all()


def test_segmentation_of_four_channels(tmp_path):
    root = write_segmentation(tmp_path)
    options = {"num_workers": 0, "crop_size": 48, "batch_size": 2}
    plain = SegmentationData(root=str(root), augmentation=v2.Identity(), **options)
    mirrored = SegmentationData(root=str(root), augmentation=[MIRROR], **options)
    (images, maps), (others, other_maps) = (next(iter(d.train_dataloader())) for d in (plain, mirrored))
    torch.testing.assert_close(images[:, :, :40].flip(3), others[:, :, :40])
    assert torch.equal(maps[:, :40].flip(2), other_maps[:, :40])
