"""The options of `crossformer train` and `validate`: defaults that hold, help in order.

Lightning's parser on our task, data and trainer: every option is where its argument is documented.
"""

import atexit
import glob
import logging
import os
import shutil
import sys
import tempfile
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, StochasticWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.plugins.io import CheckpointIO

from crossformer_vision.cli.arguments import content_of, find_config, has, in_utf8, suggest, take
from crossformer_vision.cli.error_messages import explain
from crossformer_vision.data.layout import infer_task
from crossformer_vision.errors import UserError
from crossformer_vision.files import AtomicCheckpoints
from crossformer_vision.training.precision import Precision, resolve_precision, training_device
from crossformer_vision.training.run import Run, quiet
from crossformer_vision.training.run_directory import VAL_LIST, Progress, command, of_this_job
from crossformer_vision.weights import published
from crossformer_vision.weights.checkpoints import read_checkpoint, span_of_a_run


class TaskParts(NamedTuple):
    """Where a task's classes are, its quickstart, what its data take from its model."""

    module: str  # in `tasks` and in `data`
    task: str
    data: str
    quickstart: str
    links: tuple[str, ...]  # options of the model that the data have, too
    sign: str | None  # an option that no other task has


TASKS = {
    "classification": TaskParts(
        "classification", "Classification", "ClassificationData", "classification", ("model",), None
    ),
    "detection": TaskParts(
        "detection",
        "Detection",
        "DetectionData",
        "detection",
        ("detector", "min_size", "max_size"),
        "detector",
    ),
    "segmentation": TaskParts(
        "segmentation",
        "Segmentation",
        "SegmentationData",
        "semantic_segmentation",
        ("model", "test_scales"),
        "segmenter",
    ),
}

# Options of Lightning's Trainer that mean nothing here, or what a run does itself: neither shown nor taken.
NOT_OURS = {
    "enable_checkpointing": "a run keeps its checkpoints; --trainer.fast_dev_run true tries one batch",
    "barebones": "use --trainer.profiler, or `crossformer info`",
    "default_root_dir": "use --run.folder",
    "limit_test_batches": "there is no test; use --trainer.limit_val_batches",
    "limit_predict_batches": "use --trainer.limit_val_batches",
    "log_every_n_steps": "a run logs once an epoch",
    "use_distributed_sampler": "the data share the images among processes themselves",
    "reload_dataloaders_every_n_epochs": "the data load anew by themselves",
    "model_registry": "a run keeps its checkpoints in its folder",
}
OUR_TRAINER = {
    "trainer.max_epochs": 10,
    "trainer.enable_model_summary": False,
    "trainer.use_distributed_sampler": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.gradient_clip_val": 5.0,
    # Not the working directory, where Lightning looks in a SLURM job for a checkpoint of any earlier job.
    "trainer.default_root_dir": "runs",
}
# What a resumed run cannot change: its weights, and the optimizer's state, would not fit.
FIXED = (
    "task",
    "model.model",
    "model.model_args",
    "model.detector",
    "model.segmenter",
    "model.width",
    "model.anchor_scale",
    "model.optimizer",
    "model.decay_on",
)


def task_of(args: list[str], configs: Sequence[str]) -> str:
    """The task of a command line: `--task`, or a configuration's, or that whose options it has."""
    name = take(list(args), "--task")
    contents = [content_of(config) for config in configs]
    for content in contents:
        name = name or content.get("task")
    for task, parts in TASKS.items():
        options = [content.get("model") for content in contents]
        there = any(isinstance(model, dict) and parts.sign in model for model in options)
        if name is None and parts.sign and (there or has(args, f"--model.{parts.sign}")):
            name = task
    name = name or (None if configs else infer_task_of(args)) or "classification"
    if name not in TASKS:
        raise UserError(f"no task '{name}'; there are: {', '.join(TASKS)}{suggest(str(name), list(TASKS))}")
    return name


def infer_task_of(args: Sequence[str]) -> str | None:
    """The task that the folder `--data.root` is for, said in a line unless it is the default one."""
    root = take(list(args), "--data.root")
    if root is None or not Path(root).is_dir():
        return None
    task, reason = infer_task(Path(root))
    if task != "classification" and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"task: {task}, since in {root} {reason}; --task names another", flush=True)
    return task


