"""PVT matches the published code and implements the timm model API."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import PARITY
from parity.formula import formula_images, formula_state_dict
from timm.models import create_feature_extractor
from torch.utils.flop_counter import FlopCounterMode

from crossformer_vision import create_detector, create_segmenter, load_checkpoint

KEYS = json.loads((PARITY / "pvt_keys.json").read_text())
COUNTS = dict(zip(KEYS, (13_229_288, 24_485_864, 44_208_104, 61_369_320), strict=True))
GMACS = dict(zip(KEYS, (1.93, 3.82, 6.66, 9.81), strict=True))


def published(name, **kwargs):
    model = timm.create_model(name, **kwargs).eval()
    load_checkpoint(model, formula_state_dict(KEYS[name]))
    return model


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("pvt_medium", "pvt_large")]


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_small", *LARGE])
def test_pvt_matches_published_outputs(name):
    model = published(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    images = formula_images(2, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = model(images)
    assert np.abs(logits.numpy() - np.load(PARITY / "pvt_logits.npz")[name]).max() < 1e-4
    # Published MAC counts include all matrix products of attention.
    assert counter.get_total_flops() / 4e9 == pytest.approx(GMACS[name], abs=0.15)


def test_dense_models_have_no_class_token_or_norm():
    """The first three of the four feature maps equal those of the classifier, the last differs."""
    dense, classifier = published("pvt_tiny", features_only=True), published("pvt_tiny")
    assert not any("cls_token" in name or "head" in name for name, _ in dense.named_parameters())
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        maps = dense(images)
        others = classifier.forward_intermediates(images, intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 24, 40), (128, 12, 20), (320, 6, 10), (512, 3, 5)]
    for x, y in zip(maps[:3], others[:3], strict=True):
        torch.testing.assert_close(x, y)
    assert not torch.allclose(maps[3], others[3], atol=1e-3)


def test_position_embedding_resizing():
    """Bilinear resizing with half-pixel centers; the class token embedding is kept separate."""
    stage = timm.create_model("pvt_tiny").stages[3]
    wanted = F.interpolate(
        stage.pos_embed[:, 1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2), size=(5, 9), mode="bilinear"
    )
    torch.testing.assert_close(stage.positions(5, 9), wanted.permute(0, 2, 3, 1))
    assert stage.positions(7, 7).shape == (1, 7, 7, 512)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224), (101, 250)])
def test_any_size(size):
    model = timm.create_model("pvt_tiny", num_classes=5).train()
    model(torch.randn(2, 3, *size)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = timm.create_model("pvt_tiny", features_only=True)(torch.randn(1, 3, *size))
    assert [x.shape[2:] for x in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]


def test_timm_model_api():
    model = timm.create_model("pvt_tiny", num_classes=42).eval()
    assert model.pretrained_cfg.get("pool_size") is None  # `forward_features` returns tokens
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits, features = model(images), model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features), logits)
        final, maps = model.forward_intermediates(images, indices=2)
        torch.testing.assert_close(final, features)
        assert [tuple(x.shape) for x in maps] == [(2, 320, 4, 6), (2, 512, 2, 3)]
        torch.testing.assert_close(torch.jit.trace(model, images)(images), logits, atol=1e-5, rtol=1e-4)
        extractor = create_feature_extractor(model, return_nodes=["head"])
        torch.testing.assert_close(extractor(images)["head"], logits, atol=1e-5, rtol=1e-4)
        assert model(images[:0]).shape == (0, 42)
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), logits, atol=1e-5, rtol=1e-4)
    assert model.get_classifier().out_features == 42
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, 512)
    assert model.no_weight_decay() == {*(f"stages.{i}.pos_embed" for i in range(4)), "cls_token"}
    model.train().set_grad_checkpointing()
    before = torch.autograd.grad(model(images).sum(), model.cls_token)
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(before, torch.autograd.grad(model(images).sum(), model.cls_token))


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "semantic_fpn"])
def test_dense_models_train(kind):
    if kind == "semantic_fpn":
        net = create_segmenter(kind, "pvt_tiny", num_classes=3, width=16)
        loss = F.cross_entropy(net(torch.randn(2, 3, 70, 90)), torch.randint(0, 3, (2, 70, 90)))
    else:
        net = create_detector(kind, "pvt_tiny", num_classes=3, width=16, min_size=96, max_size=96).train()
        masks = torch.zeros(1, 96, 96, dtype=torch.uint8)
        masks[:, 20:60, 10:50] = 1
        boxes = torch.tensor([[10.0, 20, 50, 60]])
        losses = net([torch.rand(3, 96, 96)], [dict(boxes=boxes, labels=torch.tensor([2]), masks=masks)])
        loss = sum(losses.values())
    loss.backward()
    assert loss.isfinite() and net.body.model.stages[0].embed.proj.weight.grad.abs().sum() > 0


def test_published_classifier_loads_into_detector(tmp_path):
    torch.save(formula_state_dict(KEYS["pvt_tiny"]), tmp_path / "pvt_tiny.pth")
    net = create_detector("retinanet", "pvt_tiny", num_classes=3, width=16)
    report = load_checkpoint(net, tmp_path / "pvt_tiny.pth")
    assert {"cls_token", "norm.weight", "head.weight"} <= {n.split("model.")[-1] for n in report.unused}
    wanted = timm.create_model("pvt_tiny")
    load_checkpoint(wanted, tmp_path / "pvt_tiny.pth")
    for name, value in net.body.model.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name


def test_pooling_and_pruning():
    net = timm.create_model("pvt_tiny", num_classes=5, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="global_pool='max': must be one of 'token', 'avg', ''"):
        timm.create_model("pvt_tiny", global_pool="max")
    with pytest.raises(ValueError, match="global_pool='catavgmax'"):
        net.reset_classifier(3, "catavgmax")
    net.prune_intermediate_layers([1])
    net.reset_classifier(3, "avg")
    assert net.num_features == 128 and net(torch.randn(2, 3, 64, 64)).shape == (2, 3)
