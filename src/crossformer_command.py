"""Entry point of the installed command. Prints help without the slow import of the library."""

import os
import sys
from importlib.metadata import version

HELP = """\
usage: crossformer COMMAND [options]      crossformer COMMAND --help lists all options of a command

CrossFormer and CrossFormer++: train, evaluate and apply vision models on your images.

  check           check your data before training: labels, classes, images, duplicates
  train           train a model; without options, a quickstart on bundled handwritten digits
  validate        evaluate a checkpoint and plot its results
  predict         predict images, folders and videos; writes pictures and JSON
  inspect         show groups, attention and class activation of a network for one image
  compare         train a grid of models, options and seeds, and write a table
  export          export a trained network to ONNX, OpenVINO or torch.export, for any image size
  share           save a trained classifier for timm and transformers, or upload it
  benchmark       time models side by side: inference and training, eager and compiled
  benchmark-data  check whether a training run is input-bound
  demo            serve a page that shows predictions and attention for uploaded images
  info            compare parameters and MACs of a model with the published values
  download        download published weights

tasks (--task, or inferred from the data): classification, detection, segmentation

examples
  crossformer train
  crossformer check my_images
  crossformer train my_images --epochs 30
  crossformer train my_images --model.backbone crossformer_small --batch-size 32 --lr 3e-4
  crossformer train --config classification/crossformer_small.yaml --data.root imagenet --trainer.devices 8
  crossformer train --config quickstart/detection.yaml
  crossformer train my_coco --model.detector mask_rcnn
  crossformer train my_maps --model.segmenter upernet
  crossformer train --resume runs/classification-crossformer_small
  crossformer validate runs/classification-crossformer_small
  crossformer predict runs/classification-crossformer_small photo.jpg more_photos/
  crossformer inspect crossformer_nano.cifar10 photo.jpg
  crossformer export crossformer_nano.cifar10 --output nano.onnx
  crossformer benchmark crossformer_small swin_tiny_patch4_window7_224 --engine eager compiled
  crossformer info crossformer_small --detector mask_rcnn
  crossformer download crossformer_small

data
  my_images  train/<class>/… and val/<class>/… with images of each class
  my_coco    annotations/instances_train.json and instances_val.json, images/train/ and images/val/
  my_yolo    data.yaml, images/train/ and labels/train/, the same for val/
  my_voc     Annotations/*.xml, JPEGImages/, ImageSets/Main/train.txt and val.txt
  my_maps    images/training/ and annotations/training/ (PNG, one class index per pixel), the same for
             validation/, and classes.json

--debug with any command shows the traceback of an error.   --version shows the version.
"""


def print_help_or_version(arguments: list[str]) -> bool:
    """Print help or the version if requested.

    Args:
        arguments: Command-line arguments after the program.

    Returns:
        ``True`` if help or version was printed.
    """
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(HELP, end="")
        return True
    if first == "--version":
        print(version("crossformer-vision"))
        return True
    return False


def main() -> None:
    """Run the command and exit with its code."""
    # Idle OpenMP threads stop spinning early, so that a busy core does not stall all threads. libgomp reads
    # this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # silences torch's profiler in benchmarks
    if print_help_or_version(sys.argv[1:]):
        sys.exit(0)
    from crossformer_vision.cli import main as run

    sys.exit(run(sys.argv[1:]))
