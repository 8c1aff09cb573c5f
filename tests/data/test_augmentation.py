"""Photometric distortion, against what OpenMMLab's computes: in HSV, without blending or shuffled channels."""

import colorsys

import pytest
import torch
from torchvision import tv_tensors

from crossformer_vision.data.augmentation import PhotometricDistortion, saturate


def pixels(n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, n, n), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_is_that_of_hsv(factor):
    x = pixels(8)
    changed = saturate(x, factor)
    for before, after in zip(x.flatten(1).t().tolist(), changed.flatten(1).t().tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in before))
        expected = [value * 255 for value in colorsys.hsv_to_rgb(h, min(1, s * factor), v)]
        assert after == pytest.approx(expected, abs=1)


def test_each_change_is_of_its_range_and_alone():
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
    torch.testing.assert_close(turned.amax(0), plain.amax(0), atol=2, rtol=0)  # the value stays


def test_what_is_drawn():
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


def test_channels_keep_their_places_and_maps_are_left_alone():
    red = tv_tensors.Image(torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 6, 6))
    classes = tv_tensors.Mask(torch.arange(36).view(1, 6, 6))
    torch.manual_seed(0)
    for _ in range(50):
        image, same = PhotometricDistortion()(red, classes)
        assert image[0].float().mean() >= image[1:].float().mean() and torch.equal(same, classes)
        assert image.dtype == torch.uint8
