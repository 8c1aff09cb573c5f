"""Tests for padding at the boundary of fields."""

import pytest
import timm
import torch
from torch import nn

from crossformer_vision import create_segmenter
from crossformer_vision.models.padding import BoundaryPadding, crop, pad


def test_sphere_continues_on_the_other_side_of_the_pole():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    padded = pad(x, "sphere", (2, 1, 1, 2))[0, 0]
    assert padded.shape == (7, 9)
    torch.testing.assert_close(padded[1, 1:7], x[0, 0, 0].roll(3))
    torch.testing.assert_close(padded[0, 1:7], x[0, 0, 1].roll(3))
    torch.testing.assert_close(padded[6, 1:7], x[0, 0, 3].roll(3))
    torch.testing.assert_close(padded[2:6, 0], x[0, 0, :, 5])
    torch.testing.assert_close(padded[2:6, 7:], x[0, 0, :, :2])
    assert padded[1, 0] == padded[1, 6]  # corners are periodic, too


@pytest.mark.parametrize("mode", ["circular", "mirror", "reflect", "sphere"])
def test_padding_of_any_size_is_removed_and_differentiable(mode):
    x = torch.randn(2, 3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    sides = (3, 2, 1, 4)
    padded = pad(x, mode, sides)
    assert padded.shape == (2, 3, 5, 12, 14)
    torch.testing.assert_close(crop(padded, sides), x)
    if mode != "reflect":
        torch.testing.assert_close(padded[..., 3:10, 0], x[..., -1])
        torch.testing.assert_close(padded[..., 3:10, -4:], x[..., :4])
    if mode in ("mirror", "reflect"):
        torch.testing.assert_close(padded[..., 2, 1:10], x[..., 1, :])
    padded.sum().backward()
    assert x.grad.sum() == padded.numel()


def test_wrapped_networks_keep_the_size_of_their_outputs():
    images = torch.randn(1, 3, 64, 96)
    backbone = timm.create_model("crossformer_nano", features_only=True).eval()
    wrapped = BoundaryPadding(backbone, "sphere", 32, 32, 32, 32).eval()
    for output, plain in zip(wrapped(images), backbone(images), strict=True):
        assert output.shape == plain.shape and not torch.allclose(output, plain)
    segmenter = create_segmenter("semantic_fpn", "crossformer_nano", 3, width=16).eval()
    dense = BoundaryPadding(segmenter, "circular", left=32, right=32).eval()
    assert dense(images).shape == (1, 3, 64, 96)
    graph = torch.export.export(wrapped, (images,))
    torch.testing.assert_close(graph.module()(images)[0], wrapped(images)[0], rtol=1e-4, atol=1e-4)


def test_circular_padding_makes_convolutions_equivariant():
    net = BoundaryPadding(nn.Conv2d(1, 2, 5, padding=2), "circular", left=2, right=2)
    x = torch.randn(1, 1, 9, 12)
    torch.testing.assert_close(net(x.roll(5, -1)), net(x).roll(5, -1))


def test_invalid_padding():
    with pytest.raises(ValueError, match="unknown padding 'globe'"):
        BoundaryPadding(nn.Identity(), "globe")
    with pytest.raises(ValueError, match="needs maps larger than 4x6"):
        pad(torch.zeros(1, 1, 4, 6), "sphere", (4, 0, 0, 0))
    with pytest.raises(ValueError, match="the stride 4, no divisor"):
        BoundaryPadding(nn.AvgPool2d(4), "circular", left=2, right=2)(torch.zeros(1, 1, 16, 16))
