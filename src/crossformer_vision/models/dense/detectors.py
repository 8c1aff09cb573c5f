"""RetinaNet and Mask R-CNN on any timm backbone, from torchvision's detectors.

In structure, losses and numbers they are the OpenMMLab models that CrossFormer was published with; what
differs from torchvision's own is in `detector_parts.py`.

Labels run from 1 to `num_classes`; 0 is the background, as in torchvision.
"""

from typing import Any, Literal

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model
from crossformer_vision.models.dense.backbones import (
    PUBLISHED_NECK,
    DenseModel,
    Pyramid,
    body_name,
    create_backbone,
    map_channels,
)
from crossformer_vision.models.dense.matching import match_anchors
from crossformer_vision.models.dense.openmmlab import (
    P6P7,
    RPN,
    Anchors,
    RoIAlign,
    RoIHeads,
    Transform,
    xavier,
)

__all__ = ["MaskRCNN", "RetinaNet", "create_detector"]


# ------------------------------------------------------------------------------------------------------------
# Published names
# ------------------------------------------------------------------------------------------------------------

RETINANET = [
    (r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.extra_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.p7."),
    *PUBLISHED_NECK,
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
]
MASK_RCNN = [
    *PUBLISHED_NECK,
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
]


# ------------------------------------------------------------------------------------------------------------
# Detectors
# ------------------------------------------------------------------------------------------------------------


def _in_float32(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the heads: boxes and losses are computed in float32 under autocast, too."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: x.float() for name, x in output.items()}
    return type(output)(_in_float32(module, args, x) for x in output)


def check_labels(targets: list[dict[str, Tensor]] | None, num_classes: int) -> None:
    """Check that labels of targets run from 1 to ``num_classes``; 0 is the background.

    Raises:
        UserError: If a label is outside this range.
    """
    for target in targets or ():
        wrong = (target["labels"] < 1) | (target["labels"] > num_classes)
        if wrong.any():
            label = int(target["labels"][wrong][0])
            raise UserError(f"a target has label {label}: labels run from 1 to {num_classes}")


class RetinaNet(DenseModel, detection.RetinaNet):
    """RetinaNet (arXiv 1708.02002) as published with CrossFormer; see `create_detector`."""

    heads = ("backbone.fpn.", "backbone.body.scales.", "head.")
    class_layers = ("head.classification_head.cls_logits.",)
    published_names = RETINANET

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        width: int,
        anchor_scale: float | None,
        max_detections: int,
        **kwargs: Any,
    ) -> None:
        anchors = Anchors((8, 16, 32, 64, 128), anchor_scale or 4, octave=3)
        head = RetinaNetHead(width, 9, num_classes)
        head.register_forward_hook(_in_float32)
        super().__init__(
            Pyramid(body, width, first=1, extra=P6P7(map_channels(body)[-1], width)),
            num_classes,
            anchor_generator=anchors,
            head=head,
            detections_per_img=max_detections,
            **kwargs,
        )
        parts: Any = self
        parts.transform.__class__ = Transform
        self.body_name = body_name("backbone.body.", body)
        self.num_classes = num_classes

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        check_labels(targets, self.num_classes)
        return super().forward(images, targets)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        # All images as one, so that the losses are divided by the positives of all.
        head: Any = self.head
        matcher: Any = self.proposal_matcher
        matches, before = [], 0
        for target, own in zip(targets, anchors, strict=True):
            match = match_anchors(matcher, target["boxes"], own)
            matches.append(torch.where(match >= 0, match + before, match))
            before += len(target["boxes"])
        joined = {
            "boxes": torch.cat([target["boxes"] for target in targets]),
            "labels": torch.cat([target["labels"] for target in targets]) - 1,  # no background class
        }
        outputs = {name: x.flatten(0, 1)[None] for name, x in head_outputs.items()}
        return head.compute_loss([joined], outputs, [torch.cat(anchors)], [torch.cat(matches)])

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        found = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**result, "labels": result["labels"] + 1} for result in found]


