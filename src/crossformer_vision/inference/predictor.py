"""A trained checkpoint and an image -> a result that prints, draws and serialises itself."""

import inspect
import io
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision.data import images
from crossformer_vision.errors import UserError, check_range
from crossformer_vision.inference.results import Classified, Detected, Result, Segmented
from crossformer_vision.inference.sources import as_checkpoint
from crossformer_vision.inference.tiling import detect_in_tiles
from crossformer_vision.models.dense.openmmlab import mask_crops, paste_binary_masks
from crossformer_vision.models.dense.segmenters import predict_class_map
from crossformer_vision.plotting.fonts import shortened as shortened
from crossformer_vision.training.devices import emulation_note
from crossformer_vision.weights.checkpoints import load_checkpoint, read_checkpoint, span_of_a_run

log = logging.getLogger("crossformer_vision")

BATCH = 8  # images that a classifier takes together


def squares(image: Image.Image) -> list[Image.Image]:
    """An image that is at least twice as long as it is short, in up to eight squares along it; or itself."""
    short, long = sorted(image.size)
    if long < 2 * short:
        return [image]
    count = min(8, -(-long // short))
    starts = [round(n * (long - short) / (count - 1)) for n in range(count)]
    wide = image.width > image.height
    return [image.crop((s, 0, s + short, short) if wide else (0, s, short, s + short)) for s in starts]


Picture = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any] | Tensor


def _from_array(pixels: NDArray[Any] | Tensor) -> Image.Image:
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu().float().numpy() if pixels.is_floating_point() else pixels.cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"an image of shape {tuple(pixels.shape)}: arrays are (H, W, 3) or (H, W), tensors (3, H, W)"
        )
    if not pixels.size:
        raise UserError(f"an image of shape {tuple(pixels.shape)} has no pixels")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "fb":
        if not -0.5 <= low <= high <= 1.5:  # a resampled image goes a little beyond
            raise UserError(f"an image of values from {low:g} to {high:g}: arrays of floats are in 0..1")
        pixels = (pixels * 255.0).round().clip(0, 255)
    elif not 0 <= low <= high <= 255:
        raise UserError(f"an image of values from {low:g} to {high:g}: arrays of integers are in 0..255")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


