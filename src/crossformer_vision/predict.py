"""A trained checkpoint and an image -> a result that prints, draws and serialises itself."""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, overload

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision import visualize
from crossformer_vision.checkpoints import load_checkpoint, read_checkpoint, span_of_a_run
from crossformer_vision.data import images
from crossformer_vision.errors import UserError, check_range
from crossformer_vision.fonts import shortened
from crossformer_vision.models.segmenters import segment


class Shown:
    """What all results do: print themselves in a line, and draw themselves in a notebook."""

    def plot(self) -> Image.Image:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shortened(str(self), 200)}>"

    def _repr_png_(self) -> bytes:
        page = io.BytesIO()
        drawn = self.plot()
        drawn.thumbnail((1024, 1024))
        drawn.save(page, "PNG")
        return page.getvalue()


@dataclass(repr=False, eq=False)
class Classified(Shown):
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


@dataclass(repr=False, eq=False)
class Detected(Shown):
    """The objects in an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names; that of label 1 comes first.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        labels: (n,) from 1.
        scores: (n,) in 0..1, falling.
        masks: (n, H, W) of 0 and 1, or None from a detector without masks.
        category_ids: of the classes in the training file; None numbers them from 1.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    category_ids: Sequence[Any] | None = None

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
        """Annotations in COCO's format, each with its `score`; masks as compressed run lengths.

        Categories have the ids of the file that the detector was trained on.
        """
        annotations = []
        categories = self.category_ids or range(1, 1 + len(self.classes))
        for n, (x1, y1, x2, y2) in enumerate(self.boxes.astype(float).round(2).tolist()):
            annotation: dict[str, Any] = dict(
                id=first_id + n,
                image_id=image_id,
                category_id=categories[int(self.labels[n]) - 1],
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
        size = dict(width=self.image.width, height=self.image.height)
        return {"image": self.name, **size, "objects": self.to_coco()}


@dataclass(repr=False, eq=False)
class Segmented(Shown):
    """The class of each pixel of an image.

    Attributes:
        name: of the image.
        image: RGB.
        classes: names.
        class_map: (H, W), index of each pixel's class.
        values: of the classes in the class maps that were trained on; None for their indices.
    """

    name: str
    image: Image.Image
    classes: Sequence[str]
    class_map: NDArray[np.uint8]
    values: Sequence[int] | None = None

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
        """The class map as a palette image, with the values that classes had in the maps of training."""
        values = np.array(self.values or range(len(self.classes)), np.uint8)
        colours = np.zeros((256, 3), np.uint8)
        colours[values] = visualize.palette(len(self.classes))
        drawn = Image.fromarray(values[self.class_map]).convert("P")
        drawn.putpalette(colours.tobytes())
        return drawn

    def to_dict(self) -> dict[str, Any]:
        size = self.class_map.size
        areas = [{"class": name, "pixels": n, "share": round(n / size, 6)} for name, n in self.areas()]
        return {"image": self.name, "width": self.image.width, "height": self.image.height, "areas": areas}


def squares(image: Image.Image) -> list[Image.Image]:
    """An image that is at least twice as long as it is short, in up to eight squares along it; or itself."""
    short, long = sorted(image.size)
    if long < 2 * short:
        return [image]
    count = min(8, -(-long // short))
    starts = [round(n * (long - short) / (count - 1)) for n in range(count)]
    wide = image.width > image.height
    return [image.crop((s, 0, s + short, short) if wide else (0, s, short, s + short)) for s in starts]


Result = Classified | Detected | Segmented
Picture = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor


def _from_array(pixels: NDArray[Any] | Tensor) -> Image.Image:
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu().float().numpy() if pixels.is_floating_point() else pixels.cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"an image of shape {tuple(pixels.shape)}: arrays are (H, W, 3) or (H, W), tensors (3, H, W)"
        )
    if pixels.dtype.kind == "f":
        pixels = (pixels * 255).round().clip(0, 255)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


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
        self.category_ids: list[Any] | None = checkpoint.get("category_ids") or None
        self.values: list[int] | None = checkpoint.get("values") or None
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
            self.whole = checkpoint["image"].get("crop_mode") == "squash"
        elif self.task == "segmentation":
            from crossformer_vision.data.segmentation import ToInput
            from crossformer_vision.tasks.segmentation import Segmentation

            task = Segmentation(**options)
            net, self.test, self.test_scales = task.net, task.test, task.test_scales
            self.transform = ToInput(**checkpoint["image"])
        else:
            from crossformer_vision.tasks.detection import Detection

            net = Detection(**options).net
            # The detector itself keeps nothing below a score of its own.
            scored = getattr(net, "roi_heads", net)
            scored.score_thresh = min(scored.score_thresh, score)
        load_checkpoint(net, checkpoint["state_dict"], adapt_classifier=False)
        self.net = net.to(device).eval()

    def __repr__(self) -> str:
        return f"<Predictor of {self.task}: {len(self.classes)} classes, on {self.device}>"

    @overload
    def __call__(self, image: Picture) -> Result: ...
    @overload
    def __call__(self, image: list[Any]) -> list[Result]: ...
    @torch.inference_mode()
    def __call__(self, image: Picture | list[Any]) -> Result | list[Result]:
        """What is in an image, or in each of a list of them.

        Args:
            image: a path, an image that PIL has opened, an array (H, W, 3) or (H, W), or a tensor (3, H, W);
                bytes, or floats in 0..1; or a list of these.

        Raises:
            UserError: a file that is missing or no image, an array of another shape.
        """
        if isinstance(image, list):
            return [self(one) for one in image]
        name = str(image) if isinstance(image, (str, os.PathLike)) else "image"
        if isinstance(image, (np.ndarray, Tensor)):
            image = _from_array(image)
        picture = images.read(image, name)
        if self.task == "classification":
            parts = [picture] if self.whole else squares(picture)
            pixels: Any = torch.stack([self.transform(part) for part in parts])
            logits: Tensor = self.net(pixels.to(self.device)).float()
            return Classified(name, picture, self.classes, logits.softmax(1).mean(0).cpu().numpy())
        if self.task == "segmentation":
            views = [self.transform(picture, scale)[None].to(self.device) for scale in self.test_scales]
            size = (picture.height, picture.width)
            class_map = segment(self.net, views, size=size, **self.test)[0].argmax(0)
            indices = class_map.cpu().numpy().astype(np.uint8)
            return Segmented(name, picture, self.classes, indices, self.values)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device) / 255
        (found,) = self.net([pixels])
        kept = found["scores"] >= self.score
        found = {name: value[kept].cpu() for name, value in found.items()}
        masks = (found["masks"].squeeze(1) > 0.5).numpy().astype(np.uint8) if "masks" in found else None
        boxes, labels, scores = (found[key].float().numpy() for key in ("boxes", "labels", "scores"))
        labels = labels.astype(np.int64)
        return Detected(name, picture, self.classes, boxes, labels, scores, masks, self.category_ids)


def load_predictor(
    checkpoint: str | os.PathLike[str], device: str | None = None, score: float = 0.5
) -> Predictor:
    """The trained network of a run.

    Args:
        checkpoint: a run's folder, whose `best.ckpt` is taken, or one of its checkpoint files.
        device: `cpu`, `cuda`, …; the best there is if None.
        score: least score of an object, for detectors.

    Raises:
        UserError: a file that is no checkpoint of a run, a device that is not there, a score beyond 0 to 1.
    """
    check_range("score", score, 0, 1)
    path = Path(checkpoint)
    path = path / "best.ckpt" if path.is_dir() else path
    content = read_checkpoint(path)
    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}': {images.reason(error)}; there is always cpu") from None
    return Predictor(content, str(path), torch.device(device), score)


# ------------------------------------------------------------------------------------------------------------
# Files and folders
# ------------------------------------------------------------------------------------------------------------

LARGEST = 2048  # longer side of a picture that is written, in pixels
OURS = ".crossformer-predictions"  # in a folder of predictions: the files that the last call wrote


def _written(folder: Path) -> list[Path]:
    """The files of earlier predictions in a folder, if it is one of predictions."""
    try:
        lines = (folder / OURS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    paths = [folder / line for line in lines if line]
    return [path for path in paths if path.resolve().is_relative_to(folder.resolve())]


def find_images(paths: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """(file, its name below the folder that was given) of image files and of those in folders, sorted.

    In folders, what is hidden and what earlier predictions drew is left out.
    """
    for text in paths:
        path = Path(text)
        if path.is_dir():
            drawn = {file.resolve() for mark in path.rglob(OURS) for file in _written(mark.parent)}
            files = [
                p
                for p in images.files_below(path)
                if p.suffix.lower() in images.EXTENSIONS and p.resolve() not in drawn
            ]
            if not files:
                raise UserError(f"{path}: no images in this folder")
            yield from ((p, p.relative_to(path)) for p in files)
        elif path.exists():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder")


def say(text: str) -> None:
    """Print a line; where nobody listens any more, as after `| head`, the work goes on."""
    try:
        print(text.encode("utf-8", "replace").decode("utf-8"), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def were(count: int) -> str:
    return "was" if count == 1 else "were"


class CocoIds:
    """Ids and file names of images as a COCO file has them that lies beside them, or else numbered from 1.

    Looked for where the data of a training are: `<folder>/_annotations.coco.json`, or
    `annotations/instances_<split>.json` beside the folder or one above it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.known: dict[Path, tuple[Any, str]] = {}
        folders: set[Path] = set()
        for file in files:
            folders |= set(list(file.parents)[:4])
        for folder in sorted(folders):
            near = (folder.parent, folder.parent.parent)
            for path in (
                folder / "_annotations.coco.json",
                *(above / "annotations" / f"instances_{folder.resolve().name}.json" for above in near),
            ):
                if path.is_file():
                    self._read(path, folder)
        self.number = itertools.count(
            1 + max((i for i, _ in self.known.values() if isinstance(i, int)), default=0)
        )

    def _read(self, path: Path, folder: Path) -> None:
        try:
            images = json.loads(path.read_bytes())["images"]
            self.known |= {folder / image["file_name"]: (image["id"], image["file_name"]) for image in images}
        except (OSError, ValueError, KeyError, TypeError):  # not what training reads; no reason to stop
            return

    def of(self, file: Path, name: Path) -> dict[str, Any]:
        known = self.known.get(file)
        number, file_name = known if known else (next(self.number), name.as_posix())
        return {"id": number, "file_name": file_name}


