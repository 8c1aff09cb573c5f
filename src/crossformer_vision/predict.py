"""A trained checkpoint and an image -> a result that prints, draws and serialises itself."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision import visualize
from crossformer_vision.checkpoints import load_checkpoint, read_checkpoint, span_of_a_run
from crossformer_vision.data import images
from crossformer_vision.errors import UserError
from crossformer_vision.models.segmenters import segment

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}


@dataclass
class Classified:
    """The classes of an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names.
        probabilities: (classes,), of each.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    probabilities: NDArray[np.float32]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest classes and their probabilities."""
        order = np.argsort(-self.probabilities)[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{name} {p:.1%}" for name, p in self.top(3))

    def plot(self) -> Image.Image:
        """The image under its likeliest classes."""
        return visualize.captioned(self.image, [f"{name} {p:.1%}" for name, p in self.top(3)])

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.name, "classes": [{"class": c, "probability": p} for c, p in self.top()]}


@dataclass
class Detected:
    """The objects in an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names; that of label 1 comes first.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        labels: (n,) from 1.
        scores: (n,) in 0..1, falling.
        masks: (n, H, W) of 0 and 1, or None from a detector without masks.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.uint8] | None

    def __str__(self) -> str:
        counts = [(int((self.labels == k + 1).sum()), name) for k, name in enumerate(self.classes)]
        found = ", ".join(f"{n} {name}" for n, name in counts if n)
        return f"{self.name}: {found or 'nothing found'}"

    def plot(self) -> Image.Image:
        """The image with boxes, masks, labels and scores."""
        objects: dict[str, Any] = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.masks is not None:
            objects["masks"] = self.masks
        return visualize.draw_objects(self.image, objects, self.classes)

    def to_coco(self, image_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """Annotations in COCO's format, each with its `score`; masks as compressed run lengths."""
        annotations = []
        for n, (x1, y1, x2, y2) in enumerate(self.boxes.astype(float).round(2).tolist()):
            annotation: dict[str, Any] = dict(
                id=first_id + n,
                image_id=image_id,
                category_id=int(self.labels[n]),
                bbox=[x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                area=round((x2 - x1) * (y2 - y1), 2),
                iscrowd=0,
                score=round(float(self.scores[n]), 4),
            )
            if self.masks is not None:
                encoded = rle.encode(np.asfortranarray(self.masks[n]))
                counts = encoded["counts"]
                counts = counts.decode() if isinstance(counts, bytes) else counts
                annotation["segmentation"] = {"size": list(encoded["size"]), "counts": counts}
                annotation["area"] = int(self.masks[n].sum())
            annotations.append(annotation)
        return annotations

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.name, "objects": self.to_coco()}


@dataclass
class Segmented:
    """The class of each pixel of an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names.
        class_map: (H, W), index of each pixel's class.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    class_map: NDArray[np.uint8]

    def areas(self) -> list[tuple[str, int]]:
        """The classes that occur and their pixels, the largest first."""
        counts = np.bincount(self.class_map.ravel(), minlength=len(self.classes))
        return [(self.classes[k], int(counts[k])) for k in np.argsort(-counts, kind="stable") if counts[k]]

    def __str__(self) -> str:
        areas = self.areas()
        more = f", {len(areas) - 5} more" if len(areas) > 5 else ""
        shares = ", ".join(f"{name} {n / self.class_map.size:.1%}" for name, n in areas[:5])
        return f"{self.name}: {shares}{more}"

    def plot(self) -> Image.Image:
        """The image under its class map's colours, above their legend."""
        return visualize.with_legend(
            visualize.overlay(self.image, self.class_map), self.class_map, self.classes
        )

    def to_png(self) -> Image.Image:
        """The class map as a palette image: its values are the indices of the classes."""
        drawn = Image.fromarray(self.class_map).convert("P")
        drawn.putpalette(visualize.palette(len(self.classes)).tobytes())
        return drawn

    def to_dict(self) -> dict[str, Any]:
        size = self.class_map.size
        areas = [{"class": name, "pixels": n, "share": round(n / size, 6)} for name, n in self.areas()]
        return {"image": self.name, "width": self.image.width, "height": self.image.height, "areas": areas}


Result = Classified | Detected | Segmented


class Predictor:
    """A trained network with what it takes to use it on an image: `predictor("photo.jpg")`.

    Args:
        checkpoint: what a run's `best.ckpt` or `last.ckpt` holds.
        source: its name, for errors.
        device: to compute on.
        score: least score of an object.
    """

    def __init__(self, checkpoint: dict[str, Any], source: str, device: torch.device, score: float) -> None:
        if "task" not in checkpoint or "hyper_parameters" not in checkpoint:
            raise UserError(f"{source}: not a checkpoint of a run; predict needs its best.ckpt or last.ckpt")
        self.task = checkpoint["task"]
        self.classes: list[str] = checkpoint["classes"]
        self.device, self.score = device, score
        options = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        options |= {"pretrained": False, "checkpoint": None}
        if span := span_of_a_run(checkpoint, source):
            options["model_args"] = {**(options["model_args"] or {}), **span}
        if self.task == "classification":
            from timm.data import create_transform

            from crossformer_vision.tasks.classification import Classification

            net = Classification(**options).net
            self.transform = create_transform(**checkpoint["image"])
        elif self.task == "segmentation":
            from crossformer_vision.data.segmentation import ToInput
            from crossformer_vision.tasks.segmentation import Segmentation

            task = Segmentation(**options)
            net, self.test, self.test_scales = task.net, task.test, task.test_scales
            self.transform = ToInput(**checkpoint["image"])
        else:
            from crossformer_vision.tasks.detection import Detection

            net = Detection(**options).net
        load_checkpoint(net, checkpoint["state_dict"], adapt_classifier=False)
        self.net = net.to(device).eval()

    @torch.inference_mode()
    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> Result:
        """What is in an image: a path, or an image that PIL has opened.

        Raises:
            UserError: a file that is missing or no image.
        """
        name = "image" if isinstance(image, Image.Image) else str(image)
        picture = images.read(image, name)
        if self.task == "classification":
            pixels: Any = self.transform(picture)
            logits: Tensor = self.net(pixels[None].to(self.device))[0].float()
            return Classified(name, picture, self.classes, logits.softmax(0).cpu().numpy())
        if self.task == "segmentation":
            views = [self.transform(picture, scale)[None].to(self.device) for scale in self.test_scales]
            size = (picture.height, picture.width)
            class_map = segment(self.net, views, size=size, **self.test)[0].argmax(0)
            return Segmented(name, picture, self.classes, class_map.cpu().numpy().astype(np.uint8))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device) / 255
        (found,) = self.net([pixels])
        kept = found["scores"] >= self.score
        found = {name: value[kept].cpu() for name, value in found.items()}
        masks = (found["masks"].squeeze(1) > 0.5).numpy().astype(np.uint8) if "masks" in found else None
        boxes, labels, scores = (found[key].float().numpy() for key in ("boxes", "labels", "scores"))
        return Detected(name, picture, self.classes, boxes, labels.astype(np.int64), scores, masks)


