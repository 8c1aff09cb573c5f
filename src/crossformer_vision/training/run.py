"""A run and its folder: the same for every task.

config.yaml       the resolved configuration; val_list.txt the validation images, where they were held out
metrics.csv       one row an epoch; curves.png draws it
tensorboard/      the same for TensorBoard
best.ckpt         the epoch with the best validation, EMA weights if there are any; last.ckpt to resume from
results.json      what came out, and on what
*.png             what a validation of the task shows
"""

import os
import platform
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    WeightAveraging,
)
from torch import distributed

from crossformer_vision.errors import UserError as UserError
from crossformer_vision.errors import check_range, counted
from crossformer_vision.files import new_folder, write_json
from crossformer_vision.tasks.base import Task
from crossformer_vision.training.run_directory import (
    AverageWeights,
    BestCheckpoint,
    Patience,
    RunFolder,
    Stopped,
)


@dataclass
class Run:
    """Where a run is kept, and how.

    Args:
        folder: of the run; null for `runs/<task>-<model>`, numbered if there is one.
        ema: decay of an exponential moving average of the weights, which is then validated and kept; 0 for
            none. The decay rises to this value, as (1 + steps) / (10 + steps).
        patience: stop after so many epochs without a better validation; 0 to go on to the end.
        save_every: also save `last.ckpt` every so many steps; 0 for at each epoch's end alone.
    """

    folder: str | None = None
    ema: float = 0.0
    patience: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        check_range("--run.ema", self.ema, 0, 1)
        check_range("--run.patience", self.patience, 0)
        check_range("--run.save_every", self.save_every, 0)

    def callbacks(self, task: Task, config: str, resumed: bool, tensorboard: bool = True) -> list[Callback]:
        """What Lightning's Trainer needs for a run; `RunFolder` chooses the folder of the others."""
        callbacks: list[Callback] = [AverageWeights(self.ema)] if self.ema else []
        callbacks += [
            RunFolder(self, config, resumed, tensorboard),
            BestCheckpoint(  # before `last`, which keeps what the best one is
                None,
                "best",
                monitor=task.monitor,
                mode=task.monitor_mode,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
            ModelCheckpoint(None, "last", enable_version_counter=False, save_on_train_epoch_end=False),
        ]
        if self.save_every:
            callbacks.append(
                ModelCheckpoint(
                    None, "last", enable_version_counter=False, every_n_train_steps=self.save_every
                )
            )
        if self.patience:
            callbacks.append(Patience(self.patience, task))
        return callbacks


def quiet() -> None:
    """Silence what Lightning says of itself; its errors still come."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What a person has asked for still speaks.
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings(
        "ignore", message="The ``compute`` method of metric"
    )  # of a process without images
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of depth-wise convolutions
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def parts(task: Task) -> dict[str, str]:
    """The names of what is trained: of the model, and of the detector or segmenter on it."""
    return {key: task.hparams[key] for key in ("detector", "segmenter", "model") if key in task.hparams}


def join_again(trainer: L.Trainer) -> None:
    """Processes that torchrun has started anew meet under names of their own.

    Under the usual ones its store still has the addresses of those that died (torch 2.15, gloo).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or trainer.world_size == 1 or distributed.is_initialized():
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    backend = "nccl" if trainer.strategy.root_device.type == "cuda" else "gloo"
    store = distributed.PrefixStore(f"attempt-{attempt}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def train(trainer: L.Trainer, task: Task, data: Any, run: Run, resume: str | None) -> dict[str, Any]:
    """Train, then validate the best checkpoint and write what it shows; returns what `results.json` holds."""
    join_again(trainer)
    params = sum(p.numel() for p in task.net.parameters())
    train, val = (len(data.open(stage)) for stage in ("train", "val"))
    writer: Any = next(c for c in trainer.callbacks if isinstance(c, RunFolder))  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        name = " on ".join(parts(task).values())
        split = f" in {data.found_splits['val']}" if "val" in data.found_splits else ""
        print(
            f"training {name} ({params / 1e6:.1f} M parameters) on {counted(train, 'image')} of "
            f"{counted(len(data.classes), 'class', 'classes')}, validating on {val}{split}\n"
            f"precision: {trainer.precision} on {trainer.strategy.root_device.type}",
            flush=True,
        )
        if not resume and task.initial_weights:
            print(task.initial_weights, flush=True)
    last = Path(resume) / "last.ckpt" if resume else None
    try:
        trainer.fit(task, data, ckpt_path=str(last) if last and last.exists() else None, weights_only=True)
    except RuntimeError as error:
        if trainer.world_size > 1 and re.search("gloo|nccl|peer|connection", str(error), re.IGNORECASE):
            raise UserError(f"another process of this run died; {writer.how_to_go_on()}") from error
        raise
    except SystemExit as stop:  # Lightning's, of a second Ctrl-C, or of one before the first step
        if not writer.batches and not (writer.folder / "last.ckpt").exists():
            raise KeyboardInterrupt from stop
        raise Stopped(f"stopped; {writer.how_to_go_on()}", signal.SIGINT) from None
    finally:
        data.teardown("fit")  # Lightning calls it only where nothing was raised
        writer.close()
        if trainer.is_global_zero:
            writer.remove_unused()
    folder = writer.folder
    # Without a validation there is no best one, and `fast_dev_run` saves nothing. The first process knows.
    saved = [path for path in (folder / "best.ckpt", folder / "last.ckpt") if path.exists()]
    saved = trainer.strategy.broadcast(saved)
    # It would validate the last epoch's average in place of the best weights.
    kept = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    metrics = validate(trainer, task, data, saved[0] if saved else None, folder)
    results = {
        **parts(task),
        "parameters": params,
        **metrics,
        "metric": task.monitor,
        "image_size": data.training_size(),
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "global_batch": data.global_batch * trainer.accumulate_grad_batches,
        "epochs": trainer.current_epoch,
        "images_seen": task.images_seen,
        "minutes": round(writer.minutes(), 2),
        "checkpoint": str(saved[0]) if saved else None,
        **about(),
    }
    if trainer.is_global_zero:
        write_json(folder / "results.json", results)
    return results


def about() -> dict[str, Any]:
    """What figures came from."""
    return {
        "command": " ".join(["crossformer", *sys.argv[1:]]),
        "hardware": hardware(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def validate(
    trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, folder: Path | None
) -> dict[str, Any]:
    """Validate the weights of a checkpoint, or those that the task has; pictures go to `folder`."""
    from crossformer_vision.weights.checkpoints import load_checkpoint

    together = distributed.is_available() and distributed.is_initialized()
    if checkpoint is not None and (trainer.is_global_zero or not together):
        load_checkpoint(task.net, checkpoint, adapt_classifier=False)
    if checkpoint is not None and together:  # other machines may not see the file
        task.net.load_state_dict(trainer.strategy.broadcast(task.net.state_dict()))
    found = trainer.validate(task, data, verbose=False)
    metrics = dict(found[0]) if found else {}  # no validation was wanted
    metrics = {**{k: v for k, v in metrics.items() if k == task.monitor}, **metrics}
    if metrics and folder is not None and trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        task.pictures(folder, data.classes)
    return metrics


def evaluate(
    trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, folder: Path
) -> tuple[dict[str, Any], Path]:
    """Validate into a folder of its own, of this name or numbered; returns what its `results.json` holds."""
    if len(data.open("val")) and trainer.is_global_zero:
        folder = new_folder(folder)
    try:
        metrics = validate(trainer, task, data, checkpoint, folder)
    finally:
        if trainer.is_global_zero and not any(folder.iterdir()):
            folder.rmdir()
    weights = None if checkpoint is None else str(checkpoint)
    images = {"data": data.root, "images": len(data.open("val"))}
    results = {**parts(task), **metrics, **images, "checkpoint": weights, **about()}
    if trainer.is_global_zero:
        write_json(folder / "results.json", results)
    return results, folder


def is_finished(folder: Path, trainer: L.Trainer) -> bool:
    """Whether a run has its figures, and no step to go."""
    if not all((folder / name).exists() for name in ("results.json", "last.ckpt")):
        return False
    from crossformer_vision.weights.checkpoints import read_checkpoint

    content = read_checkpoint(folder / "last.ckpt")
    if 0 < trainer.max_steps <= content["global_step"]:
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, Patience) and c.has_stopped(content) for c in callbacks):
        return True
    taken = any(v.get("taken") for k, v in content.items() if k.endswith("Data") and isinstance(v, dict))
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] - bool(taken)
    return 0 < (trainer.max_epochs or -1) <= epochs


def hardware() -> str:
    """The accelerators, or else the processor and its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"
