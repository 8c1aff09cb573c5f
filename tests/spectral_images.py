"""Writers of small data sets with four-channel TIFFs of 16 bits for each task."""

import json
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SIZE = (40, 48)  # height and width


def spectral_image(seed: int, level: int, place=(slice(None), slice(None))) -> np.ndarray:
    """Noise in four channels, with a level added to the last one in a region."""
    values = np.random.default_rng(seed).integers(500, 2000, (*SIZE, 4)).astype(np.uint16)
    values[(*place, 3)] += level
    return values


def save(path: Path, values: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, **{"photometric": "minisblack", "planarconfig": "contig", **options})


def write_classification(root: Path, count: int = 4) -> Path:
    for split in ("train", "val"):
        for k, name in enumerate(("crop", "water")):
            for n in range(count):
                save(root / split / name / f"{n}.tif", spectral_image(n, 3000 * k))
    return root


def write_segmentation(root: Path, count: int = 4) -> Path:
    place = (slice(10, 30), slice(10, 40))
    for split in ("training", "validation"):
        (root / "annotations" / split).mkdir(parents=True)
        for n in range(count):
            save(root / "images" / split / f"{n}.tif", spectral_image(n, 3000, place))
            class_map = np.zeros(SIZE, np.uint8)
            class_map[place] = 1
            Image.fromarray(class_map).save(root / "annotations" / split / f"{n}.png")
    (root / "classes.json").write_text(json.dumps(["soil", "field"]))
    return root


def write_detection(root: Path, count: int = 4) -> Path:
    place = (slice(10, 30), slice(12, 36))
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        for n in range(count):
            save(root / "images" / split / f"{n}.tif", spectral_image(n, 3000, place))
            (root / "labels" / split / f"{n}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [tree]\n")
    return root


WRITERS = {
    "classification": write_classification,
    "detection": write_detection,
    "segmentation": write_segmentation,
}
