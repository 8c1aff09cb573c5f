"""Checkpoints of small models with random weights, and a test image."""

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from crossformer_vision import create_detector, create_segmenter

CLASSES = ["cat", "dog", "猫"]


def classifier_checkpoint(model: str, **keywords) -> dict:
    """Return the checkpoint content of a small classifier."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=3, **keywords)
    hyper = {"backbone": model, "num_classes": 3, "model_args": keywords}
    content = {"task": "classification", "classes": CLASSES, "image": resolve_model_data_config(net)}
    return {**content, "hyper_parameters": hyper, "state_dict": net.state_dict()}


def segmenter_checkpoint(model: str, kind: str = "semantic_fpn", **keywords) -> dict:
    torch.manual_seed(0)
    net = create_segmenter(kind, model, 3, width=16, backbone_args=keywords)
    hyper = {
        "segmenter": kind,
        "backbone": model,
        "num_classes": 3,
        "width": 16,
        "model_args": keywords,
    }
    image = {"short_side": 64, "long_side": None, "size_divisor": 1, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    content = {"task": "segmentation", "classes": CLASSES, "image": image, "hyper_parameters": hyper}
    return {**content, "state_dict": net.state_dict()}


def detector_checkpoint(kind: str, model: str, **keywords) -> dict:
    """Return a detector checkpoint whose scores differ enough that rounding does not reorder detections."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "width": 16, "min_size": 96, "max_size": 160}
    net = create_detector(kind, model, backbone_args=keywords, **options)
    heads = [net.head] if kind == "retinanet" else [net.rpn.head, net.roi_heads]
    for layer in (layer for head in heads for layer in head.modules()):
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    if kind == "retinanet":
        torch.nn.init.constant_(net.head.classification_head.cls_logits.bias, -1.0)
    else:
        torch.nn.init.normal_(net.roi_heads.box_predictor.bbox_pred.weight, std=0.05)
    hyper = {"detector": kind, "backbone": model, "model_args": keywords, **options}
    content = {"task": "detection", "classes": CLASSES, "category_ids": [3, 5, 8], "hyper_parameters": hyper}
    return {**content, "state_dict": net.state_dict()}


def retinanet_checkpoint():
    net = create_detector("retinanet", "crossformer_nano", 3, width=32, min_size=64, max_size=96)
    options = {"detector": "retinanet", "backbone": "crossformer_nano", "num_classes": 3, "width": 32}
    options |= {"min_size": 64, "max_size": 96, "model_args": None}
    said = {"task": "detection", "classes": ["a", "b", "c"]}
    return {**said, "hyper_parameters": options, "state_dict": net.state_dict()}


def write_image(path, width=150, height=97):
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return path