def recipe(task: str, args: Sequence[str]) -> tuple[str, str]:
    """Where a command line without `--config` starts, and a line that says so.

    Without data it is the quickstart; with data of one's own the default recipe of the task, that for a GPU
    or that for a CPU. That for a GPU starts from ImageNet weights; where they cannot be fetched, that for a
    CPU holds, whose weights come with the library.
    """
    if not has(args, "--data.root", "--data.dataset"):
        return f"quickstart/{TASKS[task].quickstart}.yaml", ""
    import torch

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    gpu = gpu and take(list(args), "--trainer.accelerator") != "cpu"
    why = "for a GPU" if gpu else "for a CPU"
    if gpu and not has(args, "--model.model", "--model.checkpoint"):
        if not published.at_hand("crossformer_small"):
            gpu, why = False, "whose weights come with the library"
    name = f"default/{task}.yaml" if gpu else f"default/{task}_cpu.yaml"
    return name, f"options start from {name}, {why}; --config takes another, --help shows all"


class GoOn(Exception):
    """There is a run that these options go on with, in the folder that is the message."""


def parse(
    args: Sequence[str],
    verb: str,
    fixed: dict[str, Any] | None = None,
    resume: str | None = None,
    upgraded: dict[str, Any] | None = None,
    silent: bool = False,
    auto: Literal["", "asked", "restarted"] = "",
) -> Any:
    """Lightning's command line on our task, data and trainer; returns them, built.

    Args:
        args: of the command, without what this parser does not know.
        verb: `train` or `validate`.
        fixed: options that the caller knows better, and that no configuration should keep.
        resume: folder of the run that goes on.
        upgraded: keywords of the model that its checkpoint, of an earlier version, goes without.
        silent: do not say which recipe holds.
        auto: whether to go on with the run of the same configuration that the folder holds, or with that of
            this job of a scheduler.

    Raises:
        GoOn: see `auto`.
        UserError: an option or a configuration that is wrong, in words.
    """
    quiet()
    args = [part for a in args for part in (a.split("=", 1) if a.startswith("--config=") else (a,))]
    args = ["--config" if a == "-c" else a for a in args]
    args = [find_config(a) if i and args[i - 1] == "--config" else a for i, a in enumerate(args)]
    configs = [a for i, a in enumerate(args) if i and args[i - 1] == "--config"]
    task = task_of(args, configs)
    args = [in_utf8(a) if i and args[i - 1] == "--config" else a for i, a in enumerate(args)]
    defaults = configs if has(args, "--help", "-h") else []
    if not configs:
        name, line = recipe(task, args)
        defaults = [find_config(name)]
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if line and first and not silent and not has(args, "--help", "-h", "--print_config"):
            print(line, flush=True)
    built = _cli(task, verb, args, fixed or {}, resume, upgraded or {}, auto)
    try:
        return built(
            *(_class(task, package) for package in ("tasks", "data")),
            args=args,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"crossformer {verb}",
                "usage": USAGE[verb],
                "description": DESCRIPTION[verb],
                "exit_on_error": False,
                "default_config_files": [glob.escape(path) for path in defaults],
            },
        )
    except ArgumentError as error:
        raise ArgumentError(
            None, explain(str(error), built.parsers[-1], args, configs or defaults)
        ) from error


def known_of(checkpoint: str) -> dict[str, Any]:
    """The class names that a checkpoint of a run holds, as an option of the data."""
    classes = read_checkpoint(checkpoint).get("classes")
    return {"data.classes": list(classes)} if classes else {}


