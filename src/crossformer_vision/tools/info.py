"""Parameters and operations of a model, beside the published ones."""

from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from crossformer_vision.errors import check_range
from crossformer_vision.models import find_model, fixed_size
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.models.dense.detectors import create_detector
from crossformer_vision.models.dense.segmenters import create_segmenter
from crossformer_vision.models.grouping import padded_size
from crossformer_vision.models.variants import published_groups

# Parameters in millions, and operations in billions by the papers' count (`paper_operations`): tables 1 and 3
# to 5 of CrossFormer, and those of CrossFormer++. Classifiers at 224x224, detectors at 1280x800, segmenters
# at 1024x1024. RetinaNet on ++S is left out: both its figures are misprinted there.
PUBLISHED = {
    ("crossformer_tiny", None): (27.8, 2.9),
    ("crossformer_small", None): (30.7, 4.9),
    ("crossformer_base", None): (52.0, 9.2),
    ("crossformer_large", None): (92.0, 16.1),
    ("crossformer_pp_small", None): (23.3, 4.9),
    ("crossformer_pp_base", None): (52.0, 9.5),
    ("crossformer_pp_large", None): (92.0, 16.6),
    ("crossformer_pp_huge", None): (96.0, 21.8),
    ("crossformer_small", "retinanet"): (40.8, 282.0),
    ("crossformer_base", "retinanet"): (62.1, 389.0),
    ("crossformer_pp_base", "retinanet"): (62.2, 389.0),
    ("crossformer_small", "mask_rcnn"): (50.2, 301.0),
    ("crossformer_base", "mask_rcnn"): (71.5, 407.9),
    ("crossformer_pp_small", "mask_rcnn"): (43.0, 287.4),
    ("crossformer_pp_base", "mask_rcnn"): (71.5, 408.0),
    ("crossformer_small", "semantic_fpn"): (34.3, 209.8),
    ("crossformer_base", "semantic_fpn"): (55.6, 320.1),
    ("crossformer_large", "semantic_fpn"): (95.4, 482.7),
    ("crossformer_pp_small", "semantic_fpn"): (27.1, 199.5),
    ("crossformer_pp_base", "semantic_fpn"): (55.6, 331.1),
    ("crossformer_small", "upernet"): (62.3, 979.5),
    ("crossformer_base", "upernet"): (83.6, 1089.7),
    ("crossformer_large", "upernet"): (125.5, 1257.8),
    ("crossformer_pp_small", "upernet"): (53.1, 963.5),
    ("crossformer_pp_base", "upernet"): (83.7, 1089.8),
}
DETECTORS = ("retinanet", "mask_rcnn")


# ------------------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------------------


def network(model: str, head: str | None, backbone_args: dict[str, Any], **detector_args: Any) -> nn.Module:
    """A classifier, or a detector or segmenter of as many classes as published."""
    named: Any = head
    if head in DETECTORS:
        return create_detector(named, model, backbone_args=backbone_args, **detector_args)
    if head:
        return create_segmenter(named, model, backbone_args=backbone_args)
    return timm.create_model(model, **backbone_args)


def build(model: str, head: str | None, backbone_args: dict[str, Any]) -> nn.Module:
    """The `network` as shapes alone, in evaluation."""
    with torch.device("meta"):
        return network(model, head, backbone_args).eval()


@torch.no_grad()
def run(net: Any, height: int, width: int) -> None:
    """One forward pass of an image, of what `build` gave.

    Of Mask R-CNN with 1000 proposals through the box head and 100 through the mask head, as published.
    """
    image = torch.zeros(1, 3, height, width, device="meta")
    if not hasattr(net, "transform"):  # not one of torchvision's detectors
        net(image)
        return
    maps = net.backbone(image)
    if hasattr(net, "head"):
        net.head(list(maps.values()))
        return
    heads, channels = net.roi_heads, net.backbone.out_channels
    net.rpn.head(list(maps.values()))
    heads.box_predictor(heads.box_head(torch.zeros(1000, channels, 7, 7, device="meta")))
    heads.mask_predictor(heads.mask_head(torch.zeros(100, channels, 14, 14, device="meta")))


def count_macs(net: nn.Module, height: int, width: int) -> float:
    """Multiply-accumulates of an image: matrix products, convolutions and attention, nothing else."""
    with FlopCounterMode(display=False) as counter:
        run(net, height, width)
    return counter.get_total_flops() / 2


