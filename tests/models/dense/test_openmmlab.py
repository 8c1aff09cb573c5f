"""What the published detectors do otherwise than torchvision's: masks, losses, matches, initial weights."""

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
from crossformer_vision.models.dense import matching
from crossformer_vision.models.dense import openmmlab as detector_parts
from crossformer_vision.models.dense.openmmlab import box_losses, mask_loss, mask_targets, paste_masks

SMALL = dict(num_classes=3, width=16, min_size=64, max_size=96)


def shapes(smallest: float, largest: float, count: int = 60) -> torch.Tensor:
    """Ellipses and stars at any place and turn: (count, 120, 120) of 0 and 1."""
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
    """Mean IoU of masks that went to their targets of 28x28 and back."""
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # its right and lower edges are inside
    index = torch.arange(len(masks))
    if aligned:
        back = paste_masks(mask_targets(masks, boxes, index, 28)[:, None], boxes, (120, 120))
    else:
        back = paste_masks_in_image(
            project_masks_on_boxes(masks, boxes, index, 28)[:, None], boxes, (120, 120)
        )
    back, masks = back[:, 0] > 0.5, masks.bool()
    return float(((back & masks).sum((1, 2)) / (back | masks).sum((1, 2))).mean())


def test_masks_that_can_be_reached():
    """The bound that targets and pasting set, beside torchvision's."""
    small, large = shapes(10, 32), shapes(32, 96)
    assert reached(small, aligned=True) >= 0.97
    assert reached(small, aligned=False) < 0.87
    assert reached(large, aligned=True) >= 0.95
    assert reached(large, aligned=True) > reached(large, aligned=False)


def test_pasted_masks_lie_where_their_boxes_do():
    box = torch.tensor([[10.25, 20.5, 30.75, 44.0], [-6.0, -4.0, 5.0, 6.0], [110.0, 100.0, 130.0, 125.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), box, (120, 115))
    assert pasted.shape == (3, 1, 120, 115)
    for (x1, y1, x2, y2), mask in zip(box.tolist(), pasted[:, 0], strict=True):
        y, x = torch.arange(120) + 0.5, torch.arange(115) + 0.5
        inside = ((y > y1) & (y < y2))[:, None] & ((x > x1) & (x < x2))[None]
        assert torch.equal(mask > 0.5, inside)
    assert paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (8, 9)).shape == (0, 1, 8, 9)


def test_objects_are_found_with_gradients_and_in_half_precision():
    """Each mask is written into a map of the image's size."""
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
def test_gradients_of_the_coarsest_levels_in_bfloat16(size):
    """oneDNN's own are of uninitialized memory where a map is one pixel wide."""
    torch.manual_seed(0)
    levels, x = detector_parts.P6P7(8, 16), torch.randn(2, 8, *size)

    def gradients():
        levels.zero_grad()
        (p6, p7), _ = levels([], [x], [])
        (p6.float().square().sum() + p7.float().square().sum()).backward()
        return [p.grad.clone() for p in levels.parameters()]

    exact = gradients()
    junk = [torch.full((n,), float("nan")) for n in (64, 256, 1152, 2304, 4096) for _ in range(8)]
    del junk  # what is allocated next holds it
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients()
    for a, b in zip(low, exact, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("chunk", [1 << 21, 700])  # all anchors at once, and some of 90 at a time
def test_matching_in_chunks_is_torchvisions(chunk, low_quality, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(497, 2, generator=generator) * 80
    anchors = torch.cat([corners, corners + 4 + 30 * torch.rand(497, 2, generator=generator)], 1).round()
    boxes = torch.cat([anchors[:5] + 3, anchors[7:8], torch.tensor([[200.0, 200, 210, 210]])])
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)
    expected = matcher(box_iou(boxes, anchors))
    assert torch.equal(matching.match_anchors(matcher, boxes, anchors), expected)
    assert matching.match_anchors(matcher, boxes[:0], anchors).eq(-1).all()


def test_an_object_that_nothing_overlaps_claims_no_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 8], [20, 0, 30, 3.5], [60, 0, 70, 2.9]])  # overlaps 0.8, 0.35, 0.29
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    assert matching.match_anchors(matcher, boxes, anchors).tolist() == [0, 1, -1, 2]
    assert matching.match_anchors(matcher, boxes, anchors, least_claim=0.3).tolist() == [0, 1, -1, -1]
    rpn = create_detector("mask_rcnn", "crossformer_nano", **SMALL).rpn
    labels, matched = rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes}])
    assert labels[0].tolist() == [1, 1, 0, 0] and matched[0][:2].tolist() == boxes[:2].tolist()


def test_mask_targets_a_few_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(7, 40, 30, generator=generator) > 0.5).to(torch.uint8)
    boxes = torch.rand(12, 2, generator=generator) * 10
    boxes = torch.cat([boxes, boxes + 8], 1)
    index = torch.tensor([6, 0, 3, 3, 0, 5, 2, 6, 1, 0, 3, 2])
    at_once = mask_targets(masks, boxes, index, 14)
    monkeypatch.setattr(detector_parts, "MASKS_AT_A_TIME", 2)
    assert torch.equal(mask_targets(masks, boxes, index, 14), at_once) and 0 < at_once.mean() < 1


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("label", [0, 4, -1])
def test_labels_of_no_class_are_refused(name, label):
    """Labels from 0, as other libraries have them, would train the last class."""
    net = create_detector(name, "crossformer_nano", **SMALL).train()
    target = dict(boxes=torch.tensor([[1.0, 1, 9, 9]]), labels=torch.tensor([label]))
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"a target has label {label}: labels run from 1 to 3"):
        net([torch.rand(3, 64, 64)], [target])


def test_losses_of_the_box_head():
    torch.manual_seed(0)
    logits, deltas, targets = torch.randn(5, 4), torch.randn(5, 16), torch.randn(5, 4)
    labels = torch.tensor([0, 2, 3, 0, 1])
    losses = box_losses(logits, deltas, labels, targets)
    own = torch.stack([deltas[i, 4 * k : 4 * k + 4] for i, k in ((1, 2), (2, 3), (4, 1))])
    assert torch.isclose(losses["loss_box_reg"], (own - targets[[1, 2, 4]]).abs().sum() / 5)
    assert torch.isclose(losses["loss_classifier"], F.cross_entropy(logits, labels))


def test_loss_of_masks():
    masks = torch.zeros(2, 20, 20, dtype=torch.uint8)
    masks[0, 4:12, 4:12] = masks[1, 10:18, 2:10] = 1
    rois, objects = torch.tensor([[4.0, 4.0, 12.0, 12.0], [0.0, 10.0, 10.0, 20.0]]), torch.tensor([0, 1])
    logits = torch.randn(2, 3, 10, 10)
    target = [{"masks": masks, "labels": torch.tensor([2, 1])}]
    wanted = torch.stack([torch.ones(10, 10), F.pad(torch.ones(8, 8), (2, 0, 0, 2))])
    expected = F.binary_cross_entropy_with_logits(torch.stack([logits[0, 2], logits[1, 1]]), wanted)
    assert torch.isclose(mask_loss(logits, [rois], [objects], target), expected)
    assert mask_loss(logits[:0], [rois[:0]], [objects[:0]], target) == 0


def test_retinanet_divides_by_the_positives_of_the_batch():
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
def test_images_without_objects_alone(masks):
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
