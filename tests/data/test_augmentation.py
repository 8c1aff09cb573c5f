"""Tests for photometric distortion and custom augmentation.

Photometric distortion follows OpenMMLab: it works in HSV, without blending or channel shuffling.
"""

import colorsys

import pytest
import torch
from PIL import ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

from crossformer_vision import ClassificationData, DetectionData, SegmentationData
from crossformer_vision.data.augmentation import PhotometricDistortion, saturate


def pixels(n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, n, n), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_matches_hsv_reference(factor):
    x = pixels(8)
    changed = saturate(x, factor)
    for before, after in zip(x.flatten(1).t().tolist(), changed.flatten(1).t().tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in before))
        expected = [value * 255 for value in colorsys.hsv_to_rgb(h, min(1, s * factor), v)]
        assert after == pytest.approx(expected, abs=1)


def test_each_distortion_is_applied_independently():
    x = tv_tensors.Image(pixels())
    plain = x.as_subclass(torch.Tensor).float()
    none = dict.fromkeys(("brightness", "contrast", "saturation", "hue")) | {"contrast_first": True}
    step = PhotometricDistortion()
    assert torch.equal(step.transform(x, none), x)
    brighter = step.transform(x, none | {"brightness": 20.0})
    assert torch.equal(brighter.float(), (plain + 20).clamp(0, 255))
    assert torch.equal(step.transform(x, none | {"contrast": 0.5}).float(), (plain * 0.5).round())
    turned = step.transform(x, none | {"hue": 0.1}).float()
    assert not torch.equal(turned, plain)
    torch.testing.assert_close(turned.amax(0), plain.amax(0), atol=2, rtol=0)  # the HSV value is unchanged


def test_sampled_parameters_cover_their_ranges():
    torch.manual_seed(0)
    drawn = [PhotometricDistortion().make_params([]) for _ in range(400)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.1, 0.1),
    ):
        values = [one[name] for one in drawn if one[name] is not None]
        assert 160 < len(values) < 240
        assert (
            low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high
        )


def test_channel_order_and_class_maps_are_preserved():
    red = tv_tensors.Image(torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 6, 6))
    classes = tv_tensors.Mask(torch.arange(36).view(1, 6, 6))
    torch.manual_seed(0)
    for _ in range(50):
        image, same = PhotometricDistortion()(red, classes)
        assert image[0].float().mean() >= image[1:].float().mean() and torch.equal(same, classes)
        assert image.dtype == torch.uint8


def mirrored(image):
    return ImageOps.mirror(image)


def test_custom_classification_augmentation():
    """An identity callable or list, returning images or tensors, matches the built-in transform without augmentation."""
    digits = dict(train_images=8, val_images=8, batch_size=8, num_workers=0, image_size=32)
    plain, _ = next(iter(ClassificationData(**digits, crop="none", hflip=0.0).train_dataloader()))
    for own in (
        mirrored,
        [mirrored, v2.ToImage()],
        [ImageOps.flip, ImageOps.flip, mirrored, v2.PILToTensor(), lambda x: x.float() / 255],
    ):
        got, _ = next(iter(ClassificationData(**digits, augmentation=own).train_dataloader()))
        torch.testing.assert_close(got.flip(3), plain, atol=1e-4, rtol=1e-4)
    got, _ = next(iter(ClassificationData(**digits, augmentation=v2.RandomCrop(20)).train_dataloader()))
    assert got.shape == (8, 3, 32, 32)
    data = ClassificationData(**digits, augmentation=mirrored)
    assert not torch.allclose(next(iter(data.val_dataloader()))[0].flip(3), plain)  # applied only in training


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_custom_detection_augmentation(detector):
    """Boxes and masks follow the image, and objects outside a crop are removed."""
    digits = dict(train_images=6, val_images=2, batch_size=6, num_workers=0, image_size=96, detector=detector)
    ours = DetectionData(**digits, min_size=96, max_size=96, hflip=1.0)
    own = DetectionData(**digits, augmentation=[v2.RandomHorizontalFlip(1.0)])
    batches = [next(iter(data.train_dataloader())) for data in (ours, own)]
    for image, target, other, others in zip(*batches[0], *batches[1], strict=True):
        torch.testing.assert_close(image, other)
        assert target["labels"].equal(others["labels"])
        torch.testing.assert_close(target["boxes"], others["boxes"], atol=1.0, rtol=0)
    cropped = DetectionData(**digits, augmentation=v2.RandomCrop(40))
    images, targets = next(iter(cropped.train_dataloader()))
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 40, 40) and len(target["labels"]) == len(target["boxes"])
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        if detector == "mask_rcnn":
            assert target["masks"].flatten(1).any(1).all()


def test_custom_segmentation_augmentation():
    digits = dict(train_images=4, val_images=2, batch_size=4, num_workers=0, crop_size=64)
    ours = SegmentationData(**digits, scales=(1.0, 1.0), hflip=1.0, photometric=False)
    own = SegmentationData(**digits, augmentation=v2.RandomHorizontalFlip(1.0))
    for one, other in zip(*(next(iter(data.train_dataloader())) for data in (ours, own)), strict=True):
        torch.testing.assert_close(one, other)
    cropped = SegmentationData(**digits, augmentation=[v2.RandomCrop(50), v2.ColorJitter(0.3)])
    images, labels = next(iter(cropped.train_dataloader()))
    assert images.shape == (4, 3, 64, 64) and labels.shape == (4, 64, 64)
    assert (labels[:, 50:] == 255).all() and (labels[:, :50, :50] != 255).all()
