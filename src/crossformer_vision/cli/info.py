"""``crossformer info``: show parameters and MACs of a model."""

import json as json_module
from typing import Literal

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.errors import UserError
from crossformer_vision.tools.info import describe, model_stats


def info(
    model: str,
    /,
    *,
    detector: Literal["retinanet", "mask_rcnn"] | None = None,
    segmenter: Literal["semantic_fpn", "upernet"] | None = None,
    size: list[int] | None = None,
    json: bool = False,
) -> None:
    """Compare parameters and multiply-accumulates (MACs) of a model with the published values.

    Args:
        model: Any timm model, such as crossformer_small.
        detector: Detector with the model as backbone.
        segmenter: Segmenter with the model as backbone.
        size: Height and width of the image; those of the task by default.
        json: Print JSON.
    """
    if detector and segmenter:
        raise UserError("--detector and --segmenter: choose one of them")
    if size is not None and len(size) != 2:
        raise UserError(f"--size {' '.join(map(str, size))}: not a height and a width, such as 224 224")
    head = detector or segmenter
    image_size = (size[0], size[1]) if size else None
    if json:
        print(json_module.dumps(model_stats(model, head, image_size), indent=2))
    else:
        print(describe(model, head, image_size))


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(info, "info", arguments)
