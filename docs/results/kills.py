"""Runs of two processes, killed at random moments, each started again by the same command.

SIGKILL and SIGTERM by turns, to both processes. Each run has to end with the weights and figures of the run
that was left alone, bit for bit: python docs/results/kills.py [HOW MANY] [FOLDER].
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

OPTIONS = (
    "--model.model_args {depths: [1, 1, 1, 1], embed_dim: 16, num_heads: [1, 1, 2, 4]} "
    "--model.pretrained false "
    "--data.image_size 32 --data.train_images 512 --data.val_images 64 --data.batch_size 8 "
    "--data.num_workers 1 "
    "--trainer.max_epochs 3 --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp "
    "--run.save_every 4 --run.ema 0.9 --model.mix_prob 0.5 --resume auto"
)


def started(folder: Path) -> subprocess.Popen:
    words = OPTIONS.split(" ")
    given: list[str] = []
    for word in words:  # a value in braces is one
        inside = given and given[-1].count("{") > given[-1].count("}")
        given = [*given[:-1], f"{given[-1]} {word}"] if inside else [*given, word]
    command = [sys.executable, "-m", "crossformer_vision", "train", *given, "--run.dir", str(folder)]
    calm = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=calm, stdout=log, stderr=log, start_new_session=True)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    results = json.loads((folder / "results.json").read_text())
    return weights, {k: v for k, v in results.items() if k.startswith("val_")}


def main(count: int, at: Path) -> None:
    start = time.perf_counter()
    assert started(at / "alone").wait() == 0
    whole = time.perf_counter() - start
    weights, figures = outcome(at / "alone")
    print(f"left alone: {whole:.0f} s, {figures}", flush=True)
    rng, same = random.Random(0), 0
    for n in range(count):
        folder, kind = at / f"killed-{n}", (signal.SIGKILL, signal.SIGTERM)[n % 2]
        moment = rng.uniform(0.1, 1.0) * whole
        job = started(folder)
        try:
            job.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, kind)
        code = job.wait()
        step = "before its first checkpoint"
        if (folder / "last.ckpt").exists():
            step = f"step {torch.load(folder / 'last.ckpt', weights_only=True)['global_step']}"
        again = started(folder).wait()
        found, its_figures = outcome(folder) if not again else ({}, {})
        equal = found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
        same += equal and its_figures == figures
        result = "the same" if equal and its_figures == figures else f"DIFFERENT {its_figures}"
        print(
            f"{n}: {kind.name} at {moment:.1f} s, exit code {code}, {step}; again: {again}, {result}",
            flush=True,
        )
    print(f"{same} of {count} end as the one that was left alone")


if __name__ == "__main__":
    given = sys.argv[1:]
    number = int(given[0]) if given else 30
    if given[1:]:
        Path(given[1]).mkdir(parents=True, exist_ok=True)
        main(number, Path(given[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(number, Path(folder))
