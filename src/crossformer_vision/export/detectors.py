"""Detectors as exportable graphs: a batch of images to tensors of fixed rank.

torchvision's detectors take a list of images, resize them and return as many objects as they find. A graph
takes a batch of resized images and returns the best ``max_detections`` objects of each, padded with score 0.
Within the graph, missing candidates of a level or image have score ``NO_OBJECT``.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import nms
from typing_extensions import override

from crossformer_vision.compat import rpn_proposal_counts
from crossformer_vision.models.grouping import pad_to_multiple

if TYPE_CHECKING:
    from crossformer_vision.compat import BoxCoder

NO_OBJECT = -1.0


class RetinaNetGraph(nn.Module):
    """RetinaNet with its postprocessing.

    Shape: normalized images ``(B, 3, H, W)`` to boxes ``(B, n, 4)``, labels ``(B, n)``, scores ``(B, n)``.

    Args:
        net: A `RetinaNet`.
    """

    outputs = ("boxes", "labels", "scores")

    def __init__(self, net: RetinaNet) -> None:
        super().__init__()
        self.net = net

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        maps = list(net.backbone(pad_to_multiple(images, net.transform.size_divisible)).values())
        boxes, scores, labels = [], [], []
        for x, anchors in zip(maps, net.anchor_generator.generate_per_level(maps), strict=True):
            predictions = net.head([x])
            classes = predictions["cls_logits"].shape[-1]
            level_scores = predictions["cls_logits"].sigmoid().flatten(1)  # (B, anchors * classes)
            level_scores = torch.where(level_scores > net.score_thresh, level_scores, NO_OBJECT)
            score, index = select_top(level_scores, net.topk_candidates)
            boxes.append(
                decode_boxes(net.box_coder, predictions["bbox_regression"], anchors, index // classes)
            )
            scores.append(score)
            labels.append(index % classes + 1)
        return suppress_overlaps(
            clip_boxes(torch.cat(boxes, 1), images),
            torch.cat(scores, 1),
            torch.cat(labels, 1),
            net.nms_thresh,
            net.detections_per_img,
        )


class MaskRCNNGraph(nn.Module):
    """Mask R-CNN with its postprocessing.

    Masks belong to their boxes; pasted into the images, they would take gigabytes.

    Shape: normalized images ``(B, 3, H, W)`` to boxes ``(B, n, 4)``, labels ``(B, n)``, scores ``(B, n)`` and
    masks ``(B, n, 28, 28)`` as probabilities.

    Args:
        net: A `MaskRCNN`.
    """

    outputs = ("boxes", "labels", "scores", "masks")

    def __init__(self, net: GeneralizedRCNN) -> None:
        super().__init__()
        self.net = net

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        net, heads = self.net, self.net.roi_heads
        maps = list(net.backbone(pad_to_multiple(images, net.transform.size_divisible)).values())
        proposals, is_proposal = self.propose(maps, images)
        rois = add_image_index(proposals)
        features = heads.box_head(heads.box_roi_pool.pool(maps[:4], rois))
        logits, deltas = heads.box_predictor(features)
        boxes = heads.box_coder.decode_single(deltas, rois[:, 1:])
        boxes = boxes.view(images.shape[0], -1, logits.shape[1], 4)[:, :, 1:]  # without the background
        scores = logits.softmax(1).view(images.shape[0], -1, logits.shape[1])[:, :, 1:]
        is_candidate = is_proposal[..., None] & (scores > heads.score_thresh)
        scores = torch.where(is_candidate, scores, NO_OBJECT).flatten(1)
        labels = torch.arange(1, logits.shape[1], device=images.device)
        labels = labels.expand(images.shape[0], proposals.shape[1], -1).flatten(1)
        boxes = clip_boxes(boxes.flatten(1, 2), images)
        scores = torch.where(is_larger(boxes, 1e-2), scores, NO_OBJECT)
        boxes, labels, scores = suppress_overlaps(
            boxes, scores, labels, heads.nms_thresh, heads.detections_per_img
        )
        return boxes, labels, scores, self.predict_masks(maps, boxes, labels, scores)

    def propose(self, maps: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """The RPN's proposals of each image.

        Args:
            maps: Maps of the feature pyramid.
            images: Images, ``(B, 3, H, W)``.

        Returns:
            Boxes ``(B, n, 4)``, and ``True`` for those that are not padding ``(B, n)``.
        """
        rpn = self.net.rpn
        before_nms, after_nms = rpn_proposal_counts(rpn)
        boxes, scores, levels = [], [], []
        all_anchors = rpn.anchor_generator.generate_per_level(maps)
        for level, (x, anchors) in enumerate(zip(maps, all_anchors, strict=True)):
            (logits,), (deltas,) = rpn.head([x])
            B, A, h, w = logits.shape
            level_scores = permute_and_flatten(logits, B, A, 1, h, w).flatten(1).sigmoid()
            score, index = select_top(level_scores, before_nms)
            deltas = permute_and_flatten(deltas, B, A, 4, h, w)
            boxes.append(decode_boxes(rpn.box_coder, deltas, anchors, index))
            scores.append(score)
            levels.append(torch.full_like(index, level))
        proposals, score = clip_boxes(torch.cat(boxes, 1), images), torch.cat(scores, 1)
        is_candidate = is_larger(proposals, rpn.min_size) & (score >= rpn.score_thresh)
        score = torch.where(is_candidate, score, NO_OBJECT)
        proposals, _, score = suppress_overlaps(
            proposals, score, torch.cat(levels, 1), rpn.nms_thresh, after_nms
        )
        return proposals, score > 0

    def predict_masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """Masks of detected objects. Padding is not computed and has zeros.

        Args:
            maps: Maps of the feature pyramid.
            boxes: Boxes, ``(B, n, 4)``.
            labels: Labels, ``(B, n)``.
            scores: Scores, ``(B, n)``; 0 for padding.

        Returns:
            Probabilities, ``(B, n, 28, 28)``.
        """
        heads = self.net.roi_heads
        (objects,) = torch.where(scores.flatten() > 0)
        pooled = heads.mask_roi_pool.pool(maps[:4], add_image_index(boxes).index_select(0, objects))
        probabilities = heads.mask_predictor(heads.mask_head(pooled)).sigmoid()
        side = probabilities.shape[-1]
        channel = labels.flatten().index_select(0, objects).view(-1, 1, 1, 1).expand(-1, 1, side, side)
        masks = probabilities.new_zeros(scores.numel(), side, side)
        masks = masks.index_put((objects,), probabilities.gather(1, channel)[:, 0])
        return masks.view(*scores.shape, side, side)


def select_top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Highest ``count`` scores of ``(B, n)`` and their indices, padded with ``NO_OBJECT`` and index 0."""
    top, index = F.pad(scores, (0, count), value=NO_OBJECT).topk(count, dim=1)
    return top, torch.where(top > 0, index, 0)