class MaskRCNN(DenseModel, detection.MaskRCNN):
    """Mask R-CNN (arXiv 1703.06870) as published with CrossFormer; see `create_detector`."""

    heads = ("backbone.fpn.", "backbone.body.scales.", "rpn.", "roi_heads.")
    class_layers = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    published_names = MASK_RCNN

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        width: int,
        anchor_scale: float | None,
        max_detections: int,
        **kwargs: Any,
    ) -> None:
        rpn_head = RPNHead(width, num_anchors=3)
        box_head = TwoMLPHead(width * 7 * 7, 4 * width)
        xavier(box_head)
        box_predictor = FastRCNNPredictor(4 * width, num_classes + 1)
        for layer, std in ((box_predictor.cls_score, 0.01), (box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        mask_predictor = MaskRCNNPredictor(width, width, num_classes + 1)
        for head in (rpn_head, box_predictor, mask_predictor):
            head.register_forward_hook(_in_float32)
        super().__init__(
            Pyramid(body, width, first=0, extra=LastLevelMaxPool()),
            rpn_anchor_generator=Anchors((4, 8, 16, 32, 64), anchor_scale or 8, octave=1),
            rpn_head=rpn_head,
            box_roi_pool=RoIAlign(7),
            box_head=box_head,
            box_predictor=box_predictor,
            mask_roi_pool=RoIAlign(14),
            mask_head=MaskRCNNHeads(width, [width] * 4, dilation=1),
            mask_predictor=mask_predictor,
            box_detections_per_img=max_detections,
            **{"rpn_post_nms_top_n_train": 1000, **kwargs},
        )
        parts: Any = self  # torchvision has built them from our keywords
        parts.rpn.__class__ = RPN
        parts.roi_heads.__class__ = RoIHeads
        parts.transform.__class__ = Transform
        self.body_name = body_name("backbone.body.", body)
        self.num_classes = num_classes

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        check_labels(targets, self.num_classes)
        return super().forward(images, targets)

    def rename_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # The background class comes first with torchvision, not last, and has rows of its own everywhere.
        renamed = super().rename_published(state)
        if "roi_head.bbox_head.fc_cls.weight" in state:
            for kind in ("weight", "bias"):
                logits = renamed[f"roi_heads.box_predictor.cls_score.{kind}"]
                renamed[f"roi_heads.box_predictor.cls_score.{kind}"] = logits.roll(1, 0)
                for name, rows in (
                    (f"roi_heads.box_predictor.bbox_pred.{kind}", 4),
                    (f"roi_heads.mask_predictor.mask_fcn_logits.{kind}", 1),
                ):
                    value = renamed[name]
                    renamed[name] = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
        return renamed


def normalisation(cfg: PretrainedCfg, channels: int) -> dict[str, list[float]]:
    """torchvision's keywords for a backbone's mean and std; of other channels than three, the average."""
    both = {"image_mean": list(cfg.mean), "image_std": list(cfg.std)}
    if channels == 3:
        return both
    return {name: [sum(values) / len(values)] * channels for name, values in both.items()}


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
    backbone_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """RetinaNet or Mask R-CNN on a timm backbone: a torchvision detector.

    Args:
        name: `"retinanet"` or `"mask_rcnn"`.
        backbone: timm name of a model with maps at strides 4, 8, 16 and 32.
        num_classes: classes of objects, without the background. Labels run from 1.
        pretrained: start from the backbone's published weights.
        width: channels of the pyramid and the heads.
        anchor_scale: side of a level's smallest anchor, in strides; 4 (RetinaNet) or 8 (Mask R-CNN) if None.
            Halve it for objects that are small beside the image.
        max_detections: most objects that are found in an image.
        min_size: the image's shorter side is brought to this many pixels; of several, training takes one at
            random and evaluation the last,
        max_size: but its longer side to at most so many.
        backbone_args: further keywords of the backbone, such as `drop_path_rate` or `in_chans`. The published
            detectors, CrossFormer++'s too, have `group_size=7, 7, 7, 7`, `interval=8, 4, 2, 1` and
            `lda_span="map"`, in training and test: the defaults of CrossFormer-T/S/B/L. Their files do not
            say so themselves.
        **kwargs: of torchvision's `RetinaNet` or `MaskRCNN`, such as `score_thresh`, `box_score_thresh`,
            `image_mean` and `image_std`: the backbone's, or their average where the images have not three
            channels.

    Returns:
        A module that takes a list of images (3, H, W) in 0..1, of any sizes, and in training a list of
        targets (`boxes` (n, 4) in pixels, `labels` (n,), `masks` (n, H, W)). It returns a dict of losses in
        training, otherwise a list of dicts with `boxes`, `labels`, `scores` and, from Mask R-CNN, `masks`
        (n, 1, H, W) as probabilities.

    Raises:
        ValueError: unknown detector or backbone, or a backbone without such maps.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector '{name}'; there are: {', '.join(DETECTORS)}")
    cfg = find_model(backbone)
    body = create_backbone(backbone, pretrained, **(backbone_args or {}))
    return DETECTORS[name](
        body,
        num_classes,
        width,
        anchor_scale,
        max_detections,
        min_size=min_size,
        max_size=max_size,
        **{**normalisation(cfg, (backbone_args or {}).get("in_chans", 3)), **kwargs},
    )
