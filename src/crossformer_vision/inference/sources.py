"""Published weights by their name, in the form of a run's checkpoint."""

from typing import Any

import timm
import yaml
from timm.data import resolve_model_data_config

from crossformer_vision.data import class_names
from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model
from crossformer_vision.weights import published
from crossformer_vision.weights.checkpoints import load_checkpoint


def as_checkpoint(name: str, file: str | None = None) -> dict[str, Any] | None:
    """What a run's checkpoint would hold of these weights; None if nothing has this name.

    Args:
        name: of a published detector or segmenter (`mask_rcnn_crossformer_small`), or of a timm model with
            weights (`crossformer_nano.cifar10`, `resnet18`).
        file: where the weights are; None for where published ones come from.

    Raises:
        UserError: weights that are not here and cannot be fetched, or are another model's.
    """
    if name in published.PUBLISHED and "_crossformer_" in name:
        return _dense(name, file)
    if timm.is_model(name.split(".")[0]):
        return _classifier(name, file)
    return None


def _classifier(name: str, file: str | None) -> dict[str, Any]:
    cfg = find_model(name)
    if file is None and not (cfg.has_weights and published.at_hand(name)):
        raise UserError(f"{name}: its weights are not here and cannot be fetched; give a run or a file")
    net: Any = timm.create_model(name, pretrained=file is None)
    if file is not None:
        load_checkpoint(net, file, adapt_classifier=False)
    return {
        "task": "classification",
        "classes": list(class_names.of_weights(str(cfg.tag), net.num_classes)),
        "image": resolve_model_data_config(net),
        "hyper_parameters": {"model": name, "num_classes": net.num_classes, "model_args": None},
        "lda_span": None,
        "state_dict": net.state_dict(),
    }


def _dense(name: str, file: str | None) -> dict[str, Any]:
    """A published detector or segmenter, whose groups and sizes are those of its recipe."""
    from crossformer_vision.cli.arguments import find_config
    from crossformer_vision.tasks.detection import Detection
    from crossformer_vision.tasks.segmentation import Segmentation

    head = name.partition("_crossformer_")[0]
    detects = head in ("retinanet", "mask_rcnn")
    folder = "detection" if detects else "segmentation"
    with open(find_config(f"{folder}/{name}.yaml"), encoding="utf-8") as stream:
        recipe = yaml.safe_load(stream)
    sizes = ("detector", "min_size", "max_size") if detects else ("segmenter", "test_scales")
    options = {key: recipe["model"][key] for key in ("model", "model_args", *sizes) if key in recipe["model"]}
    classes = class_names.coco() if detects else list(class_names.ADE20K)
    options |= {"num_classes": len(classes), "pretrained": False, "checkpoint": None}
    task = Detection(**options) if detects else Segmentation(**options)
    load_checkpoint(task.net, file or published.fetch_published(name), adapt_classifier=False)
    content = {
        "task": folder,
        "classes": classes,
        "hyper_parameters": options,
        "lda_span": None,
        "state_dict": task.net.state_dict(),
    }
    if not detects:
        cfg = find_model(options["model"])
        sides = {key: recipe["data"].get(key) for key in ("short_side", "long_side")}
        divisor = recipe["data"].get("size_divisor", 1)
        content["image"] = {**sides, "size_divisor": divisor, "mean": cfg.mean, "std": cfg.std}
    return content
