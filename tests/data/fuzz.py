"""Fuzz the file readers with randomly damaged files, as run by `make fuzz`.

Covers images in eight formats, COCO files, class lists, class maps and checkpoints. Reading a file either succeeds or
raises a one-line UserError, within the time and memory limits, and writes nothing outside its directory. Each file
depends only on its seed and index. Reproduce one with `python tests/data/fuzz.py --seed 0 --only 1234`.
"""

import argparse
import io
import json
import logging
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

import crossformer_vision
from crossformer_vision.data import images
from crossformer_vision.data.class_lists import read_classes, value_table
from crossformer_vision.data.readers.class_maps import ClassMapImages
from crossformer_vision.data.readers.coco import CocoImages
from crossformer_vision.data.sampling import ReadImages
from crossformer_vision.errors import UserError
from crossformer_vision.weights.reading import read_checkpoint

SECONDS, MEMORY = 20, 2048  # limits per file: seconds, and MiB above the baseline of the process
ADDRESSES = 8 << 30  # address space limit per file; decoders may reserve large buffers for truncated files
FORMATS = {
    "jpg": dict(format="JPEG"), "png": dict(format="PNG"), "gif": dict(format="GIF"), "bmp": dict(format="BMP"),
    "tif": dict(format="TIFF", compression="tiff_lzw"), "webp": dict(format="WEBP"), "ppm": dict(format="PPM"),
    "jp2": dict(format="JPEG2000"),
}  # fmt: skip
ODD: list[Any] = [
    None, True, "", "x", "../../x.png", "/etc/passwd", -1, 0, 0.5, 1e30, -1e30, float("nan"), float("inf"), 2**63, 10**40,
    [], {}, [[]], [None], "NaN", "é\u2028\x00", [1, 2, 3], {"counts": "0"}, {"size": [3, 3], "counts": [9]},
]  # fmt: skip


def pixels(rng: random.Random, mode: str = "RGB") -> Image.Image:
    width, height = rng.randint(1, 40), rng.randint(1, 40)
    noise = np.frombuffer(rng.randbytes(width * height * 3), np.uint8).reshape(height, width, 3)
    return Image.fromarray(noise).convert(mode)


def image_file(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(sorted(FORMATS))
    mode = rng.choice({"png": ["RGB", "L", "P", "RGBA", "LA", "1"], "gif": ["P"]}.get(kind, ["RGB", "L"]))
    options: dict[str, Any] = dict(FORMATS[kind])
    if kind in ("jpg", "png", "webp", "tif"):
        exif = Image.Exif()
        exif[images.EXIF_ORIENTATION] = rng.randint(1, 8)
        options["exif"] = exif
    out = io.BytesIO()
    pixels(rng, mode).save(out, **options)
    return f"x.{kind}", out.getvalue()


def coco_content(rng: random.Random) -> dict[str, Any]:
    shapes = [
        [[1, 1, 9, 1, 9, 8]], {"size": [20, 30], "counts": [100, 50, 450]}, {"size": [20, 30], "counts": "PPYo0"},
        [[1, 1, 9, 1, 9, 8, 2, 5], [10, 10, 15, 10, 12, 14]],
    ]  # fmt: skip
    annotations = [
        dict(id=n, image_id=1 + n % 2, category_id=1 + n % 3, bbox=[1, 2, 8, 6], area=40, iscrowd=int(n == 3),
             segmentation=rng.choice(shapes))
        for n in range(5)
    ]  # fmt: skip
    return dict(
        images=[dict(id=n, file_name=f"{n}.png", width=30, height=20) for n in (1, 2)],
        annotations=annotations,
        categories=[dict(id=n, name=f"class {n}") for n in (1, 2, 3)],
    )


def classes_content(rng: random.Random) -> dict[str, Any]:
    return {"classes": ["sky", "road", "tree"], "ignore_index": 255, "first_index": rng.randint(0, 2)}


def map_file(rng: random.Random) -> bytes:
    values = np.frombuffer(rng.randbytes(20 * 30), np.uint8).reshape(20, 30) % 3
    out = io.BytesIO()
    drawn = Image.fromarray(values)
    if rng.random() < 0.3:
        drawn = drawn.convert("P")
    drawn.save(out, "PNG")
    return out.getvalue()


def checkpoint_file(rng: random.Random, weights: dict[str, torch.Tensor]) -> tuple[str, bytes]:
    kind = rng.choice(["zip", "legacy", "safetensors", "pickle"])
    if kind == "safetensors":
        return "x.safetensors", safetensors.torch.save(weights)
    content: Any = rng.choice(
        [weights, {"model": weights, "epoch": 3}, {"state_dict": weights, "classes": ["a", "b"]}]
    )
    if kind == "pickle":
        return "x.pth", pickle.dumps(
            {"model": {"x": [1, 2, 3]}, "run": os.system if rng.random() < 0.5 else None}
        )
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=kind == "zip")
    return "x.pth", out.getvalue()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Change, remove, duplicate or insert bytes, mostly near the file header."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice([16, 64, 300, len(data)])))
        what = rng.randrange(6)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at] = rng.choice([0, 1, 127, 128, 255])
        elif what == 2:
            del data[rng.randrange(len(data)) :]
        elif what == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif what == 4:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"])
        else:
            data[at:at] = data[at : at + rng.randint(1, 64)]
    return bytes(data)


