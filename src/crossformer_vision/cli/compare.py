"""``crossformer compare``: train a grid of runs and write a table of their results."""

from pathlib import Path

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.errors import missing_extra


def compare(
    grid: str,
    /,
    *,
    output: str | None = None,
    storage: str | None = None,
    search: int | None = None,
    heartbeat: int = 20,
) -> None:
    """Train the cells of a grid, models and options x seeds over one recipe, and write their table.

    A second call runs the missing cells; several calls at once, on one machine or many, share the cells. A
    grid:

      recipe: classification/crossformer_nano_cifar10.yaml
      options: {data.root: cifar10, trainer.max_epochs: 5}
      rows:
        CrossFormer: {}
        PVTv2: {model.backbone: pvt_v2_b0, model.model_args: {depths: [2, 2, 2, 2]}}
      vary: {model.lr: [1.0e-3, 3.0e-3]}
      seeds: 3

    Args:
        grid: YAML file of the grid.
        output: Directory of its runs and its table; runs/NAME for a grid NAME.yaml by default.
        storage: URL of a database for several machines; SQLite in the output directory by default.
        search: Number of trials of a search over the ranges under `search`, with the first row.
        heartbeat: Seconds between signs of life of a worker. After three missing ones other workers take its
            cell.
    """
    try:
        from crossformer_vision.tools.compare import run_grid
        from crossformer_vision.tools.search import run_search
    except ModuleNotFoundError as error:
        raise missing_extra(error, "compare") from None
    output_dir = Path(output or f"runs/{Path(grid).stem}")
    if search is not None:
        run_search(grid, output_dir, search, storage, heartbeat)
    else:
        run_grid(grid, output_dir, storage, heartbeat)


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(compare, "compare", arguments)
