"""``crossformer benchmark-data``: check whether a training run is input-bound."""

from pathlib import Path

from crossformer_vision.files import create_output_dir
from crossformer_vision.tools.benchmark_data import run
from crossformer_vision.training.build import build
from crossformer_vision.training.options import parse_options


def main(arguments: list[str]) -> None:
    """Run the command. Its options are those of ``train``, and ``--output``.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    options = parse_options("benchmark-data", arguments)
    output_dir = Path(options.config.output)
    create_output_dir(output_dir)
    run(build(options), output_dir)
