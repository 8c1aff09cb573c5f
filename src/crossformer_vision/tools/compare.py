"""Grids of runs: models and options x seeds over one recipe, and their table.

A cell, one row with one seed, is a trial of an Optuna study in a database. Any number of workers take cells
from it, one at a time; the heartbeat of one that died stops, and another goes on from its last checkpoint.
Started again, a grid does what the database lacks, and writes the same table.
"""

import csv
import hashlib
import itertools
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import sqlalchemy
import torch
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossformer_vision.cli import options
from crossformer_vision.cli.arguments import content_of, find_config
from crossformer_vision.errors import UserError, check_range
from crossformer_vision.files import write_json
from crossformer_vision.inference.predictor import load_predictor
from crossformer_vision.plotting import visualize
from crossformer_vision.plotting.fonts import written
from crossformer_vision.tools.benchmark import images_per_second, interleaved
from crossformer_vision.tools.info import count_macs
from crossformer_vision.training import run
from crossformer_vision.training.run_directory import Stopped

KEYS = ("recipe", "rows", "vary", "options", "seeds", "search")


@dataclass
class Grid:
    """What a grid's file says.

    Attributes:
        recipe: configurations that all runs start from.
        rows: name of a row -> its options, as the command has them: `{"model.model": "pvt_v2_b0"}`.
        seeds: of each row.
        options: of all runs.
        search: option -> `{low, high, log}` or `{choices}`, for `--search`.
    """

    recipe: list[str]
    rows: dict[str, dict[str, Any]]
    seeds: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    search: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check_data(self) -> None:
        """Check that the folders of images exist, once for all cells.

        Raises:
            UserError: If a ``data.root`` is missing.
        """
        contents = [content_of(recipe).get("data") for recipe in self.recipe]
        recipes = [data["root"] for data in contents if isinstance(data, dict) and data.get("root")]
        for row in self.rows.values():
            root = {**self.options, **row}.get("data.root", recipes[-1] if recipes else None)
            if root is not None and not Path(root).exists():
                raise UserError(
                    f"{root}: no such folder of images, which the grid names as data.root. Put the data set "
                    "there, or change data.root in the grid"
                )

    def arguments(self, row: dict[str, Any], seed: int) -> list[str]:
        """The command line of a run, without its folder."""
        args = [part for recipe in self.recipe for part in ("--config", recipe)]
        for name, value in {**self.options, **row, "seed_everything": seed}.items():
            args += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return args

    def digest(self, row: str, seed: int) -> str:
        """Digest of what a score follows from: options, and contents of the recipes, not their paths."""
        recipes = [Path(recipe).read_text(encoding="utf-8") for recipe in self.recipe]
        said = [*self.arguments(self.rows[row], seed)[2 * len(recipes) :], *recipes]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """The folder name of a row: without separators, never ``..``, and at most 120 characters long."""
    folder = re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "row"
    if len(folder.encode()) <= 120:
        return folder
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{folder.encode()[:100].decode(errors='ignore')}-{digest}"


def read_grid(path: str) -> Grid:
    """A grid from its YAML: a path, or a name among those that come along. See `docs/experiments.md`.

    Raises:
        UserError: a file that is missing or no grid; the message says what is wrong.
    """
    path = find_config(path)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a grid ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not set(content) <= set(KEYS) or "recipe" not in content:
        raise UserError(f"{path}: not a grid: it has a recipe, and may have {', '.join(KEYS[1:])}")
    rows = content.get("rows", {"recipe": {}})
    if isinstance(rows, list):  # of models
        rows = {str(model): {"model.model": model} for model in rows}
    vary = content.get("vary", {})
    parts = [content.get(key, {}) for key in ("options", "search")]
    if not all(isinstance(part, dict) for part in (rows, vary, *parts)) or not all(
        isinstance(row, dict) for row in rows.values()
    ):
        raise UserError(f"{path}: rows, vary, options and search are names with values: {{name: value}}")
    if not rows:
        raise UserError(f"{path}: rows is empty. Name a row, or leave rows out to run the recipe alone")
    if not all(isinstance(values, list) and values for values in vary.values()):
        raise UserError(f"{path}: vary has a list of values for each option")
    product = {}
    for (name, row), values in itertools.product(rows.items(), itertools.product(*vary.values())):
        said = [f"{option.rsplit('.', 1)[-1]} {value}" for option, value in zip(vary, values, strict=True)]
        product[", ".join([name, *said])] = {**row, **dict(zip(vary, values, strict=True))}
    folders: dict[str, str] = {}
    for name in product:
        if (other := folders.setdefault(slug(name), name)) != name:
            raise UserError(
                f"{path}: rows '{other}' and '{name}' would share the folder {slug(name)}: rename one"
            )
    seeds = content.get("seeds", 1)
    seeds = list(range(seeds)) if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{path}: seeds is a number of them, or a list of whole numbers")
    recipe = content["recipe"] if isinstance(content["recipe"], list) else [content["recipe"]]
    return Grid([find_config(str(name)) for name in recipe], product, seeds, *parts)


