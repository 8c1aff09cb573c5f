"""``crossformer inspect``: show what a CrossFormer computes for one image."""

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.data.images import load_image
from crossformer_vision.errors import UserError, check_output
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.tools.inspection_page import draw_page


def inspect(
    source: str,
    image: str,
    /,
    *,
    output: str = "inspect.png",
    point: str = "0.5,0.5",
    stage: int = 3,
    block: int | None = None,
    head: int | None = None,
    size: int | None = None,
    compare_with: str | None = None,
    device: str | None = None,
) -> None:
    """Draw what a CrossFormer computes for an image.

    The page shows the patches of an embedding, the groups of SDA and of both kinds of LDA, the attention of
    one position, attention rollout, class activation, position biases, and activation amplitudes per block.

    Args:
        source: Run directory, checkpoint of a run, or name of published weights.
        image: Image file.
        output: File of the page.
        point: Position to examine, as normalized coordinates x,y.
        stage: Stage to examine, from 1.
        block: Block of the stage, from 1, shown with the other block of its SDA and LDA pair; the last one
            by default.
        head: Attention head, from 1; the mean of all by default.
        size: Shorter side of the image in pixels; that of the classifier, or 448, by default.
        compare_with: Another network whose amplitudes are drawn as well.
        device: cpu, cuda, …; the best available by default.
    """
    x, y = parse_point(point)
    check_output("--output", output, image, source, compare_with)
    other = (compare_with, load_predictor(compare_with, device)) if compare_with else None
    predictor = load_predictor(source, device)
    predictor.require_rgb("inspect")
    if other is not None:
        other[1].require_rgb("inspect")
    line = draw_page(
        predictor,
        load_image(image, image),
        output,
        point=(x, y),
        stage=stage - 1,
        block=None if block is None else block - 1,
        head=None if head is None else head - 1,
        size=size,
        compare_with=other,
    )
    print(line)


def parse_point(text: str) -> tuple[float, float]:
    """Read ``x,y``.

    Raises:
        UserError: If the text is not two numbers.
    """
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--point {text}: not two normalized coordinates, such as 0.5,0.25") from None
    return x, y


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(inspect, "inspect", arguments)