def decode_boxes(coder: "BoxCoder", deltas: Tensor, anchors: Tensor, index: Tensor) -> Tensor:
    """Decode the boxes of selected anchors.

    Args:
        coder: torchvision's ``BoxCoder``.
        deltas: Deltas of all anchors, ``(B, anchors, 4)``.
        anchors: Anchors, ``(anchors, 4)``.
        index: Indices of anchors, ``(B, n)``.

    Returns:
        Boxes, ``(B, n, 4)``.
    """
    selected = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    return coder.decode_single(selected.flatten(0, 1), anchors[index.flatten()]).view(*index.shape, 4)


def clip_boxes(boxes: Tensor, images: Tensor) -> Tensor:
    """Clip boxes ``(B, n, 4)`` to images ``(B, C, H, W)``."""
    H, W = (torch.full((), side, dtype=boxes.dtype, device=boxes.device) for side in images.shape[2:])
    return torch.minimum(boxes.clamp(min=0), torch.stack([W, H, W, H]))


def is_larger(boxes: Tensor, min_size: float) -> Tensor:
    """Whether boxes ``(B, n, 4)`` have at least this width and height."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)


def add_image_index(boxes: Tensor) -> Tensor:
    """Boxes ``(B, n, 4)`` as RoIs ``(B * n, 5)``, whose first column is the index of the image."""
    index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def suppress_overlaps(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_boxes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression of each image and label.

    Args:
        boxes: Boxes, ``(B, n, 4)``.
        scores: Scores, ``(B, n)``; below 0 for missing candidates.
        labels: Labels, ``(B, n)``.
        iou_threshold: IoU above which the box with the lower score is suppressed.
        max_boxes: Maximum number of boxes per image.

    Returns:
        Boxes ``(B, max_boxes, 4)``, labels ``(B, max_boxes)`` and scores ``(B, max_boxes)``, highest score
        first, padded with zeros.
    """
    # Boxes of different labels and images are moved apart, so that one call of nms serves all.
    distance = boxes.max() + 1
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand_as(labels)
    separated = boxes + torch.stack([labels, image, labels, image], dim=-1) * distance
    (candidates,) = torch.where(scores.flatten() > 0)
    separated = separated.flatten(0, 1).index_select(0, candidates)
    order = nms(separated, scores.flatten().index_select(0, candidates), iou_threshold)
    kept = candidates.index_select(0, order)
    is_kept = torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores)
    scores, index = select_top(torch.where(is_kept > 0, scores, NO_OBJECT), max_boxes)
    is_object = scores > 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * is_object[..., None]
    return boxes, labels.gather(1, index) * is_object, scores.clamp(min=0)