# ------------------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------------------


class CellFailed(Exception):
    """A run of a grid that ended with an error, which is kept."""


def train(
    args: list[str], folder: Path, callbacks: Sequence[L.Callback] = (), digest: str = ""
) -> dict[str, Any]:
    """Train into a folder, or go on where it stopped.

    Args:
        args: the command line, without the folder.
        folder: of the run.
        callbacks: further ones of the Trainer.
        digest: of the cell, which the folder keeps.

    Returns:
        What its `results.json` holds, and `macs` and `cell`, the digest.

    Raises:
        UserError: the run there is another cell's; or it was not validated.
    """
    if not (folder / "results.json").is_file():
        args, resume = [*args, "--run.folder", str(folder)], None
        try:
            built = options.parse(args, "train", auto="asked", silent=True)
        except options.GoOn:
            resume = str(folder)
            args, fixed, upgraded = options.from_run(resume, None)
            built = options.parse(args, "train", fixed, resume, upgraded, silent=True)
        built.trainer.callbacks += callbacks
        run.train(built.trainer, built.model, built.datamodule, built.run, resume)
    results: dict[str, Any] = json.loads((folder / "results.json").read_bytes())
    if results["metric"] not in results:
        raise UserError(f"{folder}: not validated, and so without a score")
    if results.get("cell", digest) != digest:
        raise UserError(f"{folder}: holds the run of another grid; --out names another folder for this one")
    if "macs" not in results or "cell" not in results:
        results["macs"] = macs(load_predictor(results["checkpoint"]).net, results["image_size"])
        results["cell"] = digest
        write_json(folder / "results.json", results)
    return results


def macs(net: torch.nn.Module, size: Sequence[int]) -> int | None:
    """Multiply-accumulates of an image; None of a network that shapes alone do not do for."""
    try:
        return round(count_macs(net.to("meta").requires_grad_(False), *size))
    except (RuntimeError, NotImplementedError):
        return None


# ------------------------------------------------------------------------------------------------------------
# Workers
# ------------------------------------------------------------------------------------------------------------


def sqlite_url(path: Path) -> str:
    """The address of a SQLite file for Optuna, whatever characters its path has."""
    address = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    return address.replace("{", "{{").replace("}", "}}")  # Optuna formats it


def open_study(name: str, folder: Path, url: str | None, heartbeat: int) -> optuna.Study:
    """The study of a grid: in SQLite beside the results, or in the database at `url`.

    Raises:
        UserError: a database that cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats
    folder.mkdir(parents=True, exist_ok=True)
    url = url or sqlite_url(folder / "study.db")
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(5):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs=waits,
                heartbeat_interval=heartbeat,
                grace_period=3 * heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                storage=storage, study_name=name, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # of many libraries
            said = re.sub(r"//[^@/]*@", "//", str(error).splitlines()[0])  # without a password
        time.sleep(attempt / 2)  # another worker may be making the tables
    raise UserError(f"the study's database cannot be opened ({said})")


def trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials of cells in these states."""
    found = study.get_trials(deepcopy=False, states=states or None)
    return [trial for trial in found if "cell" in trial.user_attrs and "twin" not in trial.user_attrs]


