"""COCO's average precision over a validation, through faster-coco-eval."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor

from crossformer_vision.models.dense.openmmlab import paste_binary_masks

# Name -> IoU (None for the mean of 0.5 to 0.95), index of COCO's range of areas: all, small, medium, large.
PRECISIONS = {
    "ap": (None, 0),
    "ap50": (0.5, 0),
    "ap75": (0.75, 0),
    "ap_small": (None, 1),
    "ap_medium": (None, 2),
    "ap_large": (None, 3),
}
TYPES = {"box": "bbox", "mask": "segm"}


class CocoMetrics:
    """Collects what was found and what is there; `compute` gives AP and forgets it all.

    Args:
        kinds: of `"box"` and `"mask"`.
        max_detections: most objects of an image that count, those of the best scores.
    """

    def __init__(self, kinds: Sequence[str], max_detections: int = 100) -> None:
        self.kinds, self.max_detections = kinds, max_detections
        self.reset()

    def reset(self) -> None:
        self.found: list[dict[str, Any]] = []  # of each image: arrays, and the masks' run lengths
        self.true: list[dict[str, Any]] = []

    def update(
        self,
        found: Sequence[dict[str, Tensor]],
        true: Sequence[dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Add images.

        Args:
            found: ``boxes`` ``(n, 4)``, ``labels`` and ``scores`` of each image, with masks ``masks``
                ``(n, 1, H, W)`` as probabilities, or ``mask_crops`` ``(n, 1, side, side)`` of the boxes.
            true: ``boxes``, ``labels``, ``iscrowd`` and ``area`` of each image, with masks ``masks``
                ``(n, H, W)`` of 0 and 1.
            sizes: Height and width of each image.
        """
        for one, truth, size in zip(found, true, sizes, strict=True):
            self.found.append(self._kept(one, ("scores",), size))
            self.true.append(self._kept(truth, ("iscrowd", "area"), size))

    def _kept(self, one: dict[str, Tensor], more: tuple[str, ...], size: tuple[int, int]) -> dict[str, Any]:
        kept: dict[str, Any] = {
            name: one[name].cpu().double().numpy() for name in ("boxes", *more) if name in one
        }
        kept["labels"] = one["labels"].cpu().numpy()
        kept["size"] = dict(zip(("height", "width"), size))
        if "mask" in self.kinds:
            kept["masks"] = list(encoded_masks(one, size))
        return kept

    def gather(self) -> None:
        """Give each process what all of them have seen."""
        for name in ("found", "true"):
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, getattr(self, name))
            setattr(self, name, [image for of_one in everyone for image in of_one])

    def compute(self) -> tuple[dict[str, float], dict[int, dict[str, NDArray[np.float64]]]]:
        """AP of all classes, and precision of each.

        Returns:
            `box_ap`, `box_ap50`, …, `mask_recall`, -1 where there are no such objects; and by label and kind
            the precision at IoUs of 0.5 to 0.95 and recalls of 0 to 1, (10, 101), of objects of any size.
        """
        labels = sorted(
            {int(k) for images in (self.found, self.true) for one in images for k in one["labels"]}
        )
        figures: dict[str, float] = {}
        precisions: dict[int, dict[str, NDArray[np.float64]]] = {label: {} for label in labels}
        for kind in self.kinds:
            evaluated = self._evaluated(kind, labels) if labels else None
            for name, (iou, area) in PRECISIONS.items():
                figures[f"{kind}_{name}"] = -1.0
                if evaluated is not None:
                    precision = evaluated["precision"][..., area, -1]  # IoU, recall, class
                    of_iou = precision if iou is None else precision[[round((iou - 0.5) / 0.05)]]
                    figures[f"{kind}_{name}"] = _mean(of_iou)
            figures[f"{kind}_recall"] = -1.0 if evaluated is None else _mean(evaluated["recall"][..., 0, -1])
            for k, label in enumerate(labels):
                precisions[label][kind] = evaluated["precision"][:, :, k, 0, -1].copy()  # type: ignore[index]
        self.reset()
        return figures, precisions

    def _evaluated(self, kind: str, labels: list[int]) -> dict[str, NDArray[np.float64]]:
        images = [{"id": n, **one.get("size", {})} for n, one in enumerate(self.true)]
        categories = [{"id": label} for label in labels]
        both = []
        for of_images in (self.true, self.found):
            coco = COCO()
            coco.dataset = {
                "images": images,
                "categories": categories,
                "annotations": _annotations(of_images, kind),
            }
            coco.createIndex()
            both.append(coco)
        evaluation = COCOeval_faster(*both, TYPES[kind], print_function=_silent, extra_calc=False)
        evaluation.params.iouThrs = np.linspace(0.5, 0.95, 10)
        evaluation.params.recThrs = np.linspace(0, 1, 101)
        evaluation.params.maxDets = [1, 10, self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        found: dict[str, NDArray[np.float64]] = evaluation.eval
        return found


def encoded_masks(objects: dict[str, Tensor], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Run lengths of the masks of an image's objects, decoded or pasted one at a time; see ``update``."""
    for n in range(len(objects["labels"])):
        if "mask_crops" in objects:
            one = slice(n, n + 1)
            mask = paste_binary_masks(objects["mask_crops"][one], objects["boxes"][one], size)[0]
        else:
            mask = objects["masks"][n].reshape(size)
            mask = mask > 0.5 if mask.is_floating_point() else mask
        yield rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))


def _annotations(of_images: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for n, one in enumerate(of_images):
        boxes = one["boxes"].reshape(-1, 4).copy()
        boxes[:, 2:] -= boxes[:, :2]
        areas = boxes[:, 2] * boxes[:, 3]
        if kind == "mask":
            areas = rle.area(one["masks"]) if one["masks"] else areas
        if "area" in one:  # of the file, where it has one
            areas = np.where(one["area"] > 0, one["area"], areas)
        count = len(boxes)
        crowds = one["iscrowd"].astype(int).tolist() if "iscrowd" in one else [0] * count
        scores = one["scores"].tolist() if "scores" in one else [1.0] * count
        rows = zip(boxes.tolist(), areas.tolist(), one["labels"].tolist(), crowds, scores)
        for k, (box, area, label, crowd, score) in enumerate(rows):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": n,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
                "score": score,
            }
            if kind == "mask":
                annotation["segmentation"] = one["masks"][k]
            annotations.append(annotation)
    return annotations


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _silent(*_: Any) -> None:
    """faster-coco-eval says what it does, line by line."""
