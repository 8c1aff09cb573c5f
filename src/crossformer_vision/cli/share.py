"""``crossformer share``: save a trained classifier for timm and transformers, or upload it."""

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.tools.share import share as share_model


def share(source: str, /, *, to: str) -> None:
    """Save a trained classifier in the format of timm and transformers, with a model card.

    Args:
        source: Run directory, checkpoint of a run, or name of published weights.
        to: New folder, or hf:OWNER/NAME for a repository on Hugging Face.
    """
    print(f'timm.create_model("{share_model(source, to)}", pretrained=True)')


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(share, "share", arguments)