def enqueue(study: optuna.Study, cells: dict[str, str]) -> None:
    """Those that are neither done nor on their way. Two workers may do it at once: see `has_twin`.

    Args:
        study: of the grid.
        cells: name -> digest of what it is.

    Raises:
        UserError: a cell of this name is there, with other options: its score would be taken for this one's.
    """
    there = trials(study, TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    known = {trial.user_attrs["cell"]: trial.user_attrs["digest"] for trial in there}
    for cell, digest in cells.items():
        if known.setdefault(cell, digest) != digest:
            raise UserError(
                f"'{cell}' was run with other options, or of another recipe; --out names another folder for "
                "the grid as it is now, or call the row otherwise"
            )
    on_their_way = {trial.user_attrs["cell"] for trial in there}
    for cell, digest in cells.items():
        if cell not in on_their_way:
            study.enqueue_trial({}, user_attrs={"cell": cell, "digest": digest})


def has_twin(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether the cell of a trial is done, or an earlier trial's, since two workers have enqueued it."""
    cell, on_their_way = trial.user_attrs["cell"], (TrialState.RUNNING, TrialState.WAITING)
    others = [t for t in trials(study) if t.user_attrs["cell"] == cell and t.number != trial.number]
    done = any(other.state == TrialState.COMPLETE for other in others)
    return done or any(t.state in on_their_way and t.number < trial.number for t in others)


def work(study: optuna.Study, run_cell: Callable[[optuna.Trial], float], pause: float = 2.0) -> None:
    """Run one trial after the other, as long as there are any; wait for those of others, who may die."""
    while True:
        if trials(study, TrialState.WAITING):
            study.optimize(run_cell, n_trials=1, catch=(CellFailed,))
        elif trials(study, TrialState.RUNNING):
            time.sleep(pause)
            optuna.storages.fail_stale_trials(study)
        else:
            return


def compare(path: str, out: Path, url: str | None = None, heartbeat: int = 20) -> dict[str, Any]:
    """Run the cells of a grid that lack, with whoever else works on it, and write its table.

    Args:
        path: the grid's YAML.
        out: folder of the runs and the table.
        url: database of the study, for several machines; None for SQLite in `out`.
        heartbeat: seconds between signs of life; a worker without one for three of them is taken for dead.

    Returns:
        What `compare.json` holds.

    Raises:
        UserError: see `read_grid`; and at the end, if cells have failed.
    """
    grid = read_grid(path)
    grid.check_data()
    study = open_study(Path(path).stem, out, url, heartbeat)
    cells = {f"{row}, seed {seed}": (row, seed) for row in grid.rows for seed in grid.seeds}
    reasons: set[str] = set()  # why cells have failed so far

    def run_cell(trial: optuna.Trial) -> float:
        cell = trial.user_attrs.get("cell")
        if cell not in cells or has_twin(study, trial):  # enqueued for another grid, or twice
            trial.set_user_attr("twin", True)
            raise optuna.TrialPruned
        row, seed = cells[cell]
        done = len({t.user_attrs["cell"] for t in trials(study, TrialState.COMPLETE)} & cells.keys())
        print(f"\n{cell}: {done} of {len(cells)} cells are done", flush=True)
        try:
            args, digest = grid.arguments(grid.rows[row], seed), trial.user_attrs["digest"]
            results = train(args, out / slug(row) / f"seed-{seed}", digest=digest)
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
            trial.set_user_attr("error", said)
            print(f"failed: {cell}: {'as before' if said in reasons else said}", flush=True)
            reasons.add(said)
            raise CellFailed(said) from error
        trial.set_user_attr("results", results)
        return float(results[results["metric"]])

    enqueue(study, {cell: grid.digest(*place) for cell, place in cells.items()})
    work(study, run_cell)
    return report(study, grid, cells, out)


# ------------------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------------------


class Pruning(L.Callback):
    """Tells a study the score of each validation, and ends a run that is not worth going on."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        score = trainer.callback_metrics.get(str(getattr(pl_module, "monitor", "")))
        if score is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self.trial.report(float(score), trainer.current_epoch)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def search(path: str, out: Path, count: int, url: str | None = None, heartbeat: int = 20) -> dict[str, Any]:
    """`count` trials of the ranges that a grid's `search` names, on its first row; the best comes back."""
    check_range("search", count, 1)
    grid = read_grid(path)
    if not grid.search:
        raise UserError(f"{path}: has no search: {{option: {{low: 1.0e-4, high: 1.0e-2, log: true}}}}")
    grid.check_data()
    study = open_study(f"{Path(path).stem}-search", out, url, heartbeat)
    name, row = next(iter(grid.rows.items()))
    digest = grid.digest(name, grid.seeds[0])
    check_earlier_trials(study, grid, digest, out)

    def run_trial(trial: optuna.Trial) -> float:
        trial.set_user_attr("digest", digest)
        chosen = {name: suggested(trial, name, values) for name, values in grid.search.items()}
        print(f"\ntrial {trial.number}: " + ", ".join(f"{k} {v}" for k, v in chosen.items()), flush=True)
        folder = out / "search" / f"trial-{trial.number}"
        try:
            results = train(grid.arguments({**row, **chosen}, grid.seeds[0]), folder, [Pruning(trial)])
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
        raise UserError(f"{out}: none of {count} trials came to its end")
    best = max(scored, key=lambda trial: trial.value or -math.inf)
    found = {"best": best.params, "score": best.value, "trial": best.number, "trials": count}
    write_json(out / "search.json", found)
    print(f"\nbest of {count}: {best.value:.4f}, trial {best.number}, {best.params}; {out}/search.json")
    return found


def check_earlier_trials(study: optuna.Study, grid: Grid, digest: str, out: Path) -> None:
    """Check that earlier trials of a search are of the same grid.

    Args:
        study: Study of the search.
        grid: The grid as it is now.
        digest: Digest of its first row and options.
        out: Folder of the search, for errors.

    Raises:
        UserError: If an earlier trial had other options, or an option other choices.
    """
    instead = "Choose another folder with --out, or change the grid back"
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("digest", digest) != digest:
            raise UserError(f"{out}: trial {trial.number} ran with other options or recipes. {instead}")
        for name, earlier in trial.distributions.items():
            now = grid.search.get(name, {}).get("choices")
            before = list(earlier.choices) if isinstance(earlier, CategoricalDistribution) else None
            if before is not None and now != before:
                raise UserError(f"{out}: search: {name}: choices were {before}, now {now}. {instead}")


def suggested(trial: optuna.Trial, name: str, values: dict[str, Any]) -> Any:
    if "choices" in values:
        return trial.suggest_categorical(name, values["choices"])
    try:
        low, high, log = values["low"], values["high"], bool(values.get("log", False))
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(name, low, high, log=log)
        return trial.suggest_float(name, float(low), float(high), log=log)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"search: {name}: is {{low, high, log}} or {{choices}}, not {values} ({error})"
        ) from None


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def report(study: optuna.Study, grid: Grid, cells: dict[str, tuple[str, int]], out: Path) -> dict[str, Any]:
    """Write `compare.md`, `.csv`, `.json` and `.png`, and print the table."""
    found: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in grid.rows}
    failed: dict[str, str] = {}
    for trial in trials(study, TrialState.COMPLETE, TrialState.FAIL):
        cell = trial.user_attrs["cell"]
        if cell not in cells:
            continue
        row, seed = cells[cell]
        if trial.state == TrialState.COMPLETE:
            found[row][seed] = trial.user_attrs["results"]
        elif "error" in trial.user_attrs:
            failed[cell] = trial.user_attrs["error"]
    failed = {cell: said for cell, said in failed.items() if cells[cell][1] not in found[cells[cell][0]]}
    metric = next((r["metric"] for seeds in found.values() for r in seeds.values()), "score")
    firsts = {row: next(iter(seeds.items())) for row, seeds in found.items() if seeds}
    speeds = throughput(
        {row: (out / slug(row) / f"seed-{seed}", r["image_size"]) for row, (seed, r) in firsts.items()}
    )
    table = [summary(row, found, metric, speeds) for row in grid.rows]
    content = {
        "metric": metric,
        "rows": table,
        "cells": {
            row: {str(seed): r[metric] for seed, r in sorted(seeds.items())} for row, seeds in found.items()
        },
        "failed": failed,
        **run.about(),
    }
    write_json(out / "compare.json", content)
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    lines = markdown(table, metric)
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(row["mean"] is not None and row["macs"] for row in table):
        plot(table, metric, out / "compare.png")
    shown, narrow = Table(box=None), (1, 3, 6, 8)  # what a terminal of 80 columns has room for
    head, _, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    shown.add_column("", overflow="fold")
    for column in narrow:
        shown.add_column(head[column], justify="right", no_wrap=True)
    for cells_of_row in body:
        shown.add_row(escape(cells_of_row[0]), *[cells_of_row[column] for column in narrow])
    Console().print(shown)
    print(f"{sum(map(len, found.values()))} of {len(cells)} cells; compare.md, .csv, .json and .png in {out}")
    if failed:
        first, said = next(iter(failed.items()))
        raise UserError(f"{len(failed)} cells failed, such as {first}: {said}")
    return content


