"""Memory peak (RSS) of a process for a small and then a large input: many objects, large images.

Usage: python docs/results/peak_memory.py {objects,masks,validation,class_map}
"""

import json
import logging
import resource
import sys
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image

from crossformer_vision import create_detector, load_predictor
from crossformer_vision.data.detection import DetectionData
from crossformer_vision.tasks.detection import Detection
from crossformer_vision.tasks.segmentation import Segmentation

HEIGHT, WIDTH = 800, 1216  # image of a training step, in pixels


def random_boxes(number: int) -> torch.Tensor:
    """Boxes with sides of 6 to 30 pixels, shape ``(number, 4)``."""
    corners = torch.rand(number, 2) * torch.tensor([WIDTH - 36.0, HEIGHT - 36.0])
    return torch.cat([corners, corners + 6 + 24 * torch.rand(number, 2)], 1)


def training_step(detector: str, number: int, with_masks: bool) -> None:
    """Forward and backward pass for one image with ``number`` objects."""
    net = create_detector(detector, "crossformer_nano", num_classes=2, width=32, min_size=800, max_size=1333)
    target = {"boxes": random_boxes(number), "labels": torch.ones(number, dtype=torch.int64)}
    if with_masks:
        target["masks"] = torch.zeros(number, HEIGHT, WIDTH, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
    losses = net.train()([torch.rand(3, HEIGHT, WIDTH)], [target])
    torch.stack(list(losses.values())).sum().backward()


def validate(width: int, height: int) -> None:
    """Validation of Mask R-CNN on one image with 100 detections."""
    task = Detection(
        detector="mask_rcnn",
        num_classes=2,
        width=32,
        min_size=128,
        max_size=200,
        detector_args={"box_score_thresh": 0.0},
    )
    with tempfile.TemporaryDirectory() as folder:
        box = [5, 6, 20, 15]
        content = {
            "images": [{"id": 1, "file_name": "0.png", "width": width, "height": height}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 300, "iscrowd": 0}
                | {"segmentation": [[5, 6, 25, 6, 25, 21, 5, 21]]}
            ],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
        for split in ("train", "val"):
            path = Path(folder) / "annotations" / f"instances_{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
            (Path(folder) / split).mkdir()
            Image.new("RGB", (width, height)).save(Path(folder) / split / "0.png")
        data = DetectionData(root=folder, num_workers=0, detector="mask_rcnn")
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.validate(task, data, verbose=False)


def predict_class_map(side: int) -> None:
    """Predict the class map of a square image with 150 classes, in windows."""
    options = {"backbone": "crossformer_nano", "num_classes": 150, "width": 16, "model_args": None}
    options |= {"checkpoint": None, "pretrained": False}
    task = Segmentation(**options)
    predictor = load_predictor(
        {
            "task": "segmentation",
            "classes": [f"class {k}" for k in range(150)],
            "hyper_parameters": options,
            "lda_span": None,
            "state_dict": task.net.state_dict(),
            "image": task.describe()["image"],
        },
        device="cpu",
    )
    predictor(np.zeros((side, side, 3), np.uint8))


WORK = {
    "objects": [(training_step, ("retinanet", number, False)) for number in (10, 500)],
    "masks": [(training_step, ("mask_rcnn", number, True)) for number in (10, 300)],
    "validation": [(validate, size) for size in ((300, 200), (3000, 2000))],
    "class_map": [(predict_class_map, (side,)) for side in (64, 2600)],
}


def main() -> None:
    """Print the memory peak after each input, and the increase."""
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    peaks = []
    for function, arguments in WORK[sys.argv[1]]:
        function(*arguments)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
        print(f"{function.__name__}{arguments}: {peaks[-1]:.0f} MB")
    print(f"increase: {peaks[1] - peaks[0]:.0f} MB")


if __name__ == "__main__":
    main()
