"""RetinaNet and Mask R-CNN on any timm backbone, composed of torchvision's and this package's modules.

Structure, losses and initialization are those of the OpenMMLab models that CrossFormer was published with.
They differ from torchvision's detectors in these points:

- Anchors are not rounded to whole pixels, and their positions are multiples of the level's stride.
- RetinaNet's P6 is computed from C5, and there is no ReLU between P6 and P7.
- RoIAlign aligns half pixels and adapts its sampling density to the size of the RoI.
- At most 100 detections per image, and 1000 proposals in training too.
- Mask targets and pasted masks are sampled at pixel centers from unrounded boxes (see ``masks.py``).
- Boxes are trained with L1 instead of smooth L1. RetinaNet's losses are divided by the positives of the batch
  instead of each image's. An object that no anchor overlaps by 0.3 gets no anchor of the RPN.
- P6, P7 and the box head have Xavier initialization.

Labels run from 1 to ``num_classes``; 0 is the background, as in torchvision.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from typing_extensions import override

from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model
from crossformer_vision.models.dense.anchors import AnchorGenerator, match_anchors
from crossformer_vision.models.dense.backbones import create_backbone, feature_channels
from crossformer_vision.models.dense.base import DenseModel, find_body_prefix
from crossformer_vision.models.dense.feature_pyramid import BackboneWithFPN, LastLevelP6P7, init_xavier
from crossformer_vision.models.dense.losses import weighted_focal_loss
from crossformer_vision.models.dense.published_keys import MASK_RCNN_KEYS, RETINANET_KEYS
from crossformer_vision.models.dense.roi_heads import RoIAlign, RoIHeads
from crossformer_vision.models.dense.rpn import RPN
from crossformer_vision.models.dense.transform import DetectorTransform
from crossformer_vision.types import Backbone, Kwargs

if TYPE_CHECKING:
    from crossformer_vision.compat import Matcher

__all__ = ["MaskRCNN", "RetinaNet", "create_detector"]

Objects = list[dict[str, Tensor]]  # of each image


class RetinaNet(DenseModel, detection.RetinaNet):
    """RetinaNet (arXiv 1708.02002) as published with CrossFormer. See `create_detector`.

    Args:
        body: A module from `create_backbone`.
        num_classes: Number of classes without the background.
        width: Channels of the pyramid and the head.
        anchor_scale: Side of a level's smallest anchor, in strides. ``None`` is 4.
        max_detections: Maximum number of detections per image.
        min_size: See `DetectorTransform`.
        max_size: See `DetectorTransform`.
        image_mean: Mean of each channel.
        image_std: Standard deviation of each channel.
        skip_resize: Do not resize in training.
        **kwargs: Further arguments of torchvision's ``RetinaNet``, such as ``score_thresh``.
    """

    head: RetinaNetHead
    proposal_matcher: "Matcher"
    heads = ("backbone.fpn.", "backbone.body.scales.", "head.")
    class_layers = ("head.classification_head.cls_logits.",)
    published_names = RETINANET_KEYS
    class_weights: Tensor | None

    def __init__(
        self,
        body: Backbone,
        num_classes: int,
        width: int,
        anchor_scale: float | None,
        max_detections: int,
        min_size: int | list[int],
        max_size: int,
        image_mean: list[float],
        image_std: list[float],
        skip_resize: bool = False,
        **kwargs: Any,
    ) -> None:
        anchors = AnchorGenerator((8, 16, 32, 64, 128), anchor_scale or 4, scales_per_octave=3)
        head = RetinaNetHead(width, 9, num_classes)
        head.register_forward_hook(_to_float32)
        extra = LastLevelP6P7(feature_channels(body)[-1], width)
        super().__init__(
            BackboneWithFPN(body, width, first=1, extra=extra),
            num_classes,
            anchor_generator=anchors,
            head=head,
            detections_per_img=max_detections,
            **kwargs,
        )
        self.transform = DetectorTransform(min_size, max_size, image_mean, image_std, skip_resize)
        self.body_prefix = find_body_prefix("backbone.body.", body)
        self.num_classes = num_classes
        self.register_buffer("class_weights", None, persistent=False)

    @override
    def forward(self, images: list[Tensor], targets: Objects | None = None) -> dict[str, Tensor] | Objects:
        check_labels(targets, self.num_classes)
        return super().forward(images, targets)

    @override
    def compute_loss(
        self, targets: Objects, head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        # The batch is treated as one image, so that losses are divided by the positives of the batch.
        low, high = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        matches, offset = [], 0
        for target, image_anchors in zip(targets, anchors, strict=True):
            match = match_anchors(target["boxes"], image_anchors, low, high)
            matches.append(torch.where(match >= 0, match + offset, match))
            offset += len(target["boxes"])
        joined = {
            "boxes": torch.cat([target["boxes"] for target in targets]),
            "labels": torch.cat([target["labels"] for target in targets]) - 1,  # no background class
        }
        outputs = {name: x.flatten(0, 1)[None] for name, x in head_outputs.items()}
        losses: dict[str, Tensor] = self.head.compute_loss(
            [joined], outputs, [torch.cat(anchors)], [torch.cat(matches)]
        )
        if self.class_weights is not None:
            logits, matched = outputs["cls_logits"][0], torch.cat(matches)
            losses["classification"] = weighted_focal_loss(
                logits, joined["labels"], matched, self.class_weights
            )
        return losses

    def set_class_weights(self, weights: Tensor | None) -> None:
        """Set the weight of each class in the loss of the classifier, ``(num_classes,)``; ``None`` for 1."""
        self.class_weights = weights

    @override
    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> Objects:
        detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**result, "labels": result["labels"] + 1} for result in detections]


class MaskRCNN(DenseModel, GeneralizedRCNN):
    """Mask R-CNN (arXiv 1703.06870) as published with CrossFormer. See `create_detector`.

    The arguments from ``rpn_pre_nms_top_n_train`` on are those of torchvision's ``MaskRCNN``.

    Args:
        body: A module from `create_backbone`.
        num_classes: Number of classes without the background.
        width: Channels of the pyramid and the heads.
        anchor_scale: Side of a level's anchors, in strides. ``None`` is 8.
        max_detections: Maximum number of detections per image.
        min_size: See `DetectorTransform`.
        max_size: See `DetectorTransform`.
        image_mean: Mean of each channel.
        image_std: Standard deviation of each channel.
        skip_resize: Do not resize in training.
        rpn_pre_nms_top_n_train: Proposals of each level before non-maximum suppression, in training.
        rpn_pre_nms_top_n_test: The same, in evaluation.
        rpn_post_nms_top_n_train: Proposals of an image, in training.
        rpn_post_nms_top_n_test: The same, in evaluation.
        rpn_nms_thresh: IoU above which a proposal is suppressed.
        rpn_fg_iou_thresh: Minimum IoU of a positive anchor.
        rpn_bg_iou_thresh: IoU below which an anchor is negative.
        rpn_batch_size_per_image: Anchors of an image in the RPN's loss.
        rpn_positive_fraction: Maximum fraction of positive anchors among them.
        rpn_score_thresh: Minimum score of proposals.
        box_score_thresh: Minimum score of detections.
        box_nms_thresh: IoU above which a detection of the same class is suppressed.
        box_fg_iou_thresh: Minimum IoU of a positive proposal.
        box_bg_iou_thresh: IoU below which a proposal is negative.
        box_batch_size_per_image: Proposals of an image in the loss.
        box_positive_fraction: Maximum fraction of positive proposals among them.
        bbox_reg_weights: Weights of the box deltas. ``None`` is ``(10, 10, 5, 5)``.
    """

    heads = ("backbone.fpn.", "backbone.body.scales.", "rpn.", "roi_heads.")
    class_layers = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    published_names = MASK_RCNN_KEYS

    def __init__(
        self,
        body: Backbone,
        num_classes: int,
        width: int,
        anchor_scale: float | None,
        max_detections: int,
        min_size: int | list[int],
        max_size: int,
        image_mean: list[float],
        image_std: list[float],
        skip_resize: bool = False,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_score_thresh: float = 0.0,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        bbox_reg_weights: tuple[float, float, float, float] | None = None,
    ) -> None:
        rpn_head = RPNHead(width, num_anchors=3)
        box_head, box_predictor = _create_box_head(width, num_classes)
        mask_predictor = MaskRCNNPredictor(width, width, num_classes + 1)
        for head in (rpn_head, box_predictor, mask_predictor):
            head.register_forward_hook(_to_float32)
        backbone = BackboneWithFPN(body, width, first=0, extra=LastLevelMaxPool())
        anchors = AnchorGenerator((4, 8, 16, 32, 64), anchor_scale or 8, scales_per_octave=1)
        sampling = rpn_fg_iou_thresh, rpn_bg_iou_thresh, rpn_batch_size_per_image, rpn_positive_fraction
        before_nms = {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test}
        after_nms = {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test}
        rpn = RPN(anchors, rpn_head, *sampling, before_nms, after_nms, rpn_nms_thresh, rpn_score_thresh)
        sampling = box_fg_iou_thresh, box_bg_iou_thresh, box_batch_size_per_image, box_positive_fraction
        boxes = bbox_reg_weights, box_score_thresh, box_nms_thresh, max_detections
        masks = RoIAlign(14), MaskRCNNHeads(width, [width] * 4, dilation=1), mask_predictor
        roi_heads = RoIHeads(RoIAlign(7), box_head, box_predictor, *sampling, *boxes, *masks)
        transform = DetectorTransform(min_size, max_size, image_mean, image_std, skip_resize)
        super().__init__(backbone, rpn, roi_heads, transform)
        self.body_prefix = find_body_prefix("backbone.body.", body)
        self.num_classes = num_classes

    @override
    def forward(self, images: list[Tensor], targets: Objects | None = None) -> dict[str, Tensor] | Objects:
        check_labels(targets, self.num_classes)
        return super().forward(images, targets)

    def set_class_weights(self, weights: Tensor | None) -> None:
        """Set the weight of each class in the loss of the classifier, ``(num_classes,)``; ``None`` for 1."""
        assert isinstance(self.roi_heads, RoIHeads)
        if weights is not None:
            weights = torch.cat([weights.new_ones(1), weights])  # background first
        self.roi_heads.class_weights = weights

    @override
    def rename_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # torchvision's background class comes first, not last, and also has boxes and masks.
        renamed = super().rename_published(state)
        if "roi_head.bbox_head.fc_cls.weight" in state:
            for kind in ("weight", "bias"):
                logits = renamed[f"roi_heads.box_predictor.cls_score.{kind}"]
                renamed[f"roi_heads.box_predictor.cls_score.{kind}"] = logits.roll(1, 0)
                for name, rows in (
                    (f"roi_heads.box_predictor.bbox_pred.{kind}", 4),
                    (f"roi_heads.mask_predictor.mask_fcn_logits.{kind}", 1),
                ):
                    if (value := renamed.get(name)) is not None:  # Faster R-CNN has no masks
                        renamed[name] = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
        return renamed


def _create_box_head(width: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Box head with Xavier initialization and box predictor with OpenMMLab's."""
    head = TwoMLPHead(width * 7 * 7, 4 * width)
    init_xavier(head)
    predictor = FastRCNNPredictor(4 * width, num_classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return head, predictor


def _to_float32(module: nn.Module, args: object, output: object) -> object:
    """Forward hook of heads: boxes and losses are computed in float32 under autocast, too."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: x.float() for name, x in output.items()}
    assert isinstance(output, (list, tuple))
    return type(output)(_to_float32(module, args, x) for x in output)


def check_labels(targets: Objects | None, num_classes: int) -> None:
    """Check that labels of targets run from 1 to ``num_classes``; 0 is the background.

    Args:
        targets: Targets of each image with ``labels``, or ``None``.
        num_classes: Number of classes without the background.

    Raises:
        UserError: If a label is outside this range.
    """
    for target in targets or ():
        is_invalid = (target["labels"] < 1) | (target["labels"] > num_classes)
        if is_invalid.any():
            label = int(target["labels"][is_invalid][0])
            raise UserError(f"a target has label {label}. Labels must be from 1 to {num_classes}")


def normalization_kwargs(cfg: PretrainedCfg, channels: int) -> dict[str, list[float]]:
    """Arguments ``image_mean`` and ``image_std`` of a detector, from its backbone.

    Args:
        cfg: timm's configuration of the backbone.
        channels: Number of image channels. If it is not 3, every channel gets the mean over RGB.
    """
    kwargs = {"image_mean": list(cfg.mean), "image_std": list(cfg.std)}
    if channels == 3:
        return kwargs
    return {name: [sum(values) / len(values)] * channels for name, values in kwargs.items()}


def normalization_overrides(mean: list[float] | None, std: list[float] | None) -> Kwargs:
    """Arguments of a detector for a mean and standard deviation other than the backbone's, if given."""
    return {} if mean is None or std is None else {"image_mean": mean, "image_std": std}


DETECTORS = {"retinanet": RetinaNet, "mask_rcnn": MaskRCNN}


def create_detector(
    name: Literal["retinanet", "mask_rcnn"],
    backbone: str = "crossformer_small",
    num_classes: int = 80,
    pretrained: bool = False,
    width: int = 256,
    anchor_scale: float | None = None,
    max_detections: int = 100,
    min_size: int | list[int] = 800,
    max_size: int = 1333,
    backbone_args: Kwargs | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create RetinaNet or Mask R-CNN on a timm backbone, with the interface of torchvision's detectors.

    The published detectors, including those of CrossFormer++, have ``group_size=(7, 7, 7, 7)``,
    ``interval=(8, 4, 2, 1)`` and ``lda_span="map"``: the defaults of CrossFormer-T/S/B/L. Their checkpoints
    do not contain these values.

    Args:
        name: ``"retinanet"`` or ``"mask_rcnn"``.
        backbone: Name of a timm model with feature maps at strides 4 to 32.
        num_classes: Number of classes without the background. Labels run from 1.
        pretrained: Load the backbone's published weights.
        width: Channels of the pyramid and the heads.
        anchor_scale: Side of a level's smallest anchor, in strides. ``None`` is 4 (RetinaNet) or 8 (Mask
            R-CNN). Use half of it for objects that are small in relation to the image.
        max_detections: Maximum number of detections per image.
        min_size: Target length of the image's shorter side, in pixels. Training chooses one of several at
            random, evaluation uses the last.
        max_size: Maximum length of the longer side, in pixels.
        backbone_args: Further arguments of the backbone, such as ``drop_path_rate`` or ``in_chans``.
        **kwargs: Further arguments of torchvision's ``RetinaNet`` or ``MaskRCNN``, such as ``score_thresh``,
            ``box_score_thresh``, ``image_mean`` and ``image_std`` (default: the backbone's).

    Returns:
        A module that takes a list of images ``(C, H, W)`` with values from 0 to 1, of any sizes. In training
        it also takes a list of targets (``boxes`` ``(n, 4)`` in pixels, ``labels`` ``(n,)``, ``masks``
        ``(n, H, W)``) and returns a dictionary of losses. In evaluation it returns a list of dictionaries
        with ``boxes``, ``labels``, ``scores`` and, from Mask R-CNN, ``masks`` ``(n, 1, H, W)`` as
        probabilities.

    Raises:
        ValueError: If the detector or backbone is unknown, or the backbone has no suitable feature maps.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector '{name}'. Choose from {', '.join(DETECTORS)}")
    cfg = find_model(backbone)
    arguments = {
        **normalization_kwargs(cfg, (backbone_args or {}).get("in_chans", 3)),
        **kwargs,
        "num_classes": num_classes,
        "width": width,
        "anchor_scale": anchor_scale,
        "max_detections": max_detections,
        "min_size": min_size,
        "max_size": max_size,
    }
    return DETECTORS[name](create_backbone(backbone, pretrained, **(backbone_args or {})), **arguments)
