"""``crossformer download``: download published weights."""

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.weights import published


def download(name: str, /, *, url: str = published.DRIVE) -> None:
    """Download published weights into torch's cache.

    Args:
        name: Name such as crossformer_small or upernet_crossformer_small.
        url: Mirror of Google Drive's download address, requested with ?id=….
    """
    path = published.fetch_published(name, url)
    print(f"{path}\nbuild the model and load the weights:\n{published.how_to_build(name, path)}")


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(download, "download", arguments)
