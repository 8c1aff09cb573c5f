"""Region proposal network with the targets and losses of OpenMMLab."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork
from typing_extensions import override

from crossformer_vision.models.dense.anchors import IGNORED, match_anchors


class RPN(RegionProposalNetwork):
    """torchvision's RPN with L1 loss. Objects that no anchor overlaps by ``bg_iou_thresh`` get no anchor."""

    @override
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched_boxes = [], []
        low, high = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        for image_anchors, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            match = match_anchors(boxes, image_anchors, low, high, min_claim_iou=low)
            label = (match >= 0).to(torch.float32)
            labels.append(torch.where(match == IGNORED, -1.0, label))
            matched = boxes[match.clamp(min=0)] if len(boxes) else torch.zeros_like(image_anchors)
            matched_boxes.append(matched)
        return labels, matched_boxes

    @override
    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        is_positive, is_negative = (torch.cat(masks) > 0 for masks in self.fg_bg_sampler(labels))
        is_sampled = is_positive | is_negative
        targets = torch.cat(regression_targets)[is_positive]
        box_loss = F.l1_loss(pred_bbox_deltas[is_positive], targets, reduction="sum")
        box_loss = box_loss / is_sampled.sum().clamp(min=1)
        sampled_labels = torch.cat(labels)[is_sampled]
        logits = objectness.flatten()[is_sampled]
        return F.binary_cross_entropy_with_logits(logits, sampled_labels), box_loss
