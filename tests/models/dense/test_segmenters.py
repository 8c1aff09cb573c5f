"""Segmenters: published outputs, any image size, sliding windows, scales and flips."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARITY
from parity.formula import formula_images, formula_state_dict

from crossformer_vision import UserError, create_segmenter, load_checkpoint
from crossformer_vision.models.dense import windows
from crossformer_vision.models.dense.segmenters import SemanticFPN
from crossformer_vision.models.dense.windows import segment, sliding_window

KEYS = json.loads((PARITY / "dense_model_keys.json").read_text())
RECORDS = {  # outputs of the 2023 and the 2021 code
    "region": np.load(PARITY / "dense_model_outputs.npz"),
    "map": np.load(PARITY / "dense_model_outputs_2021.npz"),
}


def compare(span: str, name: str, value: torch.Tensor, every: int = 7) -> None:
    expected = RECORDS[span][name]
    assert np.abs(value.flatten()[::every].numpy() - expected).max() < 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("span", RECORDS)
@pytest.mark.parametrize("name", ["semantic_fpn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_segmenter_matches_published_outputs(name, span, tmp_path):
    file = tmp_path / "published.pth"
    torch.save({"state_dict": formula_state_dict(KEYS[f"{name}_small"]), "meta": {}}, file)
    net = create_segmenter(name, "crossformer_small", backbone_args={"lda_span": span}).eval()
    report = load_checkpoint(net, file)
    assert not report.missing and not report.unused and not report.dropped
    images = formula_images(1, 256, 320)
    with torch.no_grad():
        maps = list(net.backbone(images).values()) if name == "semantic_fpn" else net.backbone(images)
        logits = net.head(maps)
        compare(span, f"{name}_small.upsampled", net(images), every=101)
        if span == "region":
            assert list(logits.shape) == RECORDS[span][f"{name}_small.logits.shape"].tolist()
            compare(span, f"{name}_small.logits", logits)
        if name == "upernet":
            main, auxiliary = net.forward_auxiliary(images)
            assert main.shape == auxiliary.shape == (1, 150, 256, 320)
            assert torch.equal(main, net(images))
            if span == "region":
                compare(span, "upernet_small.auxiliary_logits", net.auxiliary_head(maps[2]))
            else:
                compare(span, "upernet_small.auxiliary_upsampled", auxiliary, every=101)


@pytest.mark.parametrize(
    "name, backbone, millions",
    [
        ("semantic_fpn", "crossformer_small", 34.3),
        ("semantic_fpn", "crossformer_base", 55.6),
        ("semantic_fpn", "crossformer_large", 95.4),
        ("upernet", "crossformer_small", 62.3),
        ("upernet", "crossformer_base", 83.6),
        ("upernet", "crossformer_large", 125.5),
    ],
)
def test_published_parameter_counts(name, backbone, millions):
    with torch.device("meta"):
        net = create_segmenter(name, backbone)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    "backbone", ["crossformer_nano", "resnet18", "swin_tiny_patch4_window7_224", "pvt_v2_b0"]
)
@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_any_timm_backbone_trains_at_odd_sizes(name, backbone):
    torch.manual_seed(0)
    net = create_segmenter(name, backbone, num_classes=3, width=16).train()
    images = torch.randn(2, 3, 75, 98)
    outputs = net.forward_auxiliary(images) if name == "upernet" else (net(images),)
    for logits in outputs:
        assert logits.shape == (2, 3, 75, 98)
    sum(logits.square().mean() for logits in outputs).backward()
    for key, parameter in net.named_parameters():
        if "backbone.norm" not in key and "backbone.body.norm" not in key:  # final norm of Swin is unused
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    net.eval()
    with torch.no_grad():
        for size in ((64, 64), (33, 130)):
            assert net(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_backbone_checkpoint_keeps_heads_and_mismatch_raises(tmp_path):
    net = create_segmenter("upernet", "crossformer_tiny", num_classes=3, width=16)
    backbone = {
        k.removeprefix("backbone."): v
        for k, v in formula_state_dict(KEYS["upernet_small"]).items()
        if k.startswith("backbone.")
    }
    torch.save({"model": backbone}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth: belongs to another model"):
        load_checkpoint(net, tmp_path / "small.pth")
    small = create_segmenter("upernet", "crossformer_small", num_classes=3, width=16)
    before = small.head.conv_seg.weight.clone()
    report = load_checkpoint(small, tmp_path / "small.pth")
    assert all(name.startswith(("head.", "auxiliary_head.")) for name in report.missing)
    assert torch.equal(small.head.conv_seg.weight, before)


def test_other_class_count_drops_only_classifier(tmp_path):
    file = tmp_path / "published.pth"
    torch.save({"state_dict": formula_state_dict(KEYS["semantic_fpn_small"])}, file)
    net = create_segmenter("semantic_fpn", "crossformer_small", num_classes=11)
    report = load_checkpoint(net, file)
    assert report.dropped == ["head.conv_seg.weight", "head.conv_seg.bias"] and not report.unused


def test_unknown_names_raise():
    with pytest.raises(ValueError, match=r"unknown segmenter 'fcn'. Choose from semantic_fpn, upernet"):
        create_segmenter("fcn")
    with pytest.raises(ValueError, match="unknown model 'crossformer_smal'"):
        create_segmenter("upernet", "crossformer_smal")
    with pytest.raises(ValueError, match="One of 8, 16 or 32 is needed"):
        create_segmenter("upernet", "vit_small_patch14_dinov2")


def pixelwise(images):
    """Logits that depend on each pixel alone, so sliding windows must not change them."""
    return torch.cat([images, images.square()], dim=1)


@pytest.mark.parametrize("window, stride", [(16, 10), (16, 16), (7, 3), (40, 40), (64, 5)])
def test_sliding_window_averages_overlaps(window, stride):
    images = torch.randn(2, 3, 33, 40)
    assert torch.allclose(sliding_window(pixelwise, images, window, stride), pixelwise(images), atol=1e-6)


def test_window_larger_than_image_uses_whole_image():
    torch.manual_seed(0)
    net = create_segmenter("semantic_fpn", "crossformer_nano", num_classes=3, width=16).eval()
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(sliding_window(net, images, 80, 50), net(images))
        assert torch.equal(segment(net, [images], window=80), net(images).softmax(1))
        inside = sliding_window(net, images, 64, 16)  # logits of two overlapping windows
    expected = torch.zeros(1, 3, 64, 80)
    with torch.no_grad():
        expected[..., :64] += net(images[..., :64])
        expected[..., 16:] += net(images[..., 16:])
    expected[..., 16:64] /= 2
    assert torch.allclose(inside, expected, atol=1e-6)


@pytest.mark.parametrize("stride", [0, 17])
def test_stride_that_skips_pixels_raises(stride):
    with pytest.raises(ValueError, match=f"stride {stride} of windows of 16 pixels: must be from 1 to 16"):
        sliding_window(pixelwise, torch.zeros(1, 3, 32, 32), 16, stride)


def test_scales_and_flips_are_reversed_and_averaged():
    images = torch.randn(1, 3, 32, 48)

    def places(x):  # position-dependent logits reveal a flip that is not reversed
        columns = torch.linspace(-2, 2, x.shape[3]).expand(1, 1, x.shape[2], -1)
        return torch.cat([x[:, :1] * columns, x[:, 1:2], x[:, 2:]], dim=1)

    plain, mirrored = places(images).softmax(1), places(images.flip(3)).flip(3).softmax(1)
    assert torch.allclose(segment(places, [images], flip=True), (plain + mirrored) / 2, atol=1e-6)
    assert not torch.allclose(plain, mirrored, atol=1e-2)

    views = [torch.randn(1, 3, 16, 24), images, torch.randn(1, 3, 56, 84)]

    def at_first_size(view):
        return torch.nn.functional.interpolate(places(view), size=(32, 48), mode="bilinear").softmax(1)

    expected = sum(map(at_first_size, views)) / 3
    assert torch.allclose(segment(places, views, size=(32, 48)), expected, atol=1e-6)


@pytest.mark.parametrize("classes, width", [(3, 17), (150, 40), (1, 5)])
def test_class_map_and_log_prob_match_torch(classes, width):
    """Processing in strips matches torch when the last strip is partial."""
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 300, width)
    labels = torch.randint(0, classes, (2, 300, width))
    assert torch.equal(windows.class_map(logits), logits.argmax(1))
    assert torch.equal(
        windows.class_map(logits.round()), logits.round().max(1).indices
    )  # ties resolve to the first class
    expected = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(windows.log_prob_at(logits, labels), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(windows.softmax_(logits.clone()), logits.softmax(1))
    held = logits.clone().requires_grad_()
    windows.softmax_(held * 1).square().sum().backward()
    assert held.grad.abs().sum() > 0 or classes == 1


def test_large_images_use_sliding_windows(monkeypatch):
    monkeypatch.setattr(windows, "MAX_WHOLE_PIXELS", 40 * 50)
    monkeypatch.setattr(windows, "LARGE_WINDOW", 24)
    sides = []

    def net(x):
        sides.append(tuple(x.shape[2:]))
        return x.clone()

    small, large = torch.randn(1, 3, 40, 50), torch.randn(1, 3, 40, 52)
    for images, whole in ((small, True), (large, False)):
        sides.clear()
        torch.testing.assert_close(segment(net, [images]), images.softmax(1))
        assert set(sides) == ({(40, 50)} if whole else {(24, 24)})
    sides.clear()
    segment(net, [large], window=52)
    assert sides == [(40, 52)]


class Ruler(torch.nn.Module):
    """A backbone whose feature maps hold the x coordinate of each cell center, in image pixels."""

    def __init__(self):
        super().__init__()
        self.feature_info = SimpleNamespace(reduction=lambda: [4, 8, 16, 32], channels=lambda: [1] * 4)

    def forward(self, images):
        H, W = images.shape[2:]
        columns = [(torch.arange(-(-W // s)) + 0.5) * s for s in (4, 8, 16, 32)]
        return [c.expand(1, 1, -(-H // s), len(c)) for c, s in zip(columns, (4, 8, 16, 32))]


@pytest.mark.parametrize("width", [256, 260, 288, 292])
def test_maps_align_with_image_at_any_size(width):
    net = SemanticFPN(Ruler(), num_classes=1, width=2).eval()
    for module in net.modules():  # every layer passes its first channel through unchanged
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)
            module.weight.data[0, 0, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        seen = (
            net(torch.zeros(1, 3, 64, width))[0, 0, 32] / 10
        )  # weights of the pyramid levels: 1, 2, 3 and 4
    assert abs((seen - torch.arange(width) - 0.5)[width // 2 : width - 40].mean()) < 0.5


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_segmentation_classifier_uses_xavier_init(name):
    """The default PyTorch initialization lowers mIoU after a short run with Muon."""
    net = create_segmenter(name, "crossformer_nano", num_classes=11, width=64)
    layers = [layer for key, layer in net.named_modules() if key.endswith("conv_seg")]
    assert len(layers) == (2 if name == "upernet" else 1)
    for layer in layers:
        bound = (6 / (11 + layer.in_channels)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_gradients_through_scales_and_flips():
    net = torch.nn.Conv2d(3, 4, 1)
    views = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 12, 12)]
    found = segment(net, views, flip=True)
    found[:, 0].sum().backward()
    assert net.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(segment(net, views, flip=True), found, atol=1e-6)


@pytest.mark.parametrize("size", [(100, 70), (64, 130), (97, 97), (40, 90)])
@pytest.mark.parametrize("stride", [32, 48, 64])
def test_class_map_in_windows_matches_sliding_window(size, stride):
    """Row-by-row class maps equal those of all windows together, including borders and overlaps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 9, padding=4), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = windows.sliding_window(net, images, 64, stride).argmax(1)
        assert torch.equal(windows.class_map_in_windows(net, images, 64, stride), expected)
        predicted = windows.predict_class_map(net, [images], size, window=64, stride=stride)
        assert torch.equal(predicted, expected)


@pytest.mark.parametrize("size", [(96, 96), (150, 200), (40, 60), (30, 120), (96, 50)])
def test_window_larger_than_image_with_fixed_size_backbone(size):
    net = create_segmenter(
        "semantic_fpn", "maxvit_pico_rw_256", 3, width=16, backbone_args={"img_size": 96}
    ).eval()
    with torch.no_grad():
        found = windows.segment(net, [torch.randn(1, 3, *size)], window=96)
        assert found.shape == (1, 3, *size)
        assert windows.predict_class_map(net, [torch.randn(1, 3, *size)], size, window=96).shape == (
            1,
            *size,
        )