class OutFolder:
    """A folder of predictions, in which nothing that is not ours is written over.

    What the last call wrote there is removed at the start, so that the results of two calls do not mix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = [path for path in _written(folder) if path.is_file()]
            for path in earlier:
                path.unlink()
        except OSError as error:
            raise UserError(f"{folder}: cannot be a folder of predictions ({error.strerror})") from None
        if len(earlier) > 1:  # the mark itself is no file of the person's
            say(f"replaces the {len(earlier)} files of an earlier call in {folder}; --out names another")
        self.mark = (folder / OURS).open("w", encoding="utf-8", errors="surrogateescape")

    def claim(self, name: str | Path) -> Path:
        """A path below the folder that no file has, of this name or with a number behind it."""
        wanted = self.folder / name
        path, n = wanted, 1
        while path.exists():
            n += 1
            path = wanted.with_name(f"{wanted.stem}-{n}{wanted.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.mark.write(f"{path.relative_to(self.folder)}\n")
        self.mark.flush()
        path.touch()
        return path


def predict_files(predictor: Predictor, paths: Sequence[str], out: Path) -> None:
    """Predict images and folders: a picture of each below `out`, and all results in `predictions.json`.

    Detections are written as a COCO file, whose annotations have a `score`; class maps as PNGs in
    `class_maps/`, too. Results come into `predictions.jsonl` one by one, and become `predictions.json` at the
    end: a call that is stopped leaves those that are done. An image that cannot be predicted is left out; the
    others are done, then the error is raised.
    """
    from rich.progress import track

    files = list(find_images(paths))
    ids = CocoIds(file for file, _ in files) if predictor.task == "detection" else None
    folder = OutFolder(out)
    lines = folder.claim("predictions.jsonl")
    failed: list[UserError] = []
    done = 0
    with lines.open("w", encoding="utf-8") as stream:
        for file, name in track(files, "predicting", transient=True):
            try:
                result = predictor(file)
            except Exception as error:  # of this image; the rest is done
                named = (
                    error if isinstance(error, UserError) else UserError(f"{file}: {images.reason(error)}")
                )
                failed.append(named)
                print(f"left out: {named}", file=sys.stderr, flush=True)
                continue
            done += 1
            jpeg = file.suffix.lower() in (".jpg", ".jpeg")
            picture = folder.claim(name.with_suffix(".jpg" if jpeg else ".png"))
            drawn = result.plot()
            drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            drawn.save(picture, quality=90)  # of JPEG; PNG has none
            if isinstance(result, Segmented):
                class_map = folder.claim(Path("class_maps") / picture.relative_to(out).with_suffix(".png"))
                result.to_png().save(class_map)
            content = result.to_dict()
            if ids is not None:
                content |= ids.of(file, name)
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")
            stream.flush()
            say(str(result))
    if done:
        target = folder.claim("predictions.json")
        with target.open("w", encoding="utf-8") as whole:
            write_results(lines, whole, predictor.classes, predictor.category_ids)
        say(f"{done} picture{'s' * (done != 1)} and {target.name} in {out}")
    lines.unlink()
    if failed:
        raise UserError(f"{failed[0]}; {len(failed)} of {len(files)} images {were(len(failed))} left out")


def write_results(
    lines: Path, whole: TextIO, classes: Sequence[str], category_ids: Sequence[Any] | None = None
) -> None:
    """One JSON of a file of results a line: a list, or of detections COCO's three; held one by one."""

    def results() -> Iterator[dict[str, Any]]:
        with lines.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def write(items: Iterable[Any]) -> None:
        separator = "["
        for item in items:
            whole.write(separator + "\n" + json.dumps(item, ensure_ascii=False))
            separator = ","
        whole.write("\n]" if separator == "," else "[]")

    def images_of() -> Iterator[dict[str, Any]]:
        for result in results():
            size = dict(width=result["width"], height=result["height"])
            yield dict(id=result["id"], file_name=result["file_name"], **size)

    def annotations() -> Iterator[dict[str, Any]]:
        number = itertools.count(1)
        for result in results():
            for found in result["objects"]:
                yield {**found, "id": next(number), "image_id": result["id"]}

    if "objects" not in next(results()):
        write(results())
    else:
        whole.write('{"images": ')
        write(images_of())
        whole.write(',\n"annotations": ')
        write(annotations())
        numbers = category_ids or range(1, 1 + len(classes))
        categories = [dict(id=k, name=name) for k, name in zip(numbers, classes, strict=True)]
        whole.write(f',\n"categories": {json.dumps(categories, ensure_ascii=False)}}}')
    whole.write("\n")
