"""Detectors match the published implementations and follow the torchvision API."""

import json

import numpy as np
import pytest
import torch
from conftest import PARITY
from parity.formula import formula_images, formula_state_dict

from crossformer_vision import UserError, create_detector, load_checkpoint

KEYS = json.loads((PARITY / "dense_model_keys.json").read_text())
RECORDS = {  # outputs of the 2023 and the 2021 code
    "region": np.load(PARITY / "dense_model_outputs.npz"),
    "map": np.load(PARITY / "dense_model_outputs_2021.npz"),
}


def published(tmp_path, name: str, span: str) -> torch.nn.Module:
    """Build a detector with the formula weights, loaded from a checkpoint in the published format."""
    torch.save(
        {"state_dict": formula_state_dict(KEYS[f"{name}_small"]), "meta": {}}, tmp_path / "published.pth"
    )
    detector = create_detector(name, "crossformer_small", backbone_args={"lda_span": span}).eval()
    report = load_checkpoint(detector, tmp_path / "published.pth")
    assert not report.missing and not report.unused and not report.dropped
    return detector


def compare(span: str, name: str, value: torch.Tensor) -> None:
    assert list(value.shape) == RECORDS[span][f"{name}.shape"].tolist()
    expected = RECORDS[span][name]
    assert np.abs(value.flatten()[::7].numpy() - expected).max() < 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("span", RECORDS)
def test_retinanet_matches_published_outputs(span, tmp_path):
    detector = published(tmp_path, "retinanet", span)
    with torch.no_grad():
        maps = detector.backbone(formula_images(1, 256, 320))
        out = detector.head(list(maps.values()))
    start = 0
    for level, x in enumerate(maps.values()):
        H, W = x.shape[-2:]
        rows = slice(start, start := start + H * W * 9)
        for key, ours in (("class_logits", "cls_logits"), ("box_deltas", "bbox_regression")):
            values = out[ours][:, rows]  # (1, H * W * 9, k)
            values = values.reshape(1, H, W, -1).permute(0, 3, 1, 2)
            compare(span, f"retinanet_small.{key}.{level}", values)


@pytest.mark.parametrize("span", RECORDS)
def test_mask_rcnn_matches_published_outputs(span, tmp_path):
    detector = published(tmp_path, "mask_rcnn", span)
    heads = detector.roi_heads
    rois = [torch.from_numpy(RECORDS[span]["mask_rcnn_small.roi_boxes"])]
    with torch.no_grad():
        maps = detector.backbone(formula_images(1, 256, 320))
        objectness, deltas = detector.rpn.head(list(maps.values()))
        logits, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, rois, [(256, 320)])))
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, rois, [(256, 320)])))
    for level in range(5):
        compare(span, f"mask_rcnn_small.objectness.{level}", objectness[level])
        compare(span, f"mask_rcnn_small.rpn_deltas.{level}", deltas[level])
    compare(span, "mask_rcnn_small.roi_class_logits", logits.roll(-1, 1))  # OpenMMLab: background last
    compare(span, "mask_rcnn_small.roi_box_deltas", boxes[:, 4:])
    compare(span, "mask_rcnn_small.roi_mask_logits", masks[:, 1:])


@pytest.mark.parametrize(
    "name, backbone, millions",
    [
        ("retinanet", "crossformer_small", 40.8),
        ("retinanet", "crossformer_base", 62.1),
        ("mask_rcnn", "crossformer_small", 50.2),
        ("mask_rcnn", "crossformer_base", 71.5),
        ("mask_rcnn", "crossformer_pp_small", 43.0),
    ],
)
def test_published_parameter_counts(name, backbone, millions):
    with torch.device("meta"):
        detector = create_detector(name, backbone)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


SMALL = dict(num_classes=3, width=16, min_size=64, max_size=96)


def target(masks=True):
    objects = dict(
        boxes=torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 60.0, 30.0]]), labels=torch.tensor([3, 1])
    )
    if masks:
        objects["masks"] = torch.zeros(2, 64, 80, dtype=torch.uint8)
        objects["masks"][0, 8:50, 5:40] = objects["masks"][1, 10:30, 30:60] = 1
    return objects


