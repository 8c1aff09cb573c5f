"""Published weights by name, in the form of a run's checkpoint."""

from typing import Any

import timm
from timm.data import resolve_model_data_config

from crossformer_vision.data import class_names
from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model
from crossformer_vision.models.build import build_model
from crossformer_vision.training.recipes import find_config, read_config
from crossformer_vision.types import Checkpoint
from crossformer_vision.weights import published
from crossformer_vision.weights.loading import load_checkpoint


def published_checkpoint(name: str, file: str | None = None) -> Checkpoint | None:
    """Published weights as the content of a run's checkpoint.

    Args:
        name: Name of a published detector or segmenter (``mask_rcnn_crossformer_small``), or of a timm model
            with weights (``crossformer_nano.cifar10``, ``resnet18``).
        file: File with the weights. ``None`` for the bundled, cached or downloaded one.

    Returns:
        Content of a checkpoint, or ``None`` if there is no such name.

    Raises:
        UserError: If the weights cannot be downloaded, or belong to another model.
    """
    if name in published.PUBLISHED and "_crossformer_" in name:
        return _dense_checkpoint(name, file)
    if timm.is_model(name.split(".")[0]):
        return _classifier_checkpoint(name, file)
    return None


def _classifier_checkpoint(name: str, file: str | None) -> Checkpoint:
    cfg = find_model(name)
    if file is None and not (cfg.has_weights and published.is_available(name)):
        raise UserError(f"{name}: its weights are not cached and cannot be downloaded. Pass a run or a file")
    net: Any = timm.create_model(name, pretrained=file is None)
    if file is not None:
        load_checkpoint(net, file, adapt_classifier=False)
    return {
        "task": "classification",
        "classes": list(class_names.of_weights(str(cfg.tag), net.num_classes)),
        "image": resolve_model_data_config(net),
        "hyper_parameters": {"backbone": name, "num_classes": net.num_classes, "model_args": None},
        "state_dict": net.state_dict(),
    }


def _dense_checkpoint(name: str, file: str | None) -> Checkpoint:
    """A published detector or segmenter with the groups and image sizes of its recipe."""
    is_detector = name.partition("_crossformer_")[0] in ("retinanet", "mask_rcnn")
    task = "detection" if is_detector else "segmentation"
    recipe = read_config(find_config(f"{task}/{name}.yaml"))
    keys = ("backbone", "model_args", "detector", "min_size", "max_size", "segmenter", "test_scales")
    options = {key: recipe["model"][key] for key in keys if key in recipe["model"]}
    classes = class_names.coco() if is_detector else list(class_names.ADE20K)
    options["num_classes"] = len(classes)
    net = build_model(task, options)
    load_checkpoint(net, file or published.fetch_published(name), adapt_classifier=False)
    content = {
        "task": task,
        "classes": classes,
        "hyper_parameters": options,
        "state_dict": net.state_dict(),
    }
    if not is_detector:
        cfg = find_model(options["backbone"])
        sides = {key: recipe["data"].get(key) for key in ("short_side", "long_side")}
        divisor = recipe["data"].get("size_divisor", 1)
        content["image"] = {**sides, "size_divisor": divisor, "mean": cfg.mean, "std": cfg.std}
    return content
