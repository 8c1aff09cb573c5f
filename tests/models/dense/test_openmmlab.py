"""OpenMMLab behavior that differs from torchvision: masks, losses, matching, initialization."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import box_iou, masks_to_boxes, sigmoid_focal_loss
from torchvision.transforms.functional import pil_to_tensor

from crossformer_vision import UserError, create_detector
from crossformer_vision.models.dense import anchors as anchors_module
from crossformer_vision.models.dense import masks as masks_module
from crossformer_vision.models.dense.anchors import match_anchors
from crossformer_vision.models.dense.feature_pyramid import LastLevelP6P7
from crossformer_vision.models.dense.masks import crop_mask_targets, paste_masks
from crossformer_vision.models.dense.roi_heads import compute_box_losses, compute_mask_loss

SMALL = dict(num_classes=3, width=16, min_size=64, max_size=96)


def shapes(smallest: float, largest: float, count: int = 60) -> torch.Tensor:
    """Random ellipses and stars as binary masks, shape ``(count, 120, 120)``."""
    generator = torch.Generator().manual_seed(0)

    def drawn(low, high):
        return float(torch.empty(1).uniform_(low, high, generator=generator))

    masks = []
    for k in range(count):
        size, x, y, turn, ratio = (
            drawn(smallest, largest),
            drawn(50, 70),
            drawn(50, 70),
            drawn(0, 6),
            drawn(0.5, 1),
        )
        points = []
        for i in range(40 if k % 2 else 10):
            angle = 2 * math.pi * i / (40 if k % 2 else 10)
            radius = size / 2 * (1 if k % 2 or i % 2 else 0.5)
            dx, dy = radius * math.cos(angle), radius * ratio * math.sin(angle)
            points.append(
                (x + dx * math.cos(turn) - dy * math.sin(turn), y + dx * math.sin(turn) + dy * math.cos(turn))
            )
        canvas = Image.new("L", (120, 120))
        ImageDraw.Draw(canvas).polygon(points, fill=1)
        masks.append(pil_to_tensor(canvas)[0])
    return torch.stack(masks)


def reached(masks: torch.Tensor, aligned: bool) -> float:
    """Mean IoU of masks after cropping to 28x28 targets and pasting back."""
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # right and bottom edges are inclusive
    index = torch.arange(len(masks))
    if aligned:
        back = paste_masks(crop_mask_targets(masks, boxes, index, 28)[:, None], boxes, (120, 120))
    else:
        back = paste_masks_in_image(
            project_masks_on_boxes(masks, boxes, index, 28)[:, None], boxes, (120, 120)
        )
    back, masks = back[:, 0] > 0.5, masks.bool()
    return float(((back & masks).sum((1, 2)) / (back | masks).sum((1, 2))).mean())


def test_mask_round_trip_iou():
    """Upper bound of mask quality set by cropping and pasting, compared with torchvision."""
    small, large = shapes(10, 32), shapes(32, 96)
    assert reached(small, aligned=True) >= 0.97
    assert reached(small, aligned=False) < 0.87
    assert reached(large, aligned=True) >= 0.95
    assert reached(large, aligned=True) > reached(large, aligned=False)


def test_pasted_masks_align_with_boxes():
    box = torch.tensor([[10.25, 20.5, 30.75, 44.0], [-6.0, -4.0, 5.0, 6.0], [110.0, 100.0, 130.0, 125.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), box, (120, 115))
    assert pasted.shape == (3, 1, 120, 115)
    for (x1, y1, x2, y2), mask in zip(box.tolist(), pasted[:, 0], strict=True):
        y, x = torch.arange(120) + 0.5, torch.arange(115) + 0.5
        inside = ((y > y1) & (y < y2))[:, None] & ((x > x1) & (x < x2))[None]
        assert torch.equal(mask > 0.5, inside)
    assert paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (8, 9)).shape == (0, 1, 8, 9)


def test_mask_inference_with_gradients_and_bfloat16():
    """Pasted masks have the image size, with gradients enabled and in bfloat16."""
    torch.manual_seed(0)
    options = dict(num_classes=1, width=16, min_size=64, max_size=96, box_score_thresh=0.0)
    detector = create_detector("mask_rcnn", "test_resnet", **options).eval()
    images = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        (expected,) = detector(images)
    (found,) = detector(images)
    assert len(found["boxes"]) and torch.equal(found["masks"], expected["masks"])
    found["masks"].sum().backward()
    (half,) = detector.to(torch.bfloat16)([image.bfloat16() for image in images])
    assert half["masks"].shape[1:] == (1, 64, 80)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (3, 3)])
def test_bfloat16_gradients_of_coarsest_levels(size):
    """oneDNN gradients of one-pixel-wide maps read uninitialized memory."""
    torch.manual_seed(0)
    levels, x = LastLevelP6P7(8, 16), torch.randn(2, 8, *size)

    def gradients():
        levels.zero_grad()
        (p6, p7), _ = levels([], [x], [])
        (p6.float().square().sum() + p7.float().square().sum()).backward()
        return [p.grad.clone() for p in levels.parameters()]

    exact = gradients()
    junk = [torch.full((n,), float("nan")) for n in (64, 256, 1152, 2304, 4096) for _ in range(8)]
    del junk  # later allocations reuse this memory
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients()
    for a, b in zip(low, exact, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("chunk", [1 << 21, 700])  # all anchors at once, then about 90 at a time
def test_chunked_matching_matches_torchvision(chunk, low_quality, monkeypatch):
    monkeypatch.setattr(anchors_module, "CHUNK_SIZE", chunk)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(497, 2, generator=generator) * 80
    anchors = torch.cat([corners, corners + 4 + 30 * torch.rand(497, 2, generator=generator)], 1).round()
    boxes = torch.cat([anchors[:5] + 3, anchors[7:8], torch.tensor([[200.0, 200, 210, 210]])])
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)
    expected = matcher(box_iou(boxes, anchors))
    thresholds = (0.4, 0.5, low_quality)
    assert torch.equal(match_anchors(boxes, anchors, *thresholds), expected)
    assert match_anchors(boxes[:0], anchors, *thresholds).eq(-1).all()


def test_object_without_overlap_matches_no_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 8], [20, 0, 30, 3.5], [60, 0, 70, 2.9]])  # IoU 0.8, 0.35, 0.29
    thresholds = (0.3, 0.7)
    assert match_anchors(boxes, anchors, *thresholds).tolist() == [0, 1, -1, 2]
    assert match_anchors(boxes, anchors, *thresholds, min_claim_iou=0.3).tolist() == [0, 1, -1, -1]
    rpn = create_detector("mask_rcnn", "crossformer_nano", **SMALL).rpn
    labels, matched = rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes}])
    assert labels[0].tolist() == [1, 1, 0, 0] and matched[0][:2].tolist() == boxes[:2].tolist()


def test_chunked_mask_targets(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(7, 40, 30, generator=generator) > 0.5).to(torch.uint8)
    boxes = torch.rand(12, 2, generator=generator) * 10
    boxes = torch.cat([boxes, boxes + 8], 1)
    index = torch.tensor([6, 0, 3, 3, 0, 5, 2, 6, 1, 0, 3, 2])
    at_once = crop_mask_targets(masks, boxes, index, 14)
    monkeypatch.setattr(masks_module, "CHUNK_SIZE", 2)
    assert torch.equal(crop_mask_targets(masks, boxes, index, 14), at_once) and 0 < at_once.mean() < 1


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("label", [0, 4, -1])
def test_out_of_range_labels_raise(name, label):
    """Zero-based labels, as in other libraries, would train the last class."""
    net = create_detector(name, "crossformer_nano", **SMALL).train()
    target = dict(boxes=torch.tensor([[1.0, 1, 9, 9]]), labels=torch.tensor([label]))
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"a target has label {label}. Labels must be from 1 to 3"):
        net([torch.rand(3, 64, 64)], [target])


def test_box_head_losses():
    torch.manual_seed(0)
    logits, deltas, targets = torch.randn(5, 4), torch.randn(5, 16), torch.randn(5, 4)
    labels = torch.tensor([0, 2, 3, 0, 1])
    losses = compute_box_losses(logits, deltas, labels, targets)
    own = torch.stack([deltas[i, 4 * k : 4 * k + 4] for i, k in ((1, 2), (2, 3), (4, 1))])
    assert torch.isclose(losses["loss_box_reg"], (own - targets[[1, 2, 4]]).abs().sum() / 5)
    assert torch.isclose(losses["loss_classifier"], F.cross_entropy(logits, labels))


def test_mask_loss():
    masks = torch.zeros(2, 20, 20, dtype=torch.uint8)
    masks[0, 4:12, 4:12] = masks[1, 10:18, 2:10] = 1
    rois, objects = torch.tensor([[4.0, 4.0, 12.0, 12.0], [0.0, 10.0, 10.0, 20.0]]), torch.tensor([0, 1])
    logits = torch.randn(2, 3, 10, 10)
    target = [{"masks": masks, "labels": torch.tensor([2, 1])}]
    wanted = torch.stack([torch.ones(10, 10), F.pad(torch.ones(8, 8), (2, 0, 0, 2))])
    expected = F.binary_cross_entropy_with_logits(torch.stack([logits[0, 2], logits[1, 1]]), wanted)
    assert torch.isclose(compute_mask_loss(logits, [rois], [objects], target), expected)
    assert compute_mask_loss(logits[:0], [rois[:0]], [objects[:0]], target) == 0


def test_retinanet_loss_is_normalized_by_batch_positives():
    torch.manual_seed(0)
    net = create_detector("retinanet", "crossformer_nano", **SMALL).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    truth = [
        dict(boxes=torch.tensor([[5.0, 8, 40, 50]]), labels=torch.tensor([3])),
        dict(
            boxes=torch.tensor([[2.0, 2, 60, 60], [30, 10, 60, 30], [5, 5, 25, 25]]),
            labels=torch.tensor([1, 2, 2]),
        ),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]
    losses = net(images, truth)
    batch, _ = net.transform(images)
    maps = list(net.backbone(batch.tensors).values())
    out, anchors = net.head(maps), net.anchor_generator(batch, maps)[0]
    total = positives = 0
    boxes = torch.zeros(())
    for i, target in enumerate(truth):
        wanted, counted = torch.zeros(len(anchors), 3), torch.ones(len(anchors), dtype=torch.bool)
        if len(target["boxes"]):
            match = net.proposal_matcher(box_iou(target["boxes"], anchors))
            chosen, counted = match >= 0, match != -2
            wanted[chosen, target["labels"][match[chosen]] - 1] = 1
            deltas = net.box_coder.encode_single(target["boxes"][match[chosen]], anchors[chosen])
            boxes = boxes + (out["bbox_regression"][i][chosen] - deltas).abs().sum()
            positives += int(chosen.sum())
        total += sigmoid_focal_loss(out["cls_logits"][i][counted], wanted[counted], reduction="sum")
    torch.testing.assert_close(losses["classification"], total / positives)
    torch.testing.assert_close(losses["bbox_regression"], boxes / positives)


@pytest.mark.parametrize("masks", [False, True])
def test_batch_without_objects(masks):
    name = "mask_rcnn" if masks else "retinanet"
    net = create_detector(name, "crossformer_nano", **SMALL).train()
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    if masks:
        empty["masks"] = torch.zeros(0, 64, 64, dtype=torch.uint8)
    losses = net([torch.rand(3, 64, 64)], [empty])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_initial_weights():
    torch.manual_seed(0)
    retinanet = create_detector("retinanet", "crossformer_nano")
    for conv in (retinanet.backbone.fpn.extra_blocks.p6, retinanet.backbone.fpn.extra_blocks.p7):
        bound = math.sqrt(6 / (9 * (conv.in_channels + conv.out_channels)))
        assert 0.99 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()
    heads = create_detector("mask_rcnn", "crossformer_nano").roi_heads
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        assert float(layer.weight.std()) == pytest.approx(std, rel=0.05) and not layer.bias.any()