@pytest.mark.parametrize(
    "backbone", ["crossformer_nano", "resnet18", "swin_tiny_patch4_window7_224", "pvt_v2_b0"]
)
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_any_timm_backbone_trains(name, backbone):
    torch.manual_seed(0)
    detector = create_detector(name, backbone, **SMALL).train()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    empty = {k: v[:0] for k, v in target().items()} | {"masks": torch.zeros(0, 70, 64, dtype=torch.uint8)}
    losses = detector(images, [target(), empty])
    sum(losses.values()).backward()
    unused = {"swin": ["backbone.body.norm"], "pvt": []}.get(backbone[:4], [])
    for key, parameter in detector.named_parameters():
        if not key.startswith(tuple(unused)):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    detector.eval()
    with torch.no_grad():
        found = detector(images)
        with torch.autocast("cpu", torch.bfloat16):
            low = detector(images)
    for result, image in zip(found, images, strict=True):
        assert result["boxes"].shape == (len(result["labels"]), 4) and len(result["scores"]) <= 100
        assert result["labels"].numel() == 0 or 1 <= result["labels"].min() <= result["labels"].max() <= 3
        if name == "mask_rcnn":
            assert result["masks"].shape == (len(result["labels"]), 1, *image.shape[1:])
    assert all(result["boxes"].dtype == torch.float32 for result in low)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_overfits_one_image(name):
    torch.manual_seed(0)
    detector = create_detector(name, "crossformer_nano", **SMALL).train()
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    image = torch.rand(3, 64, 80) * 0.2
    truth = target()
    image[:, 8:50, 5:40] = image[:1, 10:30, 30:60] = 0.9
    for _ in range(200):
        optimizer.zero_grad()
        sum(detector([image], [truth]).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        (found,) = detector.eval()([image])
    assert found["labels"][:2].tolist() == [3, 1] or found["labels"][:2].tolist() == [1, 3]
    order = found["labels"][:2].argsort(descending=True)
    assert (found["boxes"][:2][order] - truth["boxes"]).abs().max() < 6
    if name == "mask_rcnn":
        masks = found["masks"][:2, 0][order] > 0.5
        overlap = (masks & truth["masks"].bool()).sum((1, 2)) / (masks | truth["masks"].bool()).sum((1, 2))
        assert overlap.min() > 0.7


def test_outputs_are_independent_of_earlier_image_sizes():
    torch.manual_seed(0)
    detector = create_detector("retinanet", "crossformer_nano", score_thresh=0.0, **SMALL).eval()
    image = torch.rand(3, 64, 80)
    with torch.no_grad():
        before = detector([image])[0]
        for size in ((96, 64), (33, 90), (200, 64)):
            detector([torch.rand(3, *size)])
        after = detector([image])[0]
    assert len(before["boxes"]) and all(torch.equal(before[key], after[key]) for key in before)


def test_group_size_can_change_at_test_time():
    plain = create_detector("retinanet", "crossformer_nano", **SMALL)
    wide = create_detector(
        "retinanet", "crossformer_nano", backbone_args=dict(group_size=(8, 8, 4, 4)), **SMALL
    )
    wide.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        a, b = plain.backbone(image)["0"], wide.backbone(image)["0"]
    assert a.shape == b.shape and not torch.allclose(a, b)


@pytest.mark.parametrize(
    "channels, normalised", [(1, {}), (5, {"image_mean": [0.5] * 5, "image_std": [0.25] * 5})]
)
def test_other_input_channel_counts(channels, normalised):
    args = dict(num_classes=2, width=16, min_size=64, max_size=64, backbone_args={"in_chans": channels})
    net = create_detector("retinanet", "crossformer_nano", **args, **normalised).eval()
    (found,) = net([torch.rand(channels, 64, 64)])
    assert found["boxes"].shape[1] == 4 and len(net.transform.image_mean) == channels


def test_anchors_are_unrounded_multiples_of_the_stride():
    detector = create_detector("retinanet", "crossformer_nano", **SMALL)
    maps = [torch.zeros(1, 16, -(-100 // s), -(-100 // s)) for s in (8, 16, 32, 64, 128)]
    images = torch.zeros(1, 3, 100, 100)
    from torchvision.models.detection.image_list import ImageList

    (anchors,) = detector.anchor_generator(ImageList(images, [(100, 100)]), maps)
    assert len(anchors) == 9 * sum(x.shape[2] * x.shape[3] for x in maps)
    side = 32 * 2 ** (1 / 3)
    half = torch.tensor([side * 0.5**-0.5, side * 0.5**0.5]) / 2  # ratio 1/2: height is half the width
    torch.testing.assert_close(anchors[1], torch.cat([-half, half]))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert torch.allclose(centres[9], torch.tensor([8.0, 0.0]), atol=1e-5)
    p6 = 9 * sum(x.shape[2] ** 2 for x in maps[:3])
    assert torch.allclose(centres[p6 + 9], torch.tensor([64.0, 0.0]), atol=1e-5)  # 100 // 2 would give 50


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_backbone_checkpoint_loads_into_backbone(name, tmp_path, caplog):
    """A published classifier loads into the backbone, and missing weights are logged."""
    state = formula_state_dict(json.loads((PARITY / "classifier_keys.json").read_text())["crossformer_small"])
    torch.save({"model": state}, tmp_path / "crossformer-s.pth")
    detector = create_detector(name, "crossformer_small")
    report = load_checkpoint(detector, tmp_path / "crossformer-s.pth")
    body = {key for key in detector.state_dict() if key.startswith("backbone.body.")}
    assert set(report.loaded) == body and all(not key.startswith("backbone.body.") for key in report.missing)
    assert "not in the file" in caplog.text
    loaded = detector.state_dict()["backbone.body.model.stages.0.embed.convs.0.weight"]
    assert torch.equal(loaded, state["patch_embed.projs.0.weight"])


def test_own_checkpoints_and_other_class_counts(tmp_path, caplog):
    for name in ("retinanet", "mask_rcnn"):
        source = create_detector(name, "crossformer_nano", **SMALL)
        torch.save(
            {"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "own.ckpt"
        )
        again = create_detector(name, "crossformer_nano", **SMALL)
        report = load_checkpoint(again, tmp_path / "own.ckpt", adapt_classifier=False)
        assert not report.missing and all(
            torch.equal(a, b)
            for a, b in zip(source.state_dict().values(), again.state_dict().values(), strict=True)
        )
        five = create_detector(name, "crossformer_nano", **{**SMALL, "num_classes": 5})
        report = load_checkpoint(five, tmp_path / "own.ckpt")
        assert report.dropped and not report.missing and "of another shape" in caplog.text
        with pytest.raises(UserError, match="own.ckpt: is for other classes"):
            load_checkpoint(five, tmp_path / "own.ckpt", adapt_classifier=False)


def test_mismatched_checkpoints_raise(tmp_path):
    detector = create_detector("mask_rcnn", "crossformer_nano", **SMALL)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    published = formula_state_dict(KEYS["retinanet_small"])
    own = create_detector("retinanet", "crossformer_nano", **SMALL).state_dict()
    for state, message in (
        ({"x": torch.ones(3)}, "none of its weights fits"),
        (published, "belongs to another model"),
        (own, "belongs to another model"),
        ({k: v for k, v in before.items() if "stages.1" not in k}, "lacks .* weights"),
        ({k: v for k, v in before.items() if "fpn.inner_blocks.1" not in k}, "lacks 2 weights"),
        ({k: v for k, v in before.items() if "backbone.body" not in k}, "none of its weights fits|lacks"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(detector, state)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_img_size_of_variable_size_backbone_raises():
    for name in ("resnet18", "crossformer_nano"):
        with pytest.raises(UserError, match=f"model '{name}' has no argument img_size"):
            create_detector("retinanet", name, backbone_args={"img_size": 128})


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="unknown detector 'yolo'. Choose from retinanet, mask_rcnn"):
        create_detector("yolo")
    with pytest.raises(
        ValueError, match="unknown model 'crossformer_smal'. Did you mean 'crossformer_small'"
    ):
        create_detector("retinanet", "crossformer_smal")
    with pytest.raises(ValueError, match="One of 8, 16 or 32 is needed"):
        create_detector("retinanet", "vit_small_patch14_dinov2")
