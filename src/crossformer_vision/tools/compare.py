"""Train the cells of a grid on any number of workers, or search over options.

A cell, one row with one seed, is a trial of an Optuna study in a database. Workers take cells one at a time.
If the heartbeat of a worker stops, another one continues its cell from the last checkpoint. A grid that is
started again runs only the missing cells.
"""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import optuna
import sqlalchemy
import torch
from lightning.pytorch.callbacks import Callback
from optuna.distributions import CategoricalChoiceType, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from crossformer_vision.errors import UserError, check_range, error_line
from crossformer_vision.files import write_json
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.tools.compare_table import Results, write_report
from crossformer_vision.tools.grid import Grid, folder_name, read_grid
from crossformer_vision.tools.info import count_macs
from crossformer_vision.training.build import build
from crossformer_vision.training.interruption import Stopped
from crossformer_vision.training.options import parse_options
from crossformer_vision.training.resume import find_run, resume_options
from crossformer_vision.training.run import train
from crossformer_vision.types import JsonObject


class CellFailed(Exception):
    """A cell ended with an error, which is recorded."""


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


# ------------------------------------------------------------------------------------------------------------
# Study
# ------------------------------------------------------------------------------------------------------------


def sqlite_url(path: Path) -> str:
    """Address of an SQLite file for Optuna, whatever characters its path has."""
    address = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    return address.replace("{", "{{").replace("}", "}}")  # Optuna formats it


def open_study(name: str, output_dir: Path, url: str | None, heartbeat: int) -> optuna.Study:
    """Open or create the study of a grid.

    Args:
        name: Name of the study.
        output_dir: Directory of the grid.
        url: Database. ``None`` for SQLite in the directory.
        heartbeat: Seconds between heartbeats of a worker.

    Raises:
        UserError: If the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats
    output_dir.mkdir(parents=True, exist_ok=True)
    url = url or sqlite_url(output_dir / "study.db")
    is_sqlite = url.startswith("sqlite")
    engine_options = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    message = ""
    for attempt in range(5):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs=engine_options,
                heartbeat_interval=heartbeat,
                grace_period=3 * heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                storage=storage, study_name=name, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # errors of Optuna, SQLAlchemy and database drivers
            message = re.sub(r"//[^@/]*@", "//", error_line(error))  # without a password
        time.sleep(attempt / 2)  # another worker may be creating the tables
    raise UserError(f"the study's database cannot be opened ({message})")


def find_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials of cells in given states, without duplicates that were skipped."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return [t for t in trials if "cell" in t.user_attrs and "duplicate" not in t.user_attrs]


def enqueue_cells(study: optuna.Study, cells: dict[str, str]) -> None:
    """Enqueue cells that are neither done nor enqueued.

    Two workers may enqueue the same cell; ``is_duplicate`` detects it later.

    Args:
        study: Study of the grid.
        cells: Digest of each cell.

    Raises:
        UserError: If a cell has run with other options, because its score would be mistaken for this one.
    """
    existing = find_trials(study, TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    digests = {trial.user_attrs["cell"]: trial.user_attrs["digest"] for trial in existing}
    for cell, digest in cells.items():
        if digests.setdefault(cell, digest) != digest:
            raise UserError(
                f"'{cell}' was run with other options or another recipe. Choose another --output for the "
                "grid as it is now, or rename the row"
            )
    enqueued = {trial.user_attrs["cell"] for trial in existing}
    for cell, digest in cells.items():
        if cell not in enqueued:
            study.enqueue_trial({}, user_attrs={"cell": cell, "digest": digest})


def is_duplicate(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether the cell of a trial is done, or an earlier trial has it too."""
    cell, unfinished = trial.user_attrs["cell"], (TrialState.RUNNING, TrialState.WAITING)
    others = [t for t in find_trials(study) if t.user_attrs["cell"] == cell and t.number != trial.number]
    is_done = any(other.state == TrialState.COMPLETE for other in others)
    return is_done or any(t.state in unfinished and t.number < trial.number for t in others)


def run_trials(
    study: optuna.Study, run_cell: Callable[[optuna.Trial], float], poll_interval: float = 2.0
) -> None:
    """Run waiting trials one by one, then wait for trials of other workers and take over from dead workers.

    Args:
        study: Study of the grid.
        run_cell: Function that trains a cell and returns its score.
        poll_interval: Seconds between checks of other workers' trials.
    """
    while True:
        if find_trials(study, TrialState.WAITING):
            study.optimize(run_cell, n_trials=1, catch=(CellFailed,))
        elif find_trials(study, TrialState.RUNNING):
            time.sleep(poll_interval)
            optuna.storages.fail_stale_trials(study)
        else:
            return


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