def from_run(folder: str, checkpoint: str | None) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The options that build what a checkpoint of a run folder holds; what its files know better; what
    version 0.1 did not write.

    A run that is resumed before its first checkpoint begins anew.
    """
    resumed = checkpoint is None
    path = Path(checkpoint or f"{folder}/last.ckpt")
    for needed in (Path(folder) / "config.yaml", *(() if resumed else (path,))):
        if not needed.is_file():
            raise UserError(f"{folder}: not a run folder, it has no {needed.name}")
    config = f"{folder}/config.yaml"
    options = ["--config", config if resumed else without_augmentation(config)]
    fixed: dict[str, Any] = {"run.folder": folder} if resumed else {}
    span: dict[str, str] = {}
    if path.is_file():
        content = read_checkpoint(path)
        span = span_of_a_run(content, str(path))
        options += [part for name, value in span.items() for part in (f"--model.model_args.{name}", value)]
        fixed |= {"model.pretrained": False, "model.checkpoint": None}
        if content.get("classes"):
            fixed["data.classes"] = list(content["classes"])
    if (listed := Path(folder) / VAL_LIST).is_file():
        fixed["data.val_list"] = str(listed)
    return options, fixed, span


def without_augmentation(config: str) -> str:
    """A copy of a run's configuration that validates where the run's augmentation cannot be imported."""
    content = content_of(config)
    if not (isinstance(data := content.get("data"), dict) and data.get("augmentation")):
        return config
    data["augmentation"] = None
    folder = tempfile.mkdtemp(prefix="crossformer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / "config.yaml"
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(copy)


USAGE = {
    "train": "crossformer train [--config FILE] [--data.root FOLDER] [--OPTION VALUE …]\n"
    "       crossformer train --resume RUN [--OPTION VALUE …]\n"
    "       crossformer train --resume auto [--run.folder RUN] [--OPTION VALUE …]",
    "validate": "crossformer validate RUN [--checkpoint FILE] [--OPTION VALUE …]\n"
    "       crossformer validate --config FILE --checkpoint FILE --data.root FOLDER",
}
DESCRIPTION = {
    "train": "Train a model. RUN is the folder of a run, as runs/classification-crossformer_nano; --resume "
    "goes on with it, with other options where they are given; --resume auto starts or goes on. --debug "
    "shows the traceback of an error.",
    "validate": "Evaluate a checkpoint, and draw what it gets right and wrong. RUN is the folder of a run; "
    "its best.ckpt is taken unless --checkpoint names another. --debug shows the traceback of an error.",
}


def _class(task: str, package: str) -> Any:
    parts = TASKS[task]
    module = import_module(f"crossformer_vision.{package}.{parts.module}")
    return getattr(module, parts.task if package == "tasks" else parts.data)


def _listed(value: Any) -> list[Any]:
    return (
        []
        if value is None or isinstance(value, bool)
        else list(value)
        if isinstance(value, list)
        else [value]
    )


def _cli(
    task: str,
    verb: str,
    args: Sequence[str],
    fixed: dict[str, Any],
    resume: str | None,
    upgraded: dict[str, Any],
    auto: str,
) -> Any:
    class Cli(LightningCLI):
        parsers: list[Any] = []

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            self.parsers.append(super().init_parser(**kwargs))
            return self.parsers[-1]

        def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--task", default=task, help=f"one of {', '.join(TASKS)}")
            parser.add_lightning_class_args(_class(task, "data"), "data")
            parser.add_lightning_class_args(_class(task, "tasks"), "model")
            parser.add_class_arguments(Run, "run")
            parser.add_class_arguments(
                L.Trainer,
                "trainer",
                skip={"precision"},
                fail_untyped=False,
                instantiate=False,
                sub_configs=True,
            )
            parser.add_argument(
                "--trainer.precision",
                type=Precision,
                default="auto",
                help="auto: bf16-mixed where the device computes bfloat16 natively, 16-mixed on GPUs that "
                "only have float16, else 32-true; or one of Lightning's",
            )
            parser.set_defaults(OUR_TRAINER)
            for action in parser._actions:
                if action.dest.removeprefix("trainer.") in NOT_OURS:
                    action.help = SUPPRESS

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("seed_everything", "data.seed")
            parser.link_arguments("seed_everything", "model.seed")
            for option in TASKS[task].links:
                parser.link_arguments(f"model.{option}", f"data.{option}")
            if task == "classification":
                parser.link_arguments("data.image_size", "model.image_size")
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

        def before_instantiate_classes(self) -> None:
            defaults = signature(L.Trainer).parameters
            for name, instead in NOT_OURS.items():
                ours = OUR_TRAINER.get(f"trainer.{name}", defaults[name].default)
                if self.config.trainer[name] not in (ours, defaults[name].default):
                    raise UserError(f"--trainer.{name} is not an option of this command: {instead}")
                self.config.trainer[name] = ours  # runs of version 0.1 have Lightning's
            strategy = str(self.config.trainer.strategy)
            if any(start in strategy for start in ("spawn", "fork", "notebook")):
                raise UserError(
                    f"--trainer.strategy {strategy}: what such processes hold is lost at their end; "
                    "take ddp, which starts processes of its own"
                )
            check_trainer(self.config.trainer)
            given = self.config.trainer.precision
            from_other_device = verb == "validate" and not has(args, "--trainer.precision")
            self.config.trainer.precision = resolve_precision(
                given, self.config.trainer.accelerator, prefer_fast=from_other_device
            )
            self.precision_is_auto = given == "auto"
            # What follows from where and how the command is called is not kept.
            kept = self.config.clone()
            kept.run.folder = None
            self.text = self.parser.dump(kept, skip_link_targets=True, skip_none=False)
            if resume:
                self._say_what_changed(Path(resume))
            elif auto:
                self._go_on_if_there_is_a_run()
            for key, value in fixed.items():
                if key in self.config:  # `val_share` is of classes alone
                    self.config[key] = value

        def _go_on_if_there_is_a_run(self) -> None:
            """`--resume auto`, or a command that a scheduler has started again."""
            usual = Path("runs") / f"{task}-{self.config.model.model}"
            folder = Path(self.config.run.folder or usual)
            if auto == "restarted":
                there = [folder] if self.config.run.folder else sorted(folder.parent.glob(f"{folder.name}*"))
                own = [path for path in there if (path / "config.yaml").is_file() and of_this_job(path)]
                if own:
                    raise GoOn(str(own[-1]))
                return
            self.config.run.folder = str(folder)
            if not (folder / "config.yaml").is_file():
                return
            before, now = (
                _flat(content)
                for content in (content_of(str(folder / "config.yaml")), yaml.safe_load(self.text))
            )
            for key in before.keys() & now.keys():
                if key == "run.folder" or (key == "trainer.precision" and self.precision_is_auto):
                    continue
                if before[key] != now[key]:
                    raise UserError(
                        f"{folder}: holds a run of another configuration: {key} is {before[key]} there, "
                        f"{now[key]} here; --resume {folder} goes on with it, --run.folder names another"
                    )
            raise GoOn(str(folder))

        def _say_what_changed(self, folder: Path) -> None:
            before = _flat(content_of(str(folder / "config.yaml")))
            if upgraded:
                before["model.model_args"] = {**(before.get("model.model_args") or {}), **upgraded}
            now = _flat(yaml.safe_load(self.text))
            changed = {k: (before[k], v) for k, v in now.items() if k in before and before[k] != v}
            changed.pop("run.folder", None)
            for key, (old, new) in changed.items():
                if key in FIXED:
                    best = "best" if (folder / "best.ckpt").exists() else "last"
                    raise UserError(
                        f"--resume goes on with the run's own {key}, {old}, not with {new}; a new run can "
                        f"start from its weights: {command()} train --model.checkpoint {folder}/{best}.ckpt"
                    )
            if changed:
                print("changed: " + ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items()))

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            self.run = self.config_init.run
            given = self.config_init.trainer
            theirs = _listed(given.callbacks)
            if any(isinstance(c, StochasticWeightAveraging) for c in theirs):
                raise UserError(
                    "StochasticWeightAveraging: its weights would not reach best.ckpt. Use --run.ema, or "
                    "Lightning's WeightAveraging"
                )
            callbacks = [*theirs]
            if verb == "train":
                callbacks += self.run.callbacks(
                    self.model, self.text, resume is not None, given.logger is not False
                )
            bar = sys.stdout.isatty() if given.enable_progress_bar is None else given.enable_progress_bar
            if bar and not any(isinstance(c, ProgressBar) for c in theirs):
                callbacks.append(Progress())
            plugins = _listed(given.plugins)
            if not any(isinstance(p, CheckpointIO) for p in plugins):
                plugins.append(AtomicCheckpoints())
            if given.profiler:  # it speaks through what `quiet` silences
                logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.INFO)
            if any(isinstance(p, PrecisionPlugin) for p in plugins):  # Lightning takes one or the other
                kwargs["precision"] = None
            summary = given.enable_model_summary or any(isinstance(c, ModelSummary) for c in theirs)
            return super().instantiate_trainer(
                callbacks=callbacks,
                plugins=plugins,
                logger=_listed(given.logger) or False,
                enable_progress_bar=bar or any(isinstance(c, ProgressBar) for c in theirs),
                enable_model_summary=summary,
                **kwargs,
            )

    return Cli


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"lr": 1}}` -> `{"model.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) and prefix == "" else {name: value})
    return flat


def check_trainer(options: Any) -> None:
    """Check options of Lightning's Trainer that it would answer with a traceback or an endless start.

    Raises:
        UserError: If a value cannot be meant, or a device is missing.
    """
    device = training_device(options.accelerator)
    if options.accelerator in ("gpu", "cuda", "mps") and not is_available(options.accelerator):
        raise UserError(
            f"--trainer.accelerator {options.accelerator}: torch finds none here. Use cpu, or install "
            "a torch build for your GPU"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = int(options.devices) if str(options.devices).isdecimal() else 1
    if device is not None and device.type == "cpu" and wanted > cores:
        raise UserError(
            f"--trainer.devices {wanted}: there is no GPU to use, and {wanted} processes need {wanted} "
            f"cores of the CPU, which has {cores}. Use --trainer.devices {cores} or fewer"
        )
    for name, least in (("max_epochs", 1), ("max_steps", 1), ("accumulate_grad_batches", 1)):
        value = getattr(options, name)
        if value is not None and value != -1 and value < least:
            raise UserError(f"--trainer.{name} {value}: trains nothing. Use {least} or more")
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(options, name)
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"--trainer.{name} {value}: must be above 0")


def is_available(accelerator: str) -> bool:
    """Whether torch can use a GPU of this kind here."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {"gpu": cuda or mps, "cuda": cuda, "mps": mps}[accelerator]
