"""A run: train, then validate the best checkpoint. The same for every task.

A run directory contains:

- ``config.yaml``: resolved configuration; ``val_list.txt``: held-out validation images, if any
- ``metrics.csv``: one row per epoch, plotted in ``curves.png``
- ``tensorboard/``: the same for TensorBoard, unless ``--run.logger`` is another tracker
- ``best.ckpt``: epoch with the best validation (averaged weights if ``--run.ema`` is set)
- ``last.ckpt``: state to resume from
- ``results.json``: metrics of the best checkpoint, and how they were obtained
- plots of the task's validation, such as ``confusion_matrix.png``
"""

import logging
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import distributed

from crossformer_vision.compat import epochs_started
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.errors import UserError, check_choice, check_range, counted
from crossformer_vision.files import create_run_dir, write_json
from crossformer_vision.tasks.base import Task
from crossformer_vision.training.checkpointing import (
    AverageWeights,
    BestCheckpoint,
    LastCheckpoint,
    PatienceInEpochs,
)
from crossformer_vision.training.cluster import init_restarted_process_group
from crossformer_vision.training.interruption import StopOnNonFiniteLoss, StopOnSignal, Stopped
from crossformer_vision.training.loggers import LoggerName, check_logger
from crossformer_vision.training.progress import MetricsWriter, Throughput
from crossformer_vision.training.run_directory import RunDirectory
from crossformer_vision.types import Checkpoint, JsonObject
from crossformer_vision.weights.loading import load_weights
from crossformer_vision.weights.reading import read_checkpoint

CallbackType = TypeVar("CallbackType", bound=Callback)


@dataclass
class RunOptions:
    """Where a run is saved, and which weights it keeps.

    Args:
        dir: Run directory; null for ``runs/<task>-<backbone>``, numbered if it exists.
        ema: Decay of an exponential moving average of the weights, which is validated and saved in place of
            the weights; 0 for none. The decay rises to this value as (1 + steps) / (10 + steps).
        patience: Stop after this many epochs without a better validation; 0 to train to the end.
        save_every: Also save ``last.ckpt`` every n steps; 0 to save it at the end of each epoch only.
        logger: Experiment tracker: ``tensorboard``, or ``wandb``, ``mlflow`` or ``comet`` if that library is
            installed. ``--trainer.logger false`` disables it.
    """

    dir: str | None = None
    ema: float = 0.0
    patience: int = 0
    save_every: int = 0
    logger: LoggerName = "tensorboard"

    def __post_init__(self) -> None:
        check_range("--run.ema", self.ema, 0, 1)
        check_range("--run.patience", self.patience, 0)
        check_range("--run.save_every", self.save_every, 0)
        check_choice("--run.logger", self.logger, get_args(LoggerName))


def run_callbacks(
    options: RunOptions, task: Task, config: str, is_resumed: bool = False, use_logger: bool = True
) -> list[Callback]:
    """Create the callbacks that turn a training of Lightning's Trainer into a run.

    Args:
        options: Options of the run.
        task: Task that is trained.
        config: Configuration to save, as YAML.
        is_resumed: Whether the run is resumed in an existing run directory.
        use_logger: Whether to use the logger of the options.
    """
    if use_logger:
        check_logger(options.logger)
    logger = options.logger if use_logger else None
    run_directory = RunDirectory(options.dir, config, is_resumed, logger)
    throughput = Throughput()
    callbacks: list[Callback] = [AverageWeights(options.ema)] if options.ema else []
    callbacks += [
        StopOnNonFiniteLoss(),  # before the run directory counts the batch
        run_directory,
        throughput,
        MetricsWriter(run_directory, throughput),
        StopOnSignal(run_directory),
        BestCheckpoint(task),  # before last.ckpt, which stores the state of this callback
        LastCheckpoint(),
    ]
    if options.save_every:
        callbacks.append(LastCheckpoint(options.save_every))
    if options.patience:
        callbacks.append(PatienceInEpochs(options.patience, task))
    return callbacks