def odd(rng: random.Random, content: Any) -> Any:
    """Corrupt JSON content: replace a value with an invalid one, drop a key or duplicate an entry."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node, key = rng.choice(places)
        if (isinstance(node, list) and key >= len(node)) or (isinstance(node, dict) and key not in node):
            continue
        what = rng.random()
        if what < 0.15:
            del node[key]
        elif what < 0.25 and isinstance(node, list):
            node.append(node[key])
        else:
            node[key] = rng.choice(ODD)
    return content


class Fuzzer:
    """Generates and reads damaged files in its own directory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        (folder / "images").mkdir()
        for n in (1, 2):
            Image.new("RGB", (30, 20)).save(folder / "images" / f"{n}.png")
        self.model = timm.create_model("crossformer_nano", embed_dim=8, depths=(1, 1, 1, 1), num_classes=2)
        self.weights = {k: v for k, v in self.model.state_dict().items() if "stages.0" in k or "head" in k}

    def file(self, n: int) -> tuple[str, Callable[[], Any]]:
        """Write the n-th file and return its kind and reader."""
        rng = random.Random(f"{self.seed} {n}")
        kind = rng.choice(["image", "image", "coco", "coco", "classes", "map", "checkpoint"])
        if kind == "image":
            name, content = image_file(rng)
            return name.replace("x.", "image "), self._put(name, damaged(rng, content), images.load_image)
        if kind == "checkpoint":
            name, content = checkpoint_file(rng, self.weights)
            return kind, self._put(name, damaged(rng, content), self._checkpoint)
        if kind == "map":
            return kind, self._put("map.png", damaged(rng, map_file(rng)), self._map)
        content_of = coco_content if kind == "coco" else classes_content
        text = json.dumps(odd(rng, content_of(rng))).encode()
        if rng.random() < 0.3:
            text = damaged(rng, text)
        masks, train = rng.random() < 0.7, rng.random() < 0.5
        if kind == "classes":
            return kind, self._put("classes.json", text, lambda path, _: read_classes(path.parent))
        return kind, self._put("coco.json", text, lambda path, _: self._coco(path, masks, train))

    def _put(self, name: str, content: bytes, read: Callable[[Path, str], Any]) -> Callable[[], Any]:
        path = self.folder / name
        path.write_bytes(content)
        return lambda: read(path, str(path))

    def _coco(self, path: Path, masks: bool, train: bool) -> None:
        data = CocoImages(path, self.folder / "images", masks=masks, train=train)
        read = ReadImages(data, lambda image, target: target, skip_corrupt=False, train=train)
        for n in range(len(data)):
            read[n]

    def _map(self, path: Path, _: str) -> None:
        source = ClassMapImages([(self.folder / "images/1.png", path)], ["a", "b", "c"], value_table(3))
        ReadImages(source, lambda image, labels: labels, skip_corrupt=False)[0]

    def _checkpoint(self, path: Path, _: str) -> None:
        read_checkpoint(path)
        crossformer_vision.load_checkpoint(self.model, path)

    def run(self, n: int) -> tuple[str, str | None]:
        """Read the n-th file and return its kind and any failure."""
        kind, read = self.file(n)
        before, memory = sorted(self.folder.rglob("*")), peak()
        signal.alarm(SECONDS)
        wrong = None
        try:
            read()
        except UserError as error:
            lines = str(error).splitlines()
            if len(lines) != 1 or not lines[0].strip() or not str(error).isprintable():
                wrong = f"a message of {len(lines)} lines: {str(error)!r}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong = "".join(traceback.format_exception(error)[-3:])
        finally:
            signal.alarm(0)
        if sorted(self.folder.rglob("*")) != before:
            wrong = "it left a file behind"
        if peak() > memory + MEMORY:
            wrong = f"it took {peak() - memory} MiB"
        return kind, wrong


def peak() -> int:
    """Return the peak memory use of the process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def hang(*_: Any) -> None:
    raise TimeoutError(f"not read after {SECONDS} seconds")


def fuzz(count: int, seed: int, only: int | None = None, show: bool = False) -> list[str]:
    """Return one message per failure."""
    log = logging.getLogger("crossformer_vision")
    level = log.level
    log.setLevel(logging.ERROR)
    handler = signal.signal(signal.SIGALRM, hang)
    found: list[str] = []
    kinds: Counter[str] = Counter()
    here = Path.cwd()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, limit[1]))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.chdir(folder)  # detects writes outside the working directory
        try:
            warnings.simplefilter("ignore")
            fuzzer = Fuzzer(Path(folder), seed)
            for n in range(count) if only is None else [only]:
                kind, wrong = fuzzer.run(n)
                kinds[kind] += 1
                if wrong:
                    found.append(f"file {n} of seed {seed}, {kind}: {wrong}")
                if show and n % 500 == 499:
                    print(f"\r{n + 1} files, {len(found)} wrong", end="", flush=True)
        finally:
            os.chdir(here)
            resource.setrlimit(resource.RLIMIT_AS, limit)
            signal.signal(signal.SIGALRM, handler)
            log.setLevel(level)
    if show:
        print(f"\n{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="files (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of all of them (0)")
    parser.add_argument("--only", type=int, help="number of one file, to repeat it")
    options = parser.parse_args()
    wrong = fuzz(options.count, options.seed, options.only, show=True)
    print("\n".join(wrong[:40]) or "nothing wrong")
    sys.exit(bool(wrong))