def of_task(task: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those that a task takes: a subclass of it may have further ones, for its training."""
    names = {name for base in task.__mro__[:2] for name in inspect.signature(base).parameters}
    return {name: value for name, value in options.items() if name in names}


class Predictor:
    """A trained network with what it takes to use it on an image: `predictor("photo.jpg")`.

    Args:
        checkpoint: what a run's `best.ckpt` or `last.ckpt` holds.
        source: its name, for errors.
        device: to compute on.
        score: least score of an object.
        tile: side of overlapping tiles in which a detector goes over larger images; None for whole ones.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        source: str,
        device: torch.device,
        score: float,
        tile: int | None = None,
    ) -> None:
        if "task" not in checkpoint or not {"hyper_parameters", "net"} & checkpoint.keys():
            raise UserError(
                f"{source}: not a checkpoint of a run, as best.ckpt; name the model of such a file (--model)"
            )
        self.task = checkpoint["task"]
        self.classes: list[str] = checkpoint["classes"]
        self.category_ids: list[Any] | None = checkpoint.get("category_ids") or None
        self.values: list[int] | None = checkpoint.get("values") or None
        if tile is not None and self.task != "detection":
            raise UserError(f"--tile {tile}: tiles are for detectors, and {source} is of {self.task}")
        self.device, self.score, self.tile = device, score, tile
        self.together = BATCH if self.task == "classification" else 1  # images that the network takes at once
        self.image: dict[str, Any] = checkpoint.get("image") or {}  # how one is prepared
        self.options: dict[str, Any] = {}  # of the task; an exported file has none
        if "net" in checkpoint:  # of an exported file
            net = checkpoint["net"]
            if score < (least := checkpoint.get("least_score", 0.0)):
                raise UserError(f"{source}: holds objects of score {least:g} and more, none of {score:g}")
            self.test: dict[str, Any] = checkpoint.get("test") or {}
            self.test_scales: Any = checkpoint.get("test_scales") or []
        else:
            net = self._built(checkpoint, source)
        if self.task == "classification":
            from timm.data import create_transform

            self.transform = create_transform(**self.image)
            self.whole = self.image.get("crop_mode") == "squash"
        elif self.task == "segmentation":
            from crossformer_vision.data.segmentation import ToInput

            self.transform = ToInput(**self.image)
        if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
            raise UserError(
                f"{source}: has weights that are no finite numbers, so every output would be NaN. Take a "
                "checkpoint from before the run diverged"
            )
        self.net = net.to(device).eval()
        self.dtype = torch.float32

    def _built(self, checkpoint: dict[str, Any], source: str) -> torch.nn.Module:
        """The network of a run, with its weights."""
        options = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        options |= {"pretrained": False, "checkpoint": None}
        if span := span_of_a_run(checkpoint, source):
            options["model_args"] = {**(options["model_args"] or {}), **span}
        self.options = options
        net: Any
        if self.task == "classification":
            from crossformer_vision.tasks.classification import Classification

            net = Classification(**of_task(Classification, options)).net
        elif self.task == "segmentation":
            from crossformer_vision.tasks.segmentation import Segmentation

            task = Segmentation(**of_task(Segmentation, options))
            net, self.test, self.test_scales = task.net, task.test, task.test_scales
        else:
            from crossformer_vision.tasks.detection import Detection

            net = Detection(**of_task(Detection, options)).net
            # The detector itself keeps nothing below a score of its own.
            scored = getattr(net, "roi_heads", net)
            self.least_score = scored.score_thresh = min(scored.score_thresh, self.score)
        load_checkpoint(net, checkpoint["state_dict"], adapt_classifier=False)
        return net

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Predictor":
        """This predictor, on another device or computing in another type.

        Args:
            device: `cpu`, `cuda`, …
            dtype: `torch.float32`, or `torch.bfloat16` or `torch.float16` by autocast: weights, boxes and
                probabilities stay in 32 bits.

        Raises:
            UserError: a device that is not there, another type.
        """
        if dtype is not None:
            if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise UserError(f"dtype {dtype}: it is one of torch.float32, torch.bfloat16, torch.float16")
            self.dtype = dtype
        if device is not None:
            self.device = usable(device)
            self.net.to(self.device)
        if note := emulation_note(self.device, self.dtype):
            log.warning("%s", note)
        return self

    def __repr__(self) -> str:
        return f"<Predictor of {self.task}: {len(self.classes)} classes, on {self.device}>"

    @overload
    def __call__(self, image: Picture) -> Result: ...
    @overload
    def __call__(self, image: list[Any]) -> list[Result]: ...
    def __call__(self, image: Picture | list[Any]) -> Result | list[Result]:
        """What is in an image, or in each of a list of them.

        Args:
            image: a path, the bytes of a file or an open one, an image that PIL has opened, an array
                (H, W, 3) or (H, W), or a tensor (3, H, W), of bytes or of floats in 0..1; or a list of these.

        Raises:
            UserError: a file that is missing or no image, an array of another shape.
        """
        if isinstance(image, list):
            opened = [self.opened(one) for one in image]
            batches = (opened[n : n + self.together] for n in range(0, len(opened), self.together))
            return [result for batch in batches for result in self.results(batch)]
        return self.results([self.opened(image)])[0]

    def opened(self, image: Picture) -> tuple[Image.Image, str]:
        """An image as `results` takes it, and its name; see `__call__`."""
        named = image if isinstance(image, (str, os.PathLike)) else getattr(image, "name", None)
        name = str(named or "image")
        if isinstance(image, bytes):
            image = io.BytesIO(image)
        if isinstance(image, (np.ndarray, Tensor)):
            image = _from_array(image)
        return images.read(image, name), name

    @torch.inference_mode()
    def results(self, opened: list[tuple[Image.Image, str]]) -> list[Result]:
        """What is in images that are upright and RGB, with their names; a classifier takes them together."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.task == "classification":
                return self._classified(opened)
            return [self._result(picture, name) for picture, name in opened]

    def _classified(self, opened: list[tuple[Image.Image, str]]) -> list[Result]:
        parts = [[picture] if self.whole else squares(picture) for picture, _ in opened]
        pixels: Any = torch.stack([self.transform(part) for of_one in parts for part in of_one])
        logits: Tensor = self.net(pixels.to(self.device)).float()
        if not torch.isfinite(logits).all():
            number = int((~torch.isfinite(logits)).any(1).nonzero()[0])
            name = [name for part, (_, name) in zip(parts, opened) for _ in part][number]
            raise UserError(f"{name}: the network's output is NaN in {self.dtype}. Use float32")
        of_each = logits.softmax(1).split([len(of_one) for of_one in parts])
        return [
            Classified(name, picture, self.classes, probabilities.mean(0).cpu().numpy())
            for (picture, name), probabilities in zip(opened, of_each, strict=True)
        ]

    def _objects(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the detector finds of `score` and more: each object's mask is as large as the image."""
        scored: Any = getattr(self.net, "roi_heads", self.net)
        if not hasattr(scored, "score_thresh"):  # an exported one
            return self.net([pixels])[0]
        scored.score_thresh = max(self.least_score, self.score - 1e-6)
        try:
            return self.net([pixels])[0]
        finally:
            scored.score_thresh = self.least_score

    def _result(self, picture: Image.Image, name: str) -> Result:
        if self.task == "segmentation":
            views = [self.transform(picture, scale)[None].to(self.device) for scale in self.test_scales]
            size = (picture.height, picture.width)
            best = predict_class_map(self.net, views, size, **self.test)[0]
            indices = best.cpu().numpy().astype(np.uint8)
            return Segmented(name, picture, self.classes, indices, self.values)
        if self.tile and max(picture.size) > self.tile:
            found = detect_in_tiles(self.net, picture, self.tile, self.score, self.device)
        else:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device) / 255
            with mask_crops(self.net):
                found = self._objects(pixels)
            kept = found["scores"] >= self.score
            found = {name: value[kept].cpu() for name, value in found.items()}
            if "mask_crops" in found:
                size = (picture.height, picture.width)
                found["masks"] = paste_binary_masks(found["mask_crops"], found["boxes"], size)
            elif "masks" in found:  # of an exported detector
                found["masks"] = found["masks"].squeeze(1) > 0.5
        masks = found["masks"].numpy().astype(np.uint8) if "masks" in found else None
        boxes, labels, scores = (found[key].float().numpy() for key in ("boxes", "labels", "scores"))
        labels = labels.astype(np.int64)
        return Detected(name, picture, self.classes, boxes, labels, scores, masks, self.category_ids)


