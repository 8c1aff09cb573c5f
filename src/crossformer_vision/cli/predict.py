"""``crossformer predict``: predict images, folders and videos."""

from pathlib import Path
from typing import Literal

from PIL import Image

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.inference.files import predict_files
from crossformer_vision.inference.load import load_predictor


def predict(
    source: str,
    images: list[str],
    /,
    *,
    output: str = "predictions",
    save: Literal["all", "results", "none"] = "all",
    json: bool = False,
    score_threshold: float | None = None,
    tile_size: int | None = None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Predict images with a trained model, and write pictures and JSON.

    Args:
        source: Run directory (its best.ckpt is used), checkpoint file of a run, name of published weights
            (crossformer_nano.cifar10 is bundled; resnet18; mask_rcnn_crossformer_small), or exported file
            (.onnx, .xml).
        images: Image files, folders, 'patterns*.jpg', videos.
        output: Folder for pictures and JSON. Those of an earlier call are replaced.
        save: What to write to the output folder: pictures and results, only results, or nothing.
        json: Print results as JSON, one line per image.
        score_threshold: Minimum score of objects; by default that of each class at which the F1 score was
            best in validation, or 0.5 for weights without it.
        tile_size: Detectors only: side in pixels of overlapping tiles in which large images are searched for
            small objects. Lifts the limit on the size of images.
        model: Model of a file of published weights: crossformer_small, mask_rcnn_crossformer_small, …
        device: cpu, cuda, …; the best available by default.
    """
    if tile_size:
        Image.MAX_IMAGE_PIXELS = None  # tiles are for images beyond this limit
    predictor = load_predictor(source, device, score_threshold, tile_size, model)
    output_dir = None if save == "none" else Path(output)
    predict_files(predictor, images, output_dir, save == "all", json)


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(predict, "predict", arguments)
