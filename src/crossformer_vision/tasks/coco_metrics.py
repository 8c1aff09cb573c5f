"""COCO's average precision, computed by faster-coco-eval."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor

from crossformer_vision.models.dense.masks import paste_binary_masks
from crossformer_vision.tasks.distributed import gather_lists
from crossformer_vision.types import JsonObject

# IoU threshold (None: mean of 0.5 to 0.95) and index of COCO's area range (all, small, medium, large).
PRECISIONS = {
    "ap": (None, 0),
    "ap50": (0.5, 0),
    "ap75": (0.75, 0),
    "ap_small": (None, 1),
    "ap_medium": (None, 2),
    "ap_large": (None, 3),
}
IOU_TYPES = {"box": "bbox", "mask": "segm"}

Arrays = dict[str, Any]


class CocoMetrics:
    """Accumulates detections and ground truth, and computes average precision.

    Args:
        kinds: ``"box"``, ``"mask"`` or both.
        max_detections: Maximum number of detections per image, those with the highest scores.
    """

    def __init__(self, kinds: Sequence[str], max_detections: int = 100) -> None:
        self.kinds, self.max_detections = kinds, max_detections
        self.reset()

    def reset(self) -> None:
        """Reset the metrics."""
        self.detections: list[Arrays] = []  # arrays and run-length encoded masks of each image
        self.ground_truth: list[Arrays] = []

    def update(
        self,
        detections: Sequence[dict[str, Tensor]],
        targets: Sequence[dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Add images.

        Args:
            detections: ``boxes`` ``(n, 4)``, ``labels`` and ``scores`` of each image. With masks also
                ``masks`` ``(n, 1, H, W)`` as probabilities, or ``mask_crops`` ``(n, 1, side, side)`` of the
                boxes.
            targets: ``boxes``, ``labels``, ``iscrowd`` and ``area`` of each image. With masks also ``masks``
                ``(n, H, W)`` of 0 and 1.
            sizes: Height and width of each image.
        """
        for detected, target, size in zip(detections, targets, sizes, strict=True):
            self.detections.append(self._to_arrays(detected, ("scores",), size))
            self.ground_truth.append(self._to_arrays(target, ("iscrowd", "area"), size))

    def _to_arrays(
        self, objects: dict[str, Tensor], fields: tuple[str, ...], size: tuple[int, int]
    ) -> Arrays:
        arrays: Arrays = {
            name: objects[name].cpu().double().numpy() for name in ("boxes", *fields) if name in objects
        }
        arrays["labels"] = objects["labels"].cpu().numpy()
        arrays["size"] = {"height": size[0], "width": size[1]}
        if "mask" in self.kinds:
            arrays["masks"] = list(encode_masks(objects, size))
        return arrays

    def gather(self) -> None:
        """Gather the images of all processes in each process."""
        self.detections = gather_lists(self.detections)
        self.ground_truth = gather_lists(self.ground_truth)

    def count_objects(self) -> dict[int, int]:
        """Number of true objects by label, without crowds."""
        labels = [
            label
            for image in self.ground_truth
            for label, crowd in zip(image["labels"].tolist(), image["iscrowd"].tolist(), strict=True)
            if not crowd
        ]
        return dict(Counter(labels))

    def compute(self) -> tuple[dict[str, float], dict[int, dict[str, NDArray[np.float64]]]]:
        """Compute average precision over all classes and precision of each class, then reset.

        Returns:
            Metrics ``box_ap``, ``box_ap50``, …, ``mask_recall``, -1 where there are no such objects. And the
            precision of each label and kind at IoU thresholds of 0.5 to 0.95 and recalls of 0 to 1,
            ``(10, 101)``, for objects of any size.
        """
        all_images = [*self.detections, *self.ground_truth]
        labels = sorted({int(label) for image in all_images for label in image["labels"]})
        metrics: dict[str, float] = {}
        precisions: dict[int, dict[str, NDArray[np.float64]]] = {label: {} for label in labels}
        for kind in self.kinds:
            names = [f"{kind}_{name}" for name in (*PRECISIONS, "recall")]
            metrics |= dict.fromkeys(names, -1.0)
            if not labels:
                continue
            results = self._evaluate(kind, labels)
            for name, (iou, area) in PRECISIONS.items():
                precision = results["precision"][..., area, -1]  # IoU, recall, class
                if iou is not None:
                    precision = precision[[round((iou - 0.5) / 0.05)]]
                metrics[f"{kind}_{name}"] = _mean(precision)
            metrics[f"{kind}_recall"] = _mean(results["recall"][..., 0, -1])
            for k, label in enumerate(labels):
                precisions[label][kind] = results["precision"][:, :, k, 0, -1].copy()
        self.reset()
        return metrics, precisions

    def _evaluate(self, kind: str, labels: list[int]) -> dict[str, NDArray[np.float64]]:
        images = [{"id": n, **image.get("size", {})} for n, image in enumerate(self.ground_truth)]
        categories = [{"id": label} for label in labels]
        datasets = []
        for arrays in (self.ground_truth, self.detections):
            coco = COCO()
            coco.dataset = {
                "images": images,
                "categories": categories,
                "annotations": _to_annotations(arrays, kind),
            }
            coco.createIndex()
            datasets.append(coco)
        evaluation = COCOeval_faster(*datasets, IOU_TYPES[kind], print_function=_ignore, extra_calc=False)
        evaluation.params.iouThrs = np.linspace(0.5, 0.95, 10)
        evaluation.params.recThrs = np.linspace(0, 1, 101)
        evaluation.params.maxDets = [1, 10, self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval


def encode_masks(objects: dict[str, Tensor], size: tuple[int, int]) -> Iterator[JsonObject]:
    """Run-length encode the masks of an image's objects, one at a time to save memory.

    Args:
        objects: See `CocoMetrics.update`.
        size: Height and width of the image.
    """
    for n in range(len(objects["labels"])):
        if "mask_crops" in objects:
            row = slice(n, n + 1)
            mask = paste_binary_masks(objects["mask_crops"][row], objects["boxes"][row], size)[0]
        else:
            mask = objects["masks"][n].reshape(size)
            mask = mask > 0.5 if mask.is_floating_point() else mask
        yield rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))


def _to_annotations(images: list[Arrays], kind: str) -> list[JsonObject]:
    """Annotations in COCO's format."""
    annotations: list[JsonObject] = []
    for image_id, image in enumerate(images):
        boxes = image["boxes"].reshape(-1, 4).copy()
        boxes[:, 2:] -= boxes[:, :2]
        areas = boxes[:, 2] * boxes[:, 3]
        if kind == "mask" and image["masks"]:
            areas = rle.area(image["masks"])
        if "area" in image:  # areas in the annotation file take precedence
            areas = np.where(image["area"] > 0, image["area"], areas)
        count = len(boxes)
        crowds = image["iscrowd"].astype(int).tolist() if "iscrowd" in image else [0] * count
        scores = image["scores"].tolist() if "scores" in image else [1.0] * count
        rows = zip(boxes.tolist(), areas.tolist(), image["labels"].tolist(), crowds, scores)
        for k, (box, area, label, crowd, score) in enumerate(rows):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
                "score": score,
            }
            if kind == "mask":
                annotation["segmentation"] = image["masks"][k]
            annotations.append(annotation)
    return annotations


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are defined (not -1), or -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _ignore(*_: object) -> None:
    """Discard faster-coco-eval's progress messages."""
