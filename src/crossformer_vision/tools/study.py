"""The Optuna study of a grid: a database in which any number of workers take cells."""

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from crossformer_vision.errors import UserError, error_line


class CellFailed(Exception):
    """A cell ended with an error, which is recorded."""


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