# ------------------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------------------


class ReportToTrial(Callback):
    """Reports the score of each validation to a trial, and ends a run that Optuna prunes.

    Args:
        trial: Trial of the run.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the monitored metric.

        Raises:
            TrialPruned: If the run is not promising.
        """
        score = trainer.callback_metrics.get(str(getattr(pl_module, "monitor", "")))
        if score is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self.trial.report(float(score), trainer.current_epoch)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def run_search(
    path: str, output_dir: Path, count: int, url: str | None = None, heartbeat: int = 20
) -> JsonObject:
    """Search over the ranges under ``search`` of a grid, with its first row and seed.

    Args:
        path: YAML file of the grid.
        output_dir: Directory of the runs and ``search.json``.
        count: Number of trials.
        url: Database of the study. ``None`` for SQLite in the output directory.
        heartbeat: Seconds between heartbeats of a worker.

    Returns:
        Best options, score and trial.

    Raises:
        UserError: If the grid has no search, its earlier trials were of another grid, or all trials failed.
    """
    check_range("search", count, 1)
    grid = read_grid(path)
    if not grid.search:
        raise UserError(f"{path}: has no search: {{option: {{low: 1.0e-4, high: 1.0e-2, log: true}}}}")
    grid.check_data()
    study = open_study(f"{Path(path).stem}-search", output_dir, url, heartbeat)
    name, row = next(iter(grid.rows.items()))
    digest = grid.digest(name, grid.seeds[0])
    check_earlier_trials(study, grid, digest, output_dir)

    def run_trial(trial: optuna.Trial) -> float:
        trial.set_user_attr("digest", digest)
        chosen = {name: suggest_value(trial, name, values) for name, values in grid.search.items()}
        print(f"\ntrial {trial.number}: " + ", ".join(f"{k} {v}" for k, v in chosen.items()), flush=True)
        run_dir = output_dir / "search" / f"trial-{trial.number}"
        try:
            arguments = grid.arguments({**row, **chosen}, grid.seeds[0])
            results = train_cell(arguments, run_dir, [ReportToTrial(trial)])
        except (Stopped, KeyboardInterrupt, optuna.TrialPruned):
            raise
        except Exception as error:
            print(f"failed: {error}", flush=True)
            raise CellFailed(str(error)) from error
        return float(results[results["metric"]])

    finished = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    while len(study.get_trials(deepcopy=False, states=finished)) < count:
        study.optimize(run_trial, n_trials=1, catch=(CellFailed,))
    scored = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not scored:
        raise UserError(f"{output_dir}: none of {count} trials finished")
    best = max(scored, key=lambda trial: trial.value or -math.inf)
    result = {"best": best.params, "score": best.value, "trial": best.number, "trials": count}
    write_json(output_dir / "search.json", result)
    print(
        f"\nbest of {count}: {best.value:.4f}, trial {best.number}, {best.params}; {output_dir}/search.json"
    )
    return result


def check_earlier_trials(study: optuna.Study, grid: Grid, digest: str, output_dir: Path) -> None:
    """Check that earlier trials of a search are of the same grid.

    Args:
        study: Study of the search.
        grid: The grid as it is now.
        digest: Digest of its first row and options.
        output_dir: Directory of the search, for messages.

    Raises:
        UserError: If an earlier trial had other options, or an option other choices.
    """
    advice = "Choose another --output, or change the grid back"
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("digest", digest) != digest:
            raise UserError(f"{output_dir}: trial {trial.number} ran with other options or recipes. {advice}")
        for name, earlier in trial.distributions.items():
            now = grid.search.get(name, {}).get("choices")
            before = list(earlier.choices) if isinstance(earlier, CategoricalDistribution) else None
            if before is not None and now != before:
                raise UserError(f"{output_dir}: search: {name}: choices were {before}, now {now}. {advice}")


def suggest_value(trial: optuna.Trial, name: str, values: JsonObject) -> CategoricalChoiceType:
    """Let a trial choose the value of an option.

    Args:
        trial: Trial of the search.
        name: Name of the option.
        values: ``{low, high, log}`` or ``{choices}``.

    Raises:
        UserError: If the range is invalid.
    """
    if "choices" in values:
        return trial.suggest_categorical(name, values["choices"])
    try:
        low, high, log = values["low"], values["high"], bool(values.get("log", False))
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(name, low, high, log=log)
        return trial.suggest_float(name, float(low), float(high), log=log)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"search: {name}: must be {{low, high, log}} or {{choices}}, not {values} ({error})"
        ) from None
