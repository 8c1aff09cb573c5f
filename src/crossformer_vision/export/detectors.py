"""The detectors as graphs: a batch of images in, tensors of fixed rank out, no list and no Python number.

torchvision's detectors take images one by one, resize them, and return as many objects as there are. A graph
takes a batch at the size at which it computes, and returns the best `max_detections` objects of each image,
those that are missing with score 0. What a level or an image lacks of the number that is looked at is filled
up with candidates of score -1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import nms

from crossformer_vision.models.grouping import pad_to_multiple

NONE = -1.0  # score of a candidate that is none


class RetinaNetGraph(nn.Module):
    """Shape: (B, 3, H, W), normalised -> boxes (B, n, 4), labels (B, n), scores (B, n)."""

    outputs = ("boxes", "labels", "scores")

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        maps = list(net.backbone(pad_to_multiple(images, net.transform.size_divisible)).values())
        boxes, scores, labels = [], [], []
        for x, anchors in zip(maps, net.anchor_generator.of_levels(maps), strict=True):
            found = net.head([x])
            classes = found["cls_logits"].shape[-1]
            of_level = found["cls_logits"].sigmoid().flatten(1)  # (B, anchors * classes)
            of_level = torch.where(of_level > net.score_thresh, of_level, NONE)
            score, index = best(of_level, net.topk_candidates)
            boxes.append(decoded(net.box_coder, found["bbox_regression"], anchors, index // classes))
            scores.append(score)
            labels.append(index % classes + 1)
        return distinct(
            clipped(torch.cat(boxes, 1), images),
            torch.cat(scores, 1),
            torch.cat(labels, 1),
            net.nms_thresh,
            net.detections_per_img,
        )


class MaskRCNNGraph(nn.Module):
    """Shape: (B, 3, H, W), normalised -> boxes (B, n, 4), labels (B, n), scores (B, n), masks (B, n, 28, 28).

    A mask is of its box, as probabilities; n of them put into the image would take gigabytes.
    """

    outputs = ("boxes", "labels", "scores", "masks")

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        net, heads = self.net, self.net.roi_heads
        maps = list(net.backbone(pad_to_multiple(images, net.transform.size_divisible)).values())
        proposals, real = self.proposals(maps, images)
        rois = with_image(proposals)
        features = heads.box_head(heads.box_roi_pool.pool(maps[:4], rois))
        logits, deltas = heads.box_predictor(features)
        boxes = heads.box_coder.decode_single(deltas, rois[:, 1:])
        boxes = boxes.view(images.shape[0], -1, logits.shape[1], 4)[:, :, 1:]  # none of the background
        scores = logits.softmax(1).view(images.shape[0], -1, logits.shape[1])[:, :, 1:]
        scores = torch.where(real[..., None] & (scores > heads.score_thresh), scores, NONE).flatten(1)
        labels = torch.arange(1, logits.shape[1], device=images.device)
        labels = labels.expand(images.shape[0], proposals.shape[1], -1).flatten(1)
        boxes = clipped(boxes.flatten(1, 2), images)
        scores = torch.where(has_area(boxes, 1e-2), scores, NONE)
        boxes, labels, scores = distinct(boxes, scores, labels, heads.nms_thresh, heads.detections_per_img)
        return boxes, labels, scores, self.masks(maps, boxes, labels, scores)

    def proposals(self, maps: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """The RPN's best boxes of each image, (B, n, 4), and which of them are some, (B, n)."""
        rpn = self.net.rpn
        boxes, scores, levels = [], [], []
        for level, (x, anchors) in enumerate(zip(maps, rpn.anchor_generator.of_levels(maps), strict=True)):
            (logits,), (deltas,) = rpn.head([x])
            B, A, h, w = logits.shape
            of_level = permute_and_flatten(logits, B, A, 1, h, w).flatten(1).sigmoid()
            score, index = best(of_level, rpn._pre_nms_top_n["testing"])
            deltas = permute_and_flatten(deltas, B, A, 4, h, w)
            boxes.append(decoded(rpn.box_coder, deltas, anchors, index))
            scores.append(score)
            levels.append(torch.full_like(index, level))
        found, score = clipped(torch.cat(boxes, 1), images), torch.cat(scores, 1)
        score = torch.where(has_area(found, rpn.min_size) & (score >= rpn.score_thresh), score, NONE)
        most = rpn._post_nms_top_n["testing"]
        found, _, score = distinct(found, score, torch.cat(levels, 1), rpn.nms_thresh, most)
        return found, score > 0

    def masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """(B, n, 28, 28), zero where there is no object; computed for the objects alone."""
        heads = self.net.roi_heads
        (there,) = torch.where(scores.flatten() > 0)
        pooled = heads.mask_roi_pool.pool(maps[:4], with_image(boxes).index_select(0, there))
        probabilities = heads.mask_predictor(heads.mask_head(pooled)).sigmoid()
        side = probabilities.shape[-1]
        own = labels.flatten().index_select(0, there).view(-1, 1, 1, 1).expand(-1, 1, side, side)
        masks = probabilities.new_zeros(scores.numel(), side, side)
        masks = masks.index_put((there,), probabilities.gather(1, own)[:, 0])
        return masks.view(*scores.shape, side, side)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of (B, n) and their numbers, (B, count), filled up with number 0 at score -1."""
    found, index = F.pad(scores, (0, count), value=NONE).topk(count, dim=1)
    return found, torch.where(found > 0, index, 0)


def decoded(coder: Any, deltas: Tensor, anchors: Tensor, index: Tensor) -> Tensor:
    """Boxes (B, n, 4) of the anchors of given numbers, (B, n)."""
    chosen = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    boxes: Tensor = coder.decode_single(chosen.flatten(0, 1), anchors[index.flatten()])
    return boxes.view(*index.shape, 4)


def clipped(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes (B, n, 4), as far as they lie in the images (B, C, H, W)."""
    H, W = (torch.full((), side, dtype=boxes.dtype, device=boxes.device) for side in images.shape[2:])
    return torch.minimum(boxes.clamp(min=0), torch.stack([W, H, W, H]))


def has_area(boxes: Tensor, least: float) -> Tensor:
    """Whether boxes (B, n, 4) are at least so wide and high."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def with_image(boxes: Tensor) -> Tensor:
    """Boxes (B, n, 4) -> RoIs (B * n, 5), which begin with the image's number."""
    number = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([number[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def distinct(
    boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of each image, of each label none that overlaps a better one.

    Args:
        boxes: (B, n, 4).
        scores: (B, n), below 0 where there is none.
        labels: (B, n).
        overlap: largest IoU of two boxes of a label.
        most: boxes of an image.

    Returns:
        Boxes (B, most, 4), labels (B, most), scores (B, most), the best first; all 0 where there are no more.
    """
    # Labels side by side and images one below another, so that one suppression serves them all.
    far = boxes.max() + 1
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand_as(labels)
    apart = boxes + torch.stack([labels, image, labels, image], dim=-1) * far
    (there,) = torch.where(scores.flatten() > 0)
    apart = apart.flatten(0, 1).index_select(0, there)
    kept = there.index_select(0, nms(apart, scores.flatten().index_select(0, there), overlap))
    keeps = torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores)
    scores, index = best(torch.where(keeps > 0, scores, NONE), most)
    real = scores > 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * real[..., None]
    return boxes, labels.gather(1, index) * real, scores.clamp(min=0)
