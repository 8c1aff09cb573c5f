"""Parameters and multiply-accumulates of a model, beside the published ones."""

from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crossformer_vision.models import find_model
from crossformer_vision.models.detectors import create_detector
from crossformer_vision.models.segmenters import create_segmenter

# Parameters in millions and "FLOPs" in billions, by which the papers mean multiply-accumulates: table 1 of
# CrossFormer for classifiers (at 224x224), tables 3 and 4 for detectors (at 1280x800), 5 for segmenters (at
# 1024x1024), CrossFormer++.
PUBLISHED = {
    ("crossformer_tiny", None): (27.8, 2.9),
    ("crossformer_small", None): (30.7, 4.9),
    ("crossformer_base", None): (52.0, 9.2),
    ("crossformer_large", None): (92.0, 16.1),
    ("crossformer_pp_small", None): (23.3, 4.4),
    ("crossformer_pp_base", None): (52.0, 9.6),
    ("crossformer_pp_large", None): (92.0, 16.7),
    ("crossformer_pp_huge", None): (96.0, 22.0),
    ("crossformer_small", "retinanet"): (40.8, 282.0),
    ("crossformer_base", "retinanet"): (62.1, 389.0),
    ("crossformer_small", "mask_rcnn"): (50.2, 301.0),
    ("crossformer_base", "mask_rcnn"): (71.5, 407.9),
    ("crossformer_pp_small", "mask_rcnn"): (43.0, 287.4),
    ("crossformer_pp_base", "mask_rcnn"): (71.5, 408.0),
    ("crossformer_small", "semantic_fpn"): (34.3, 209.8),
    ("crossformer_base", "semantic_fpn"): (55.6, 320.1),
    ("crossformer_large", "semantic_fpn"): (95.4, 482.7),
    ("crossformer_small", "upernet"): (62.3, 979.5),
    ("crossformer_base", "upernet"): (83.6, 1089.7),
    ("crossformer_large", "upernet"): (125.5, 1257.8),
}

# The groups at test time that the published detectors' operations are counted with (table 3 of CrossFormer).
TEST_GROUPS = {"group_size": (14, 14, 7, 7), "interval": (16, 8, 2, 1)}
TEST_GROUPS_NAME = "groups 14/14/7/7, intervals 16/8/2/1"


def count_macs(model: nn.Module, *inputs: Any) -> float:
    """Multiply-accumulates of one forward pass: matrix products, convolutions and attention, nothing else."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() / 2


def detector_macs(detector: Any, height: int, width: int) -> float:
    """Those of a detector on one image; of Mask R-CNN with 1000 proposals and 100 masks, as published."""
    image = torch.zeros(1, 3, height, width)
    macs = count_macs(detector.backbone, image)
    with torch.no_grad():
        maps = list(detector.backbone(image).values())
    if hasattr(detector, "head"):
        return macs + count_macs(detector.head, maps)
    heads, channels = detector.roi_heads, detector.backbone.out_channels
    boxes = nn.Sequential(heads.box_head, heads.box_predictor)
    masks = nn.Sequential(heads.mask_head, heads.mask_predictor)
    return (
        macs
        + count_macs(detector.rpn.head, maps)
        + count_macs(boxes, torch.zeros(1000, channels, 7, 7))
        + count_macs(masks, torch.zeros(100, channels, 14, 14))
    )


def describe(
    model: str,
    detector: str | None = None,
    segmenter: str | None = None,
    size: tuple[int, int] | None = None,
) -> str:
    """Some lines for a person.

    Raises:
        ValueError: unknown model.
    """
    cfg = find_model(model)
    head = detector or segmenter

    def build(**backbone_args: Any) -> Any:
        if detector:
            return create_detector(detector, model, backbone_args=backbone_args)  # type: ignore[arg-type]
        if segmenter:
            return create_segmenter(segmenter, model, backbone_args=backbone_args)  # type: ignore[arg-type]
        return timm.create_model(model)

    def macs(net: Any) -> float:
        image = torch.zeros(1, 3, height, width)
        return detector_macs(net, height, width) if detector else count_macs(net, image)

    if detector:
        height, width = size or (800, 1280)
    else:
        height, width = size or ((1024, 1024) if segmenter else cfg.input_size[-2:])
    groups = None
    with torch.device("meta"):  # shapes alone: nothing is computed
        net = build()
        total = macs(net)
        if head and model.startswith("crossformer"):
            groups = macs(build(**TEST_GROUPS))
    classes = 80 if detector else 150 if segmenter else net.num_classes
    lines = [
        f"{f'{head} on ' if head else ''}{model}, {classes} classes",
        f"  parameters  {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M",
        f"  MACs        {total / 1e9:.{1 if total > 3e10 else 3}f} G at {width}x{height} (width x height)",
    ]
    if groups:
        lines.append(f"              {groups / 1e9:.1f} G with {TEST_GROUPS_NAME}")
    if (model.split(".")[0], head) in PUBLISHED:
        parameters, giga = PUBLISHED[model.split(".")[0], head]
        at = "1280x800" if detector else "1024x1024" if segmenter else "224x224"
        lines.append(
            f"  published   {parameters} M, {giga} G at {at}{f', {TEST_GROUPS_NAME}' if detector else ''}"
        )
    return "\n".join(lines)
