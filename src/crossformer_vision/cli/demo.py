"""``crossformer demo``: serve a page that shows predictions and attention for uploaded images."""

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.tools.demo import serve


def demo(
    sources: list[str] = ["crossformer_nano.cifar10"],  # noqa: B006
    /,
    *,
    port: int | None = None,
    host: str = "127.0.0.1",
    device: str | None = None,
) -> None:
    """Serve a page: upload an image to see predictions, click a point to see its attention.

    Args:
        sources: Run directories, checkpoints, or names of published weights.
        port: Port; the first free one from 7860 by default.
        host: Address to bind to. The default is reachable from this machine only.
        device: cpu, cuda, …; the best available by default.
    """
    serve(sources, host, port, device)


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(demo, "demo", arguments)