def summary(
    row: str, found: dict[str, dict[int, dict[str, Any]]], metric: str, speeds: dict[str, float]
) -> dict[str, Any]:
    """A row of the table; what is not known is None.

    `p` is of a paired t-test against the first row, over the seeds that both have.
    """
    first = next(iter(found))
    scores = {seed: float(results[metric]) for seed, results in found[row].items()}
    both = [seed for seed in scores if seed in found[first]]
    differences = [scores[seed] - float(found[first][seed][metric]) for seed in both]
    some = next(iter(found[row].values()), {})
    compared = row != first and bool(differences)
    return {
        "row": row,
        "seeds": len(scores),
        "mean": statistics.mean(scores.values()) if scores else None,
        "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "difference": statistics.mean(differences) if compared else None,
        "p": paired_p(differences) if compared else None,
        "parameters": some.get("parameters"),
        "macs": some.get("macs"),
        "images_per_second": round(speeds[row], 1) if row in speeds else None,
        "speed": round(speeds[row] / speeds[first], 3) if row in speeds and first in speeds else None,
    }


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test that the mean of these is zero; None of fewer than two, or of equal ones."""
    from scipy import stats

    if len(differences) < 2 or max(differences) == min(differences):
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


@torch.no_grad()
def throughput(runs: dict[str, tuple[Path, Sequence[int]]], batch: int = 16) -> dict[str, float]:
    """Images per second of the networks of runs that are here, float32, in one interleaved run.

    Those that cannot be run, for want of memory for example, are left out, with a line that says why.

    Args:
        runs: row -> folder of a run, and height and width of its images.
        batch: images at a time.
    """
    calls: dict[str, Callable[[], object]] = {}
    for row, (folder, size) in runs.items():
        checkpoint = next((folder / n for n in ("best.ckpt", "last.ckpt") if (folder / n).is_file()), None)
        if checkpoint is not None:  # or else on another machine
            predictor = load_predictor(checkpoint)
            images = torch.rand(batch, 3, *size, device=predictor.device)
            call = partial(predictor.net, list(images) if predictor.task == "detection" else images)
            try:
                call()
            except Exception as error:  # of whatever a network stumbles over
                said = (str(error) or type(error).__name__).splitlines()[0]
                print(f"{row}: not timed ({said})", flush=True)
            else:
                calls[row] = call
    times = interleaved(calls) if calls else {}
    return {row: images_per_second(seconds, batch) for row, seconds in times.items()}


def markdown(table: list[dict[str, Any]], metric: str) -> list[str]:
    """The table's lines."""
    name = metric.removeprefix("val_")
    head = ("", name, "seeds", "difference", "p", "parameters", "MACs", "images/s", "speed")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in table:
        mean, std, p = row["mean"], row["std"], row["p"]
        cells = (
            row["row"].replace("|", "/"),
            "-" if mean is None else f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else ""),
            str(row["seeds"]),
            "" if row["difference"] is None else f"{row['difference']:+.4f}",
            "" if p is None else f"{p:.3f}",
            "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M",
            "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f} G",
            "-" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}",
            "-" if row["speed"] is None else f"{row['speed']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(table: list[dict[str, Any]], metric: str, path: Path) -> None:
    """The score of each row by its operations, with the spread over seeds."""
    drawn = [row for row in table if row["mean"] is not None and row["macs"]]
    with written([row["row"] for row in drawn]):
        figure, axes = visualize.subplots(7.5, 4.8)
        axis = axes[0][0]
        for row in drawn:
            axis.errorbar(row["macs"] / 1e9, row["mean"], yerr=row["std"], fmt="o", capsize=3)
        axis.set(xlabel="multiply-accumulates of an image (G)", ylabel=visualize.called(metric))
        axis.margins(x=0.25, y=0.15)
        axis.grid(alpha=0.3)
        names = [(row["macs"] / 1e9, row["mean"], row["row"]) for row in drawn]
        visualize.name_points(figure, axis, names)
        visualize.save_figure(figure, path)