def best_device(given: str | torch.device | None) -> torch.device:
    """The device that was asked for, or else the best there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return usable(given or ("cuda" if cuda else "mps" if mps else "cpu"))


def usable(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be on it; a UserError otherwise."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}': {images.reason(error)}; there is always cpu") from None
    return torch.device(device)


def load_predictor(
    checkpoint: str | os.PathLike[str] | bytes | BinaryIO | dict[str, Any],
    device: str | torch.device | None = None,
    score: float = 0.5,
    tile: int | None = None,
    model: str | None = None,
) -> Predictor:
    """A trained network, ready for images.

    Args:
        checkpoint: a run's folder, whose `best.ckpt` is taken, or one of its checkpoint files; such a file in
            memory, as its bytes, an open file, or what it holds; or the name of published weights: of a timm
            model (`crossformer_nano.cifar10`, which come with the library), a detector or a segmenter
            (`mask_rcnn_crossformer_small`); or a file of `crossformer export`, ONNX (`.onnx`) or OpenVINO
            (`.xml`), for the CPU.
        device: `cpu`, `cuda`, …; the best there is if None.
        score: least score of an object, for detectors.
        tile: side, in pixels, of overlapping tiles in which a detector goes over larger images, and so finds
            what would be too small in the whole one; None for whole images.
        model: the published model or timm's whose weights alone are in the file `checkpoint`; None for all
            else, which says what it is.

    Raises:
        UserError: a file that is no checkpoint of a run, or not the model's, a device that is not there, a
            score beyond 0 to 1.
    """
    check_range("score", score, 0, 1)
    if tile is not None:
        check_range("tile", tile, 64)
    if isinstance(checkpoint, str) and not checkpoint.strip():
        raise UserError("load_predictor(''): no checkpoint is named. Did a run save none?")
    if isinstance(checkpoint, (str, os.PathLike)) and Path(checkpoint).suffix.lower() in images.EXTENSIONS:
        raise UserError(
            f"{checkpoint}: is an image. First comes a run, a checkpoint or the name of published weights: "
            f"crossformer predict crossformer_nano.cifar10 {checkpoint}"
        )
    source = "checkpoint"
    if model is not None:
        if not isinstance(checkpoint, (str, os.PathLike)):
            raise UserError(f"model '{model}': its weights are given as the path of their file")
        source = str(checkpoint)
        if not (named := as_checkpoint(model, source)):
            raise UserError(f"--model {model}: no published model, nor one of timm")
        content = named
    elif isinstance(checkpoint, dict):
        content = checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        path = Path(checkpoint)
        path = path / "best.ckpt" if path.is_dir() else path
        source = str(path)
        if path.suffix in (".onnx", ".xml") and path.is_file():
            from crossformer_vision.inference.exported import read_exported

            return Predictor(read_exported(path), source, usable("cpu"), score, tile)
        named = None if path.exists() else as_checkpoint(source)
        content = named or read_checkpoint(path)
    else:
        content = read_checkpoint(io.BytesIO(checkpoint) if isinstance(checkpoint, bytes) else checkpoint)
    return Predictor(content, source, best_device(device), score, tile)
