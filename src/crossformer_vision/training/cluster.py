"""Environments that start and restart runs: SLURM and torchrun."""

import os
import subprocess
from pathlib import Path

import lightning as L
from torch import distributed

LOCK = ".lock"  # file in a run directory, locked during the run; contains the name of the job that started it


def current_job() -> str | None:
    """Name of the SLURM job or torchrun launch that started this process and may restart it."""
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {number}"
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun {run}"
    return None


def is_started_by_this_job(run_dir: Path) -> bool:
    """Whether the current job started the run in a directory."""
    try:
        return current_job() is not None and (run_dir / LOCK).read_text(encoding="utf-8") == current_job()
    except OSError:
        return False


def is_restarted() -> bool:
    """Whether SLURM has requeued this job, or torchrun has restarted its processes."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def requeue() -> bool:
    """Requeue this SLURM job.

    Returns:
        Whether SLURM accepted the request.
    """
    try:
        result = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True)
    except OSError:
        return False
    return result.returncode == 0


def init_restarted_process_group(trainer: L.Trainer) -> None:
    """Join the process group after torchrun has restarted the processes.

    The rendezvous store still has the addresses of the processes that died (torch 2.15, gloo), so each
    attempt uses a prefix of its own.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or trainer.world_size == 1 or distributed.is_initialized():
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    backend = "nccl" if trainer.strategy.root_device.type == "cuda" else "gloo"
    store = distributed.PrefixStore(f"attempt-{attempt}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