def train(trainer: L.Trainer, task: Task, data: BaseDataModule, resume: str | None = None) -> JsonObject:
    """Train, validate the best checkpoint and write ``results.json``.

    Args:
        trainer: Trainer with the callbacks of ``run_callbacks``.
        task: Task to train.
        data: Data module.
        resume: Run directory to continue from.

    Returns:
        Content of ``results.json``.

    Raises:
        UserError: If the run cannot start or continue.
        Stopped: If a signal has ended it.
    """
    init_restarted_process_group(trainer)
    parameters = sum(p.numel() for p in task.net.parameters())
    _print_start(trainer, task, data, parameters, resume)
    _fit(trainer, task, data, resume)
    run_directory, throughput = find_callback(trainer, RunDirectory), find_callback(trainer, Throughput)
    run_dir = run_directory.path
    # There is no best.ckpt without a validation, and no checkpoint at all in a fast_dev_run.
    checkpoints = [path for path in (run_dir / "best.ckpt", run_dir / "last.ckpt") if path.exists()]
    checkpoints = trainer.strategy.broadcast(checkpoints)
    # WeightAveraging would validate the last epoch's average instead of the best weights.
    _set_callbacks(trainer, [c for c in _callbacks(trainer) if not isinstance(c, WeightAveraging)])
    metrics = validate(trainer, task, data, checkpoints[0] if checkpoints else None, run_dir)
    results = {
        **task.model_names(),
        "parameters": parameters,
        **metrics,
        "metric": task.monitor,
        "image_size": data.training_size(),
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "global_batch": data.global_batch * trainer.accumulate_grad_batches,
        "epochs": trainer.current_epoch,
        "images_seen": task.images_seen,
        "minutes": round(throughput.minutes(), 2),
        "checkpoint": str(checkpoints[0]) if checkpoints else None,
        **environment_info(),
    }
    if trainer.is_global_zero:
        write_json(run_dir / "results.json", results)
    return results


def _print_start(
    trainer: L.Trainer, task: Task, data: BaseDataModule, parameters: int, resume: str | None
) -> None:
    """Print model, data, precision and initial weights."""
    train, val = (len(data.open(stage)) for stage in ("train", "val"))
    if not trainer.is_global_zero:
        return
    name = " on ".join(task.model_names().values())
    split = f" in {data.found_splits['val']}" if "val" in data.found_splits else ""
    classes = counted(len(data.classes), "class", "classes")
    classes += f" ({data.label_format} labels)" if data.label_format else ""
    print(
        f"training {name} ({parameters / 1e6:.1f} M parameters) on {counted(train, 'image')} of {classes}, "
        f"validating on {val}{split}\n"
        f"precision: {trainer.precision} on {trainer.strategy.root_device.type}",
        flush=True,
    )
    if not data.pixel_format.is_rgb:
        print(f"images have {data.pixel_format}", flush=True)
    if not resume and task.initial_weights:
        print(task.initial_weights, flush=True)
    if line := task.describe_frozen():
        print(line, flush=True)


def _fit(trainer: L.Trainer, task: Task, data: BaseDataModule, resume: str | None) -> None:
    """Train, and clean up the run directory however training ends."""
    run_directory = find_callback(trainer, RunDirectory)
    last = Path(resume) / "last.ckpt" if resume else None
    try:
        trainer.fit(task, data, ckpt_path=str(last) if last and last.exists() else None, weights_only=True)
    except RuntimeError as error:
        if trainer.world_size > 1 and re.search("gloo|nccl|peer|connection", str(error), re.IGNORECASE):
            raise UserError(f"another process of this run died; {run_directory.resume_hint()}") from error
        raise
    except SystemExit as stop:  # raised by Lightning on a second Ctrl-C, or on one before the first step
        if not run_directory.has_trained and not (run_directory.path / "last.ckpt").exists():
            raise KeyboardInterrupt from stop
        raise Stopped(f"stopped; {run_directory.resume_hint()}", signal.SIGINT) from None
    finally:
        data.teardown("fit")  # Lightning calls it only if nothing was raised
        find_callback(trainer, MetricsWriter).plot()
        find_callback(trainer, StopOnSignal).restore_handlers()
        run_directory.release_lock()
        if trainer.is_global_zero:
            run_directory.remove_unused()


