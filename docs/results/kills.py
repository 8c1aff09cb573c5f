"""Kill runs with two processes at random moments, and restart each with the same command.

SIGKILL and SIGTERM alternate and are sent to all processes of a run. Weights and metrics at the end must be
bit-identical to those of an uninterrupted run.

Usage: python docs/results/kills.py [NUMBER_OF_RUNS] [FOLDER]
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


def start_run(folder: Path) -> subprocess.Popen:
    """Start or resume a run in a process group of its own."""
    words = OPTIONS.split(" ")
    given: list[str] = []
    for word in words:  # a value in braces is one argument
        inside = given and given[-1].count("{") > given[-1].count("}")
        given = [*given[:-1], f"{given[-1]} {word}"] if inside else [*given, word]
    command = [sys.executable, "-m", "crossformer_vision", "train", *given, "--run.dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def read_outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and validation metrics of a finished run."""
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    results = json.loads((folder / "results.json").read_text())
    return weights, {k: v for k, v in results.items() if k.startswith("val_")}


def main(count: int, at: Path) -> None:
    """Kill and restart ``count`` runs, and compare each with an uninterrupted run."""
    start = time.perf_counter()
    assert start_run(at / "uninterrupted").wait() == 0
    duration = time.perf_counter() - start
    weights, metrics = read_outcome(at / "uninterrupted")
    print(f"uninterrupted: {duration:.0f} s, {metrics}", flush=True)
    rng, same = random.Random(0), 0
    for n in range(count):
        folder, kind = at / f"killed-{n}", (signal.SIGKILL, signal.SIGTERM)[n % 2]
        moment = rng.uniform(0.1, 1.0) * duration
        job = start_run(folder)
        try:
            job.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, kind)
        code = job.wait()
        step = "before the first checkpoint"
        if (folder / "last.ckpt").exists():
            step = f"step {torch.load(folder / 'last.ckpt', weights_only=True)['global_step']}"
        restart_code = start_run(folder).wait()
        run_weights, run_metrics = read_outcome(folder) if not restart_code else ({}, {})
        is_same = run_weights.keys() == weights.keys() and run_metrics == metrics
        is_same = is_same and all(torch.equal(run_weights[k], weights[k]) for k in weights)
        same += is_same
        result = "identical" if is_same else f"DIFFERENT {run_metrics}"
        print(
            f"{n}: {kind.name} at {moment:.1f} s, exit code {code}, {step}; restart {restart_code}, {result}",
            flush=True,
        )
    print(f"{same} of {count} runs are identical to the uninterrupted run")


if __name__ == "__main__":
    given = sys.argv[1:]
    number = int(given[0]) if given else 30
    if given[1:]:
        Path(given[1]).mkdir(parents=True, exist_ok=True)
        main(number, Path(given[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(number, Path(folder))
