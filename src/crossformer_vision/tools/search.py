"""Search over options of a grid."""

import math
from pathlib import Path

import lightning as L
import optuna
from lightning.pytorch.callbacks import Callback
from optuna.distributions import CategoricalChoiceType, CategoricalDistribution
from optuna.trial import TrialState

from crossformer_vision.errors import UserError, check_range, error_line
from crossformer_vision.files import write_json
from crossformer_vision.tools.compare import train_cell
from crossformer_vision.tools.grid import Grid, read_grid
from crossformer_vision.tools.study import CellFailed, open_study
from crossformer_vision.training.interruption import Stopped
from crossformer_vision.types import JsonObject


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
    check_range("--search", count, 1)
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
            print(f"failed: {error_line(error)}", flush=True)
            raise CellFailed(str(error)) from error
        return float(results[results["metric"]])

    finished = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    while len(study.get_trials(deepcopy=False, states=finished)) < count:
        study.optimize(run_trial, n_trials=1, catch=(CellFailed,))
    scored = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not scored:
        raise UserError(f"{output_dir}: none of {count} trials finished")
    best = max(scored, key=lambda trial: -math.inf if trial.value is None else trial.value)
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
        UserError: If an earlier trial had other options, or an option had other choices.
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
        UserError: If Optuna does not accept the range.
    """
    if "choices" in values:
        return trial.suggest_categorical(name, values["choices"])
    low, high, log = values["low"], values["high"], bool(values.get("log", False))
    try:
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(name, low, high, log=log)
        return trial.suggest_float(name, float(low), float(high), log=log)
    except ValueError as error:
        raise UserError(f"search: {name}: {error}") from None
