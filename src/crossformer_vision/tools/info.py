"""Parameters and operations of a model, compared with the published ones."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet

from crossformer_vision.errors import check_range
from crossformer_vision.models import find_model, img_size_kwargs
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.models.dense.detectors import create_detector
from crossformer_vision.models.dense.segmenters import create_segmenter
from crossformer_vision.models.grouping import padded_size
from crossformer_vision.models.variants import published_groups
from crossformer_vision.types import JsonObject, Kwargs

# Parameters in millions and operations in billions, counted as in the papers (see `paper_operations`): tables
# 1 and 3 to 5 of CrossFormer, and those of CrossFormer++. Classifiers at 224x224, detectors at 1280x800,
# segmenters at 1024x1024. RetinaNet on ++S is omitted because both of its values are misprinted.
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


def create_network(model: str, head: str | None, backbone_args: Kwargs, **detector_args: Any) -> nn.Module:
    """Create a classifier, or a detector or segmenter with the published number of classes.

    Args:
        model: timm model.
        head: Detector or segmenter on it, or ``None`` for the classifier.
        backbone_args: Arguments of the model.
        **detector_args: Arguments of a detector.
    """
    head_name: Any = head
    if head in DETECTORS:
        return create_detector(head_name, model, backbone_args=backbone_args, **detector_args)
    if head:
        return create_segmenter(head_name, model, backbone_args=backbone_args)
    return timm.create_model(model, **backbone_args)


def create_meta_network(model: str, head: str | None, backbone_args: Kwargs) -> nn.Module:
    """Create a network in evaluation mode on the meta device. See `create_network`.

    Args:
        model: timm model.
        head: Detector or segmenter on it, or ``None``.
        backbone_args: Arguments of the model.
    """
    with torch.device("meta"):
        return create_network(model, head, backbone_args).eval()


@torch.no_grad()
def forward_image(net: nn.Module, height: int, width: int) -> None:
    """Run the forward pass of one image on the meta device.

    As published, the box head of Mask R-CNN gets 1000 proposals and its mask head 100.

    Args:
        net: Network of `create_meta_network`.
        height: Height of the image.
        width: Width of the image.
    """
    image = torch.zeros(1, 3, height, width, device="meta")
    if not isinstance(net, (RetinaNet, GeneralizedRCNN)):
        net(image)
        return
    maps = net.backbone(image)
    if isinstance(net, RetinaNet):
        net.head(list(maps.values()))
        return
    heads, channels = net.roi_heads, net.backbone.out_channels
    net.rpn.head(list(maps.values()))
    heads.box_predictor(heads.box_head(torch.zeros(1000, channels, 7, 7, device="meta")))
    heads.mask_predictor(heads.mask_head(torch.zeros(100, channels, 14, 14, device="meta")))


def count_macs(net: nn.Module, height: int, width: int) -> float:
    """Multiply-accumulates of matrix products, convolutions and attention for one image.

    Args:
        net: Network of `create_meta_network`.
        height: Height of the image.
        width: Width of the image.
    """
    with FlopCounterMode(display=False) as counter:
        forward_image(net, height, width)
    return counter.get_total_flops() / 2


def paper_operations(net: nn.Module, height: int, width: int) -> float:
    """Operations for one image, counted as in the papers, which call them FLOPs.

    Counts the multiply-accumulates of convolutions, linear layers and both matrix products of attention over
    the padded map, and one operation for each bias of a convolution, output of a ReLU and input of a pooling
    layer. Norms, GELU, softmax and interpolation are not counted. Transposed convolutions are counted
    at the positions of their input. The background of the published Mask R-CNN has no boxes and masks.

    Args:
        net: Network of `create_meta_network`.
        height: Height of the image.
        width: Width of the image.
    """
    total = 0.0
    background: dict[nn.Module, float] = {}  # share of a layer's outputs that belong to the background
    if isinstance(net, GeneralizedRCNN):
        heads = net.roi_heads
        for layer in (heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits):
            background[layer] = 1 / heads.box_predictor.cls_score.out_features

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
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
        elif isinstance(module, TwoMLPHead):  # its two ReLUs are not modules
            total += 2 * output.numel()
        elif isinstance(module, LongShortAttention):
            layout = module.layout(x.shape[1], x.shape[2])
            H, W = padded_size(layout)
            total += 2 * H * W * layout.gh * layout.gw * x.shape[3]

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    forward_image(net, height, width)
    for hook in hooks:
        hook.remove()
    return total


# ------------------------------------------------------------------------------------------------------------
# Summary
# ------------------------------------------------------------------------------------------------------------


def model_stats(model: str, head: str | None = None, size: tuple[int, int] | None = None) -> JsonObject:
    """Parameters and multiply-accumulates of a model, and the published values if there are any.

    Args:
        model: timm model.
        head: ``retinanet``, ``mask_rcnn``, ``semantic_fpn`` or ``upernet``. ``None`` for the classifier.
        size: Height and width of the image. ``None`` for the published size of the task.

    Returns:
        ``model``, ``head``, ``classes``, ``size``, ``parameters`` and ``macs``. For models of the papers also
        ``paper_gflops``, counted as in the papers for ``paper_configuration`` (arguments of the backbone and
        size of the image), and the ``published`` values.

    Raises:
        ValueError: If the model is unknown.
    """
    cfg = find_model(model)
    published_size = (800, 1280) if head in DETECTORS else (1024, 1024) if head else cfg.input_size[-2:]
    height, width = size or published_size
    check_range("size", min(height, width), 1)
    sized = img_size_kwargs(model, height) if not head and height == width else {}
    net = create_meta_network(model, head, sized)
    stats: JsonObject = {
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
        paper = create_meta_network(model, head, groups)
        stats["paper_gflops"] = round(paper_operations(paper, *published_size) / 1e9, 2)
        stats["paper_configuration"] = {**groups, "size": list(published_size)}
    if (name, head) in PUBLISHED:
        parameters, giga = PUBLISHED[name, head]
        stats["published"] = {"parameters_millions": parameters, "gflops": giga}
    return stats


def describe(model: str, head: str | None = None, size: tuple[int, int] | None = None) -> str:
    """Format `model_stats` as text.

    Args:
        model: timm model.
        head: Detector or segmenter on it, or ``None``.
        size: Height and width of the image, or ``None``.
    """
    stats = model_stats(model, head, size)
    height, width = stats["size"]
    macs = stats["macs"] / 1e9
    lines = [
        f"{f'{head} on ' if head else ''}{model}, {stats['classes']} classes",
        f"  parameters  {stats['parameters'] / 1e6:.1f} M",
        f"  MACs        {macs:.{1 if macs > 30 else 3}f} G at {width}x{height} (width x height)",
    ]
    if "paper_gflops" in stats:
        paper = stats["paper_configuration"]
        names = {"group_size": "groups", "interval": "intervals"}
        groups = [f"{n} {'/'.join(map(str, paper[key]))}" for key, n in names.items() if key in paper]
        at = "x".join(map(str, reversed(paper["size"])))
        where = ", ".join([at, *groups])
        lines.append(f"  as in paper {stats['paper_gflops']:.2f} G at {where}")
    if "published" in stats:
        published = stats["published"]
        lines.append(f"  published   {published['parameters_millions']} M, {published['gflops']} G")
    return "\n".join(lines)
