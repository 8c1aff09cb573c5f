"""Load a predictor from a run, a checkpoint, published weights or an exported file."""

import io
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from crossformer_vision.data.images import EXTENSIONS
from crossformer_vision.data.rasters import PixelFormat
from crossformer_vision.errors import UserError, check_range
from crossformer_vision.inference.exported import load_exported
from crossformer_vision.inference.predictor import (
    ClassificationPredictor,
    DetectionPredictor,
    ModelInfo,
    Predictor,
    SegmentationPredictor,
    best_device,
    check_device,
)
from crossformer_vision.inference.published import published_checkpoint
from crossformer_vision.models.build import build_model
from crossformer_vision.types import Checkpoint
from crossformer_vision.weights.loading import load_weights
from crossformer_vision.weights.reading import read_checkpoint

Source = str | os.PathLike[str] | bytes | BinaryIO | Checkpoint


def load_predictor(
    source: Source,
    device: str | torch.device | None = None,
    score_threshold: float | None = None,
    tile_size: int | None = None,
    model: str | None = None,
) -> Predictor:
    """Load a trained network, ready to predict images.

    Args:
        source: Run directory (its ``best.ckpt`` is used) or checkpoint file of a run; bytes, open file or
            content of such a file; name of published weights (``crossformer_nano.cifar10`` is bundled,
            ``resnet18``, ``mask_rcnn_crossformer_small``); or exported file (``.onnx`` or OpenVINO's
            ``.xml``), which runs on the CPU.
        device: ``cpu``, ``cuda``, …; ``None`` for the best available.
        score_threshold: Minimum score of objects, for detectors. ``None`` for that of each class at which the
            F1 score was best in validation, or 0.5 for weights without it.
        tile_size: Side in pixels of overlapping tiles in which a detector searches larger images for objects
            that are too small in the whole image. ``None`` for whole images.
        model: Name of the published or timm model, if ``source`` is a file with nothing but its weights.

    Returns:
        Predictor of the task.

    Raises:
        UserError: If the source is not a trained network, the device does not exist, or an option does not
            apply.
    """
    if score_threshold is not None:
        check_range("score_threshold", score_threshold, 0, 1)
    if tile_size is not None:
        check_range("tile_size", tile_size, 64)
    if isinstance(source, str) and not source.strip():
        raise UserError("load_predictor(''): the name is empty. Did a run save no checkpoint?")
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path and path.suffix.lower() in EXTENSIONS:
        raise UserError(
            f"{path}: is an image. The first argument is a run, a checkpoint or the name of published "
            f"weights: crossformer predict crossformer_nano.cifar10 {path}"
        )
    if path and model is None and path.suffix in (".onnx", ".xml") and path.is_file():
        net, info = load_exported(path)
        if score_threshold is not None and score_threshold < info.min_score:
            raise UserError(
                f"{path}: was exported for scores of at least {info.min_score:g}, not {score_threshold:g}"
            )
        return create_predictor(net, info, check_device("cpu"), score_threshold, tile_size)
    checkpoint, name = find_checkpoint(source, model)
    net, info = restore_model(checkpoint, name)
    return create_predictor(net, info, best_device(device), score_threshold, tile_size)


def find_checkpoint(source: Source, model: str | None) -> tuple[Checkpoint, str]:
    """Content of a checkpoint, and its name for messages.

    Args:
        source: See ``load_predictor``.
        model: Name of the model whose weights ``source`` contains, if it is no checkpoint of a run.

    Raises:
        UserError: If it cannot be read or there is no such model.
    """
    if model is not None:
        if not isinstance(source, (str, os.PathLike)):
            raise UserError(f"model '{model}': pass the path of the file with its weights")
        if (checkpoint := published_checkpoint(model, str(source))) is None:
            raise UserError(f"--model {model}: neither a published model nor one of timm")
        return checkpoint, str(source)
    if isinstance(source, dict):
        return source, "checkpoint"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        path = path / "best.ckpt" if path.is_dir() else path
        named = None if path.exists() else published_checkpoint(str(path))
        return named or read_checkpoint(path), str(path)
    return read_checkpoint(io.BytesIO(source) if isinstance(source, bytes) else source), "checkpoint"


def restore_model(checkpoint: Checkpoint, source: str) -> tuple[nn.Module, ModelInfo]:
    """Build the network of a run's checkpoint and load its weights.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name, for messages.

    Raises:
        UserError: If it is no checkpoint of a run.
    """
    if "task" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise UserError(
            f"{source}: not a checkpoint of a run, such as best.ckpt. Name the model of these weights "
            "(--model)"
        )
    options = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    info = ModelInfo(
        task=checkpoint["task"],
        classes=checkpoint["classes"],
        source=source,
        image=checkpoint.get("image") or {},
        options=options,
        category_ids=checkpoint.get("category_ids") or None,
        values=checkpoint.get("values") or None,
        test_scales=tuple(options.get("test_scales") or (1.0,)),
        pixel_format=PixelFormat(**checkpoint.get("pixel_format") or {}),
        display_channels=checkpoint.get("display_channels"),
        thresholds=checkpoint.get("thresholds"),
    )
    if info.task == "segmentation":
        info.test = {
            "flip": options.get("test_flip", False),
            "window": options.get("window"),
            "stride": options.get("window_stride"),
        }
    net = build_model(info.task, options)
    load_weights(net, checkpoint["state_dict"], source, adapt_classifier=False)
    return net, info


def create_predictor(
    net: nn.Module,
    info: ModelInfo,
    device: torch.device,
    score_threshold: float | None,
    tile_size: int | None,
) -> Predictor:
    """Create the predictor of a task.

    Args:
        net: Network of the task.
        info: Task, classes and preprocessing.
        device: Device of the network.
        score_threshold: Minimum score of objects, ``None`` for the network's own.
        tile_size: Side of tiles in pixels, ``None`` for whole images.

    Raises:
        UserError: If tiles are requested for another task than detection.
    """
    if info.task == "detection":
        return DetectionPredictor(net, info, device, score_threshold, tile_size)
    if tile_size is not None:
        raise UserError(f"--tile-size {tile_size}: only for detectors, but {info.source} is for {info.task}")
    if info.task == "segmentation":
        return SegmentationPredictor(net, info, device)
    return ClassificationPredictor(net, info, device)