def validate(
    trainer: L.Trainer, task: Task, data: BaseDataModule, checkpoint: Path | None, plot_dir: Path | None
) -> JsonObject:
    """Validate a checkpoint and plot its results.

    Args:
        trainer: Lightning's Trainer.
        task: Task, into which the weights are loaded.
        data: Data module.
        checkpoint: Checkpoint file. ``None`` for the weights that the task has.
        plot_dir: Directory for plots. ``None`` for no plots.

    Returns:
        Metrics, the monitored one first; empty if there are no validation images.
    """
    is_parallel = distributed.is_available() and distributed.is_initialized()
    task.merge_adapters()
    thresholds: list[float] | None = None
    if checkpoint is not None and (trainer.is_global_zero or not is_parallel):
        content = read_checkpoint(checkpoint)
        load_weights(task.net, content, str(checkpoint), adapt_classifier=False)
        thresholds = content.get("thresholds")
    if checkpoint is not None and is_parallel:  # other machines may not have the file
        task.net.load_state_dict(trainer.strategy.broadcast(task.net.state_dict()))
        thresholds = trainer.strategy.broadcast(thresholds)
    if thresholds is not None:
        task.use_thresholds(thresholds)
    outputs = trainer.validate(task, data, verbose=False)
    metrics = dict(outputs[0]) if outputs else {}
    metrics = {**{k: v for k, v in metrics.items() if k == task.monitor}, **metrics}
    if metrics and plot_dir is not None and trainer.is_global_zero:
        plot_dir.mkdir(parents=True, exist_ok=True)
        task.plot(plot_dir, data.classes)
    return metrics


def evaluate(
    trainer: L.Trainer, task: Task, data: BaseDataModule, checkpoint: Path | None, output_dir: Path
) -> tuple[JsonObject, Path]:
    """Validate and write plots and ``results.json`` to a new directory.

    Args:
        trainer: Lightning's Trainer.
        task: Task, into which the weights are loaded.
        data: Data module.
        checkpoint: Checkpoint file. ``None`` for the weights that the task has.
        output_dir: Directory for plots and ``results.json``, numbered if it exists.

    Returns:
        Content of ``results.json``, and the directory.

    Raises:
        UserError: If there are no images to validate on.
    """
    if trainer.is_global_zero:
        output_dir = create_run_dir(output_dir)
    try:
        metrics = validate(trainer, task, data, checkpoint, output_dir)
        if not metrics:
            raise UserError("there are no images to validate on. Check --trainer.limit_val_batches")
    finally:
        if trainer.is_global_zero and not any(output_dir.iterdir()):
            output_dir.rmdir()
    results = {
        **task.model_names(),
        **metrics,
        "data": data.root,
        "images": _count_validated(trainer, data),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **environment_info(),
    }
    if trainer.is_global_zero:
        write_json(output_dir / "results.json", results)
    return results, output_dir


def _count_validated(trainer: L.Trainer, data: BaseDataModule) -> int:
    """Number of images that the last validation of a Trainer has used."""
    batches = int(sum(trainer.num_val_batches))
    loader = trainer.val_dataloaders
    assert isinstance(loader, SeededLoader)
    return min(len(data.open("val")), batches * loader.batches.batch_size * trainer.world_size)


def is_finished(run_dir: Path, trainer: L.Trainer) -> bool:
    """Whether a run has results and no step left under the options of a Trainer."""
    if not all((run_dir / name).exists() for name in ("results.json", "last.ckpt")):
        return False
    content = read_checkpoint(run_dir / "last.ckpt")
    if 0 < trainer.max_steps <= content["global_step"]:
        return True
    if any(isinstance(c, PatienceInEpochs) and c.has_stopped(content) for c in _callbacks(trainer)):
        return True
    return 0 < (trainer.max_epochs or -1) <= completed_epochs(content)


def completed_epochs(checkpoint: Checkpoint) -> int:
    """Number of complete epochs in a checkpoint of a run."""
    data = [v for k, v in checkpoint.items() if k.endswith("Data") and isinstance(v, dict)]
    is_within_epoch = any(state.get("taken") for state in data)
    return epochs_started(checkpoint) - is_within_epoch


def find_callback(trainer: L.Trainer, kind: type[CallbackType]) -> CallbackType:
    """The Trainer's callback of a type."""
    return next(callback for callback in _callbacks(trainer) if isinstance(callback, kind))


def _callbacks(trainer: L.Trainer) -> Sequence[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _set_callbacks(trainer: L.Trainer, callbacks: list[Callback]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def environment_info() -> dict[str, str]:
    """Command, hardware, torch version and date, for result files."""
    return {
        "command": shlex.join(["crossformer", *sys.argv[1:]]),
        "hardware": hardware_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def hardware_name() -> str:
    """Names of the GPUs, or else of the CPU with the number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def silence_lightning() -> None:
    """Hide Lightning's log messages below errors, and warnings that users cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Requested by an option of the Trainer.
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")
    for message in (
        "The ``compute`` method of metric",  # in a process without validation images
        "Grad strides do not match",  # depthwise convolutions
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
