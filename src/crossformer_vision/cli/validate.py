"""``crossformer validate``: evaluate a checkpoint and plot its results."""

import textwrap
from pathlib import Path

from crossformer_vision.training.arguments import normalize, option_value, without_option
from crossformer_vision.training.build import build
from crossformer_vision.training.options import check_validation_weights, parse_options
from crossformer_vision.training.resume import data_options, validation_options
from crossformer_vision.training.run import evaluate, silence_lightning


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    silence_lightning()
    run_dir, checkpoint, rest = split_run(arguments)
    if run_dir is not None:
        checkpoint = checkpoint or f"{run_dir}/best.ckpt"
        options = validation_options(run_dir, checkpoint, rest)
    else:
        options = parse_options("validate", rest, data_options(Path(checkpoint)) if checkpoint else None)
        check_validation_weights(options.config, checkpoint)
    objects = build(options)
    default_dir = f"{run_dir}/validate" if run_dir else f"runs/{options.config.model.backbone}-validate"
    results, output_dir = evaluate(
        objects.trainer,
        objects.task,
        objects.data,
        Path(checkpoint) if checkpoint else None,
        Path(options.config.run.dir or default_dir),
    )
    if objects.trainer.is_global_zero:
        metrics = [f"{name} {value:.4f}" for name, value in results.items() if name.startswith("val_")]
        print(fill_columns(metrics))
        print(f"{results['images']} images; plots and results.json in {output_dir}")


def split_run(arguments: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Separate the run and the checkpoint from other arguments.

    Args:
        arguments: Command-line arguments after the name of the command.

    Returns:
        Run directory, checkpoint file, other arguments. A checkpoint in place of the run directory stands for
        both.
    """
    if arguments and not arguments[0].startswith("-"):
        run_dir, rest = arguments[0], normalize(arguments[1:])
    else:
        run_dir, rest = None, normalize(arguments)
    checkpoint = option_value(rest, "--checkpoint")
    rest = without_option(rest, "--checkpoint")
    if run_dir is not None and Path(run_dir).is_file():
        return str(Path(run_dir).parent), checkpoint or run_dir, rest
    return run_dir, checkpoint, rest


def fill_columns(items: list[str], width: int = 79) -> str:
    """Lines of at most ``width`` characters that break between items only."""
    filler = "\u00a0"  # a space that textwrap does not break at
    text = "  ".join(item.replace(" ", filler) for item in items)
    return "\n".join(textwrap.wrap(text, width)).replace(filler, " ")