def paper_operations(net: nn.Module, height: int, width: int) -> float:
    """Operations of an image as the papers count them, in what they call FLOPs.

    Multiply-accumulates of convolutions and linear layers and of both products of the attention over the
    padded map; one more for each convolution's bias, each output of a ReLU and each input of a pooling layer;
    nothing for norms, GELU, softmax and interpolation. Transposed convolutions count at their input's
    positions. The background has no boxes and masks in the published Mask R-CNN.
    """
    total = 0.0
    background: dict[nn.Module, float] = {}  # share of a layer's outputs
    if hasattr(net, "roi_heads"):
        heads: Any = net.roi_heads
        for layer in (heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits):
            background[layer] = 1 / heads.box_predictor.cls_score.out_features

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        x, share = inputs[0], 1 - background.get(module, 0.0)
        if isinstance(module, nn.ConvTranspose2d):
            total += x.numel() * module.weight[0].numel() + output.numel()
        elif isinstance(module, nn.Conv2d):
            total += share * output.numel() * (module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, nn.Linear):
            total += share * output.numel() * module.in_features
        elif isinstance(module, nn.ReLU):
            total += output.numel()
        elif isinstance(module, (nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AvgPool2d)):
            total += x.numel()
        elif isinstance(module, TwoMLPHead):  # its two ReLUs are no modules
            total += 2 * output.numel()
        elif isinstance(module, LongShortAttention):
            layout = module.layout(x.shape[1], x.shape[2])
            H, W = padded_size(layout)
            total += 2 * H * W * layout.gh * layout.gw * x.shape[3]

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    run(net, height, width)
    for hook in hooks:
        hook.remove()
    return total


# ------------------------------------------------------------------------------------------------------------
# What the command prints
# ------------------------------------------------------------------------------------------------------------


def figures(model: str, head: str | None = None, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Parameters and multiply-accumulates of a model as it is built here, and what the papers say of theirs.

    Args:
        model: any timm model.
        head: `retinanet`, `mask_rcnn`, `semantic_fpn` or `upernet` on it, or None.
        size: H, W of the image; the task's own if None.

    Returns:
        `model`, `head`, `classes`, `size`, `parameters`, `macs`; of the papers' models also `paper_gflops`,
        by the papers' count, of the `paper_configuration` (the backbone's keywords and the image's size), and
        what was `published`.

    Raises:
        ValueError: unknown model.
    """
    cfg = find_model(model)
    own = (800, 1280) if head in DETECTORS else (1024, 1024) if head else cfg.input_size[-2:]
    height, width = size or own
    check_range("size", min(height, width), 1)
    sized = fixed_size(model, height) if not head and height == width else {}
    net: Any = build(model, head, sized)
    found: dict[str, Any] = {
        "model": model,
        "head": head,
        "classes": 80 if head in DETECTORS else 150 if head else net.num_classes,
        "size": [height, width],
        "parameters": sum(p.numel() for p in net.parameters()),
        "macs": round(count_macs(net, height, width)),
    }
    name = model.split(".")[0]
    if name.startswith("crossformer") and name != "crossformer_nano":
        groups = published_groups(name, head)
        paper = build(model, head, groups)
        found["paper_gflops"] = round(paper_operations(paper, *own) / 1e9, 2)
        found["paper_configuration"] = {**groups, "size": list(own)}
    if (name, head) in PUBLISHED:
        parameters, giga = PUBLISHED[name, head]
        found["published"] = {"parameters_millions": parameters, "gflops": giga}
    return found


def describe(model: str, head: str | None = None, size: tuple[int, int] | None = None) -> str:
    """`figures` in some lines for a person."""
    found = figures(model, head, size)
    height, width = found["size"]
    macs = found["macs"] / 1e9
    lines = [
        f"{f'{head} on ' if head else ''}{model}, {found['classes']} classes",
        f"  parameters  {found['parameters'] / 1e6:.1f} M",
        f"  MACs        {macs:.{1 if macs > 30 else 3}f} G at {width}x{height} (width x height)",
    ]
    if "paper_gflops" in found:
        paper = found["paper_configuration"]
        names = {"group_size": "groups", "interval": "intervals"}
        groups = [f"{n} {'/'.join(map(str, paper[key]))}" for key, n in names.items() if key in paper]
        at = "x".join(map(str, reversed(paper["size"])))
        where = ", ".join([at, *groups])
        lines.append(f"  papers' way {found['paper_gflops']:.2f} G at {where}")
    if "published" in found:
        published = found["published"]
        lines.append(f"  published   {published['parameters_millions']} M, {published['gflops']} G")
    return "\n".join(lines)
