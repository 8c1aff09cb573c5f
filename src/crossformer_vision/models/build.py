"""Build the network of a task from the options of a run, with random weights and without Lightning."""

import timm
from torch import nn

from crossformer_vision.models import img_size_kwargs, in_chans_kwargs
from crossformer_vision.models.dense.detectors import create_detector, normalization_overrides
from crossformer_vision.models.dense.segmenters import create_segmenter
from crossformer_vision.types import Kwargs


def build_model(task: str, options: Kwargs) -> nn.Module:
    """Build a network with random weights.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        options: Options of the task's LightningModule. Training options are ignored.

    Raises:
        UserError: If the options are invalid or the model does not accept them.
    """
    backbone, num_classes = options["backbone"], options["num_classes"]
    model_args = {**in_chans_kwargs(options.get("in_chans", 3)), **(options.get("model_args") or {})}
    if task == "classification":
        size = img_size_kwargs(backbone, options.get("image_size"))
        return timm.create_model(backbone, num_classes=num_classes, **{**size, **model_args})
    if task == "segmentation":
        given = _given(options, "width", "dropout")
        kind = options.get("segmenter", "semantic_fpn")
        return create_segmenter(kind, backbone, num_classes, backbone_args=model_args, **given)
    given = _given(options, "width", "anchor_scale", "max_detections", "min_size", "max_size")
    return create_detector(
        options.get("detector", "retinanet"),
        backbone,
        num_classes,
        backbone_args=model_args,
        **given,
        **{
            **normalization_overrides(options.get("image_mean"), options.get("image_std")),
            **(options.get("detector_args") or {}),
        },
    )


def _given(options: Kwargs, *names: str) -> Kwargs:
    """Options that have a value."""
    return {name: options[name] for name in names if options.get(name) is not None}