def load_predictor(
    checkpoint: str | os.PathLike[str], device: str | None = None, score: float = 0.5
) -> Predictor:
    """The trained network of a run.

    Args:
        checkpoint: a run's `best.ckpt` or `last.ckpt`.
        device: `cpu`, `cuda`, …; the best there is if None.
        score: least score of an object, for detectors.

    Raises:
        UserError: a file that is no checkpoint of a run.
    """
    content = read_checkpoint(checkpoint)
    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    return Predictor(content, str(checkpoint), torch.device(device), score)


def find_images(paths: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """(file, its name below the folder that was given) of image files and of those in folders, sorted."""
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
            if not files:
                raise UserError(f"{path}: no images in this folder")
            yield from ((p, p.relative_to(path)) for p in files)
        elif path.exists():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder")


def predict_files(predictor: Predictor, paths: Sequence[str], out: Path) -> None:
    """Predict images and folders: a picture of each below `out`, and all results in `predictions.json`.

    Detections are written as a COCO file, whose annotations have a `score`; class maps as PNGs in
    `class_maps/`, too. An image that cannot be read is left out; the others are done, then the error is
    raised.
    """
    from rich.progress import track

    files = list(find_images(paths))
    results: list[Result] = []
    failed: list[UserError] = []
    taken: set[Path] = set()
    for file, name in track(files, "predicting", transient=True):
        try:
            result = predictor(file)
        except UserError as error:
            failed.append(error)
            continue
        results.append(result)
        picture = out / name.with_suffix(".png")
        n = 1
        while picture in taken:
            n += 1
            picture = out / name.with_name(f"{name.stem}-{n}.png")
        taken.add(picture)
        picture.parent.mkdir(parents=True, exist_ok=True)
        result.plot().save(picture)
        if isinstance(result, Segmented):
            class_map = out / "class_maps" / picture.relative_to(out)
            class_map.parent.mkdir(parents=True, exist_ok=True)
            result.to_png().save(class_map)
        print(result, flush=True)
    if results:
        (out / "predictions.json").write_text(json.dumps(_serialised(results), indent=1) + "\n")
        print(f"{len(results)} pictures and predictions.json in {out}")
    if failed:
        raise UserError(f"{failed[0]}; {len(failed)} of {len(files)} images were left out")


def _serialised(results: Sequence[Result]) -> Any:
    annotations: list[dict[str, Any]] = []
    images = []
    for n, result in enumerate(results):
        if not isinstance(result, Detected):
            continue
        size = dict(width=result.image.width, height=result.image.height)
        images.append(dict(id=n + 1, file_name=result.name, **size))
        annotations += result.to_coco(n + 1, len(annotations) + 1)
    if not images:
        return [result.to_dict() for result in results]
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(results[0].classes)]
    return {"images": images, "annotations": annotations, "categories": categories}
