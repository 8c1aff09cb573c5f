"""``crossformer train``: train a model, or resume a run."""

import os
import shlex
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from crossformer_vision.plotting.visualize import metric_label
from crossformer_vision.training.arguments import normalize, option_value, without_option
from crossformer_vision.training.build import RunObjects, build
from crossformer_vision.training.cluster import is_restarted
from crossformer_vision.training.command import command_name
from crossformer_vision.training.options import Options, parse_options
from crossformer_vision.training.resume import default_run_dir, find_run, find_run_of_job, resume_options
from crossformer_vision.training.run import find_callback, is_finished, silence_lightning, train
from crossformer_vision.training.run_directory import RunDirectory
from crossformer_vision.types import JsonObject


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    silence_lightning()
    options, resume = parse(arguments)
    objects = build(options, is_resumed=resume is not None)
    if resume and is_finished(Path(resume), objects.trainer):
        print(
            f"{resume} is finished. To train longer, pass a larger --trainer.max_epochs, or --run.patience "
            f"after early stopping, with --resume. To see its metrics: {command_name()} validate {resume}"
        )
        return
    results = train(objects.trainer, objects.task, objects.data, resume)
    if objects.trainer.is_global_zero:
        print_summary(objects, results)


def parse(arguments: list[str]) -> tuple[Options, str | None]:
    """Parse the options of a new run, or load those of a run to resume.

    Args:
        arguments: Command-line arguments after the name of the command.

    Returns:
        The options, and the directory of a run to resume.
    """
    arguments = normalize(arguments)
    resume = option_value(arguments, "--resume")
    rest = without_option(arguments, "--resume")
    if resume is not None and resume != "auto" and "--help" not in rest:
        return resumed(resume, rest)
    options = parse_options("train", rest)
    run_dir = None
    if resume == "auto":
        run_dir = find_run(options)
    elif resume is None and is_restarted():
        run_dir = find_run_of_job(options)
    if run_dir is not None:
        return resumed(str(run_dir), [])
    if resume == "auto":
        options = replace(options, overrides={"run.dir": str(default_run_dir(options))})
    print_notes(options)
    return options, None


def resumed(run_dir: str, arguments: list[str]) -> tuple[Options, str]:
    """Options of a run to resume, after printing those that change."""
    options, changed = resume_options(run_dir, arguments)
    if changed:
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items())
        print(f"changed: {changes}")
    return options, run_dir


def print_notes(options: Options) -> None:
    """Print how options were chosen, in the first process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for note in options.notes:
            print(note, flush=True)


def print_summary(objects: RunObjects, results: JsonObject) -> None:
    """Print the score, the outputs of the run, and what to do next."""
    run_dir = find_callback(objects.trainer, RunDirectory).path
    command, metric = command_name(), objects.task.monitor
    score = f"{metric_label(metric)} {results[metric]:.2%}" if metric in results else "not validated,"
    plots = ", ".join(sorted(path.name for path in run_dir.glob("*.png")))
    print(f"\n{score} after {timedelta(seconds=round(60 * results['minutes']))}")
    print(f"  checkpoint  {results['checkpoint']}")
    print(f"  plots       {plots} in {run_dir}")
    tensorboard = f"; tensorboard --logdir {run_dir}" if (run_dir / "tensorboard").is_dir() else ""
    print(f"  metrics     results.json, metrics.csv{tensorboard}")
    print(f"next: {command} predict {shlex.quote(str(run_dir))} photo.jpg")
    if not objects.data.root:
        print(f"      {command} --help explains how to train on your images")
    for line in objects.data.notices():
        print(f"note: {line}")
