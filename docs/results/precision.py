"""Accuracy of a classifier or segmenter in 32 and 16 bits, and of exported files, on labeled images.

    python docs/results/precision.py cifar10/test.tar crossformer_nano.cifar10 nano-int8.xml
    python docs/results/precision.py camvid/images/validation runs/camvid camvid-int8.xml

A classifier needs a tar file with <class>/<image>. A segmenter needs a folder of images in
images/, and class maps in annotations/, as in ADE20K.
"""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crossformer_vision import Predictor, load_predictor


def variants(model: str) -> Iterator[tuple[str, Predictor]]:
    """Predictors of a network in float32, and in 16 bits unless it is an exported file."""
    yield "unchanged", load_predictor(model, "cpu")
    if Path(model).suffix in (".xml", ".onnx"):
        return
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype} autocast", load_predictor(model, "cpu").to(dtype=dtype)
        predictor = load_predictor(model, "cpu")
        predictor.net.to(dtype).register_forward_pre_hook(lambda _, args, dtype=dtype: (args[0].to(dtype),))
        predictor.net.register_forward_hook(lambda _, args, output: output.float())
        yield f"{dtype} weights", predictor


def accuracy(predictor: Predictor, data: Path) -> float:
    """Top-1 accuracy on a tar file of images."""
    with tarfile.open(data) as tar:
        members = [member for member in tar if member.isfile()]
        images = [(member.name.split("/")[-2], tar.extractfile(member).read()) for member in members]
    correct = 0
    for start in range(0, len(images), 256):
        batch = images[start : start + 256]
        results = predictor([io.BytesIO(content) for _, content in batch])
        correct += sum(r.classes[r.probabilities.argmax()] == label for r, (label, _) in zip(results, batch))
    return correct / len(images)


def mean_iou(predictor: Predictor, data: Path) -> float:
    """Mean IoU on a folder of images with class maps. Values beyond the classes are ignored."""
    count = len(predictor.classes)
    confusion = np.zeros((count, count), np.int64)
    for file in sorted(file for file in data.iterdir() if file.is_file()):
        truth = np.array(Image.open(data.parents[1] / "annotations" / data.name / f"{file.stem}.png"))
        known = truth < count
        pairs = truth[known].astype(np.int64) * count + predictor(file).class_map[known]
        confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


if __name__ == "__main__":
    data = Path(sys.argv[1])
    for model in sys.argv[2:]:
        for variant, predictor in variants(model):
            value = (mean_iou if data.is_dir() else accuracy)(predictor, data)
            print(f"{model}, {variant}: {100 * value:.2f} %", flush=True)
