"""Measure ways to fine-tune with few images: ``python docs/results/finetuning.py DATA OUTPUT``.

DATA is Imagenette with ``train.tar`` and ``val.tar``, or CamVid in ADE20K's layout. Results are appended to
``OUTPUT/results.csv``; runs that are listed there are skipped, so the script continues where it stopped.
"""

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

METHODS = {
    "full": [],
    "layer decay": ["--model.layer_decay", "0.75"],
    "frozen": ["--model.freeze", "2"],
    "linear probe": ["--model.freeze", "all", "--model.lr", "2e-2"],
    "LoRA": ["--model.lora", "8", "--model.lr", "1e-2"],
}
EPOCHS = {25: 20, 100: 10, 500: 4}  # by images per class
SEEDS = (0, 1, 2)
SIDE = 80  # shorter side of the stored images, in pixels


def unpack(tar: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Store small copies of the images of an archive. Yields the class and the path of each."""
    with tarfile.open(tar) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            name = Path(member.name).parts[-2]
            target = folder / name / Path(member.name).with_suffix(".png").name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                image = Image.open(archive.extractfile(member)).convert("RGB")
                factor = SIDE / min(image.size)
                image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC).save(
                    target
                )
            yield name, str(target.relative_to(folder.parent))


def write_subsets(data: Path, output: Path) -> None:
    """Write a CSV file for each number of images per class: the first ones in the order of their names."""
    by_class = defaultdict(list)
    for name, path in unpack(data / "train.tar", output / "train"):
        by_class[name].append(path)
    validation = [(path, name, "val") for name, path in unpack(data / "val.tar", output / "val")]
    for count in EPOCHS:
        rows = [(path, name, "train") for name, paths in by_class.items() for path in paths[:count]]
        with (output / f"{count}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows, *validation])


def write_quarter(data: Path, output: Path) -> None:
    """Copy CamVid with every fourth training image."""
    shutil.copytree(data, output / "camvid", ignore=lambda folder, names: [])
    for kind in ("images", "annotations"):
        files = sorted((output / "camvid" / kind / "training").rglob("*.png"))
        for n, file in enumerate(files):
            if n % 4:
                file.unlink()


def measure(root: Path, output: Path, options: list[str]) -> float:
    """Metric of the last epoch of a run."""
    run = output / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "crossformer_vision",
        "train",
        str(root),
        "--run.dir",
        str(run),
        *options,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metric = json.loads((run / "results.json").read_text())["metric"]
    with (run / "metrics.csv").open() as file:
        return float([row[metric] for row in csv.DictReader(file) if row.get(metric)][-1])


def main(data: Path, output: Path) -> None:
    """Run what is missing in the results."""
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.csv"
    done = set()
    if results.exists():
        with results.open() as file:
            done = {tuple(row[:3]) for row in csv.reader(file)}
    common = ["--trainer.accelerator", "cpu", "--trainer.precision", "bf16-mixed", "--data.num_workers", "1"]
    if (data / "train.tar").exists():
        write_subsets(data, output)
        grid = {
            str(count): (output / f"{count}.csv", ["--data.image_size", "64"], epochs)
            for count, epochs in EPOCHS.items()
        }
    else:
        if not (output / "camvid").exists():
            write_quarter(data, output)
        grid = {"quarter of CamVid": (output / "camvid", [], 12)}
    for seed in SEEDS:
        for size, (root, extra, epochs) in grid.items():
            for method, options in METHODS.items():
                if (size, method, str(seed)) in done:
                    continue
                schedule = [
                    "--trainer.max_epochs",
                    str(epochs),
                    "--trainer.check_val_every_n_epoch",
                    str(epochs),
                ]
                seeded = ["--seed_everything", str(seed)]
                score = measure(root, output, [*common, *extra, *schedule, *seeded, *options])
                with results.open("a", newline="") as file:
                    csv.writer(file).writerow([size, method, seed, f"{score:.4f}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
