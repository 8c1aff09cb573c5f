"""Train the cells of a grid on any number of workers.

A cell, one row with one seed, is a trial of an Optuna study in a database. Workers take cells one at a time.
If the heartbeat of a worker stops, another one continues its cell from the last checkpoint. A grid that is
started again runs only the missing cells.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import optuna
import torch
from optuna.trial import TrialState

from crossformer_vision.errors import UserError, error_line
from crossformer_vision.files import write_json
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.tools.compare_table import Results, write_report
from crossformer_vision.tools.grid import folder_name, read_grid
from crossformer_vision.tools.info import count_macs
from crossformer_vision.tools.study import (
    CellFailed,
    enqueue_cells,
    find_trials,
    is_duplicate,
    open_study,
    run_trials,
)
from crossformer_vision.training.build import build
from crossformer_vision.training.interruption import Stopped
from crossformer_vision.training.options import parse_options
from crossformer_vision.training.resume import find_run, resume_options
from crossformer_vision.training.run import train
from crossformer_vision.types import JsonObject


def train_cell(
    arguments: list[str], run_dir: Path, callbacks: Sequence[L.Callback] = (), digest: str = ""
) -> JsonObject:
    """Train a cell, or resume it.

    Args:
        arguments: Command-line arguments of the run.
        run_dir: Run directory.
        callbacks: Further callbacks of the Trainer.
        digest: Digest of the cell, which is saved with the results.

    Returns:
        Content of ``results.json``, with ``macs`` and the digest as ``cell``.

    Raises:
        UserError: If the directory holds the run of another cell, or the run was not validated.
    """
    if not (run_dir / "results.json").is_file():
        options = parse_options("train", [*arguments, "--run.dir", str(run_dir)])
        resume = find_run(options)
        if resume is not None:
            options, _ = resume_options(str(resume), [])
        objects = build(options, is_resumed=resume is not None)
        objects.trainer.callbacks += callbacks  # type: ignore[attr-defined]
        train(objects.trainer, objects.task, objects.data, str(resume) if resume else None)
    results: JsonObject = json.loads((run_dir / "results.json").read_bytes())
    if results["metric"] not in results:
        raise UserError(f"{run_dir}: not validated, and so without a score")
    if results.get("cell", digest) != digest:
        raise UserError(f"{run_dir}: contains the run of another grid. Choose another --output for this one")
    if "macs" not in results or "cell" not in results:
        results["macs"] = network_macs(load_predictor(results["checkpoint"]).net, results["image_size"])
        results["cell"] = digest
        write_json(run_dir / "results.json", results)
    return results


def network_macs(net: torch.nn.Module, size: Sequence[int]) -> int | None:
    """Multiply-accumulates of an image, or ``None`` if the network cannot run on the meta device."""
    try:
        return round(count_macs(net.to("meta").requires_grad_(False), *size))
    except (RuntimeError, NotImplementedError):
        return None


def run_grid(path: str, output_dir: Path, url: str | None = None, heartbeat: int = 20) -> JsonObject:
    """Run the missing cells of a grid, together with other workers, and write the table.

    Args:
        path: YAML file of the grid.
        output_dir: Directory of the runs and the table.
        url: Database of the study, for several machines. ``None`` for SQLite in the output directory.
        heartbeat: Seconds between heartbeats. A worker that misses three is considered dead.

    Returns:
        Content of ``compare.json``.

    Raises:
        UserError: If the grid is invalid or cells have failed.
    """
    grid = read_grid(path)
    grid.check_data()
    study = open_study(Path(path).stem, output_dir, url, heartbeat)
    cells = {f"{row}, seed {seed}": (row, seed) for row in grid.rows for seed in grid.seeds}
    printed_errors: set[str] = set()

    def run_cell(trial: optuna.Trial) -> float:
        cell = trial.user_attrs.get("cell")
        if cell not in cells or is_duplicate(study, trial):
            trial.set_user_attr("duplicate", True)
            raise optuna.TrialPruned
        row, seed = cells[cell]
        done = len({t.user_attrs["cell"] for t in find_trials(study, TrialState.COMPLETE)} & cells.keys())
        print(f"\n{cell}: {done} of {len(cells)} cells are done", flush=True)
        run_dir = output_dir / folder_name(row) / f"seed-{seed}"
        try:
            arguments = grid.arguments(grid.rows[row], seed)
            results = train_cell(arguments, run_dir, digest=trial.user_attrs["digest"])
        except Stopped as stop:
            raise Stopped(
                "stopped; run the same command again to continue the grid", stop.exit_code - 128
            ) from None
        except KeyboardInterrupt:
            raise
        except Exception as error:
            line = error_line(error)
            trial.set_user_attr("error", line)
            print(f"failed: {cell}: {'same error' if line in printed_errors else line}", flush=True)
            printed_errors.add(line)
            raise CellFailed(line) from error
        trial.set_user_attr("results", results)
        return float(results[results["metric"]])

    enqueue_cells(study, {cell: grid.digest(*place) for cell, place in cells.items()})
    run_trials(study, run_cell)
    results, errors = collect_results(study, cells)
    return write_report(grid, results, errors, output_dir)


def collect_results(study: optuna.Study, cells: dict[str, tuple[str, int]]) -> tuple[Results, dict[str, str]]:
    """Results and errors of cells.

    Args:
        study: Study of the grid.
        cells: Row and seed of each cell.

    Returns:
        ``results.json`` by row and seed, and the error of each cell without results.
    """
    results: Results = {row: {} for row, _ in cells.values()}
    errors: dict[str, str] = {}
    for trial in find_trials(study, TrialState.COMPLETE, TrialState.FAIL):
        cell = trial.user_attrs["cell"]
        if cell not in cells:
            continue
        row, seed = cells[cell]
        if trial.state == TrialState.COMPLETE:
            results[row][seed] = trial.user_attrs["results"]
        elif "error" in trial.user_attrs:
            errors[cell] = trial.user_attrs["error"]
    return results, {cell: e for cell, e in errors.items() if cells[cell][1] not in results[cells[cell][0]]}
