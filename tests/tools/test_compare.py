"""Tests for grids of runs: failures, concurrent workers, result tables, searches and PostgreSQL storage."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from crossformer_vision import UserError
from crossformer_vision.cli import main
from crossformer_vision.tools import compare
from crossformer_vision.tools.compare_table import measure_throughput
from crossformer_vision.tools.grid import folder_name, read_grid
from crossformer_vision.tools.search import run_search
from crossformer_vision.tools.study import open_study
from crossformer_vision.training.recipes import find_config

TINY = """
recipe: quickstart/classification.yaml
options:
  trainer.max_epochs: 1
  trainer.enable_progress_bar: false
  data.train_images: 32
  data.val_images: 20
  data.batch_size: 8
  data.num_workers: 0
  data.image_size: 32
  model.model_args: {depths: [1, 1, 1, 1]}
"""


def written(path, text):
    path.write_text(TINY + text)
    return str(path)


def states(out, name="grid"):
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{out}/study.db")
    return [(t.user_attrs["cell"], t.state) for t in study.trials if "twin" not in t.user_attrs]


def scores(out):
    return json.loads((out / "compare.json").read_text())["cells"]


def test_grid_rows(tmp_path):
    grid = read_grid(
        written(
            tmp_path / "grid.yaml",
            """
rows: [crossformer_nano, pvt_v2_b0]
vary: {model.lr: [0.1, 0.2], model.model_args: [{depths: [1, 1, 1, 1]}]}
seeds: 2
""",
        )
    )
    assert list(grid.rows)[1] == "crossformer_nano, lr 0.2, model_args {'depths': [1, 1, 1, 1]}"
    assert len(grid.rows) == 4 and grid.seeds == [0, 1]
    args = grid.arguments(grid.rows[list(grid.rows)[3]], 1)
    for option, value in (
        ("--model.backbone", "pvt_v2_b0"),
        ("--model.lr", "0.2"),
        ("--seed_everything", "1"),
        ("--model.model_args", '{"depths": [1, 1, 1, 1]}'),
    ):
        assert args[args.index(option) + 1] == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("rows: 3", "rows, vary, options and search must be mappings"),
        ("row: [a]", "not a grid. It needs a recipe and may have rows, vary, options, seeds, search"),
        ("vary: {model.lr: 1}", "vary needs a list of values for each option"),
        ("seeds: many", "seeds must be a number of seeds, or a list of whole numbers"),
        ("rows: [", "cannot be read as a grid"),
    ],
)
def test_invalid_grids(text, message, tmp_path, capsys):
    assert main(["compare", written(tmp_path / "grid.yaml", text), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_failed_cell_is_retried_and_does_not_stop_others(tmp_path, capsys):
    grid = written(
        tmp_path / "grid.yaml",
        "rows: {nano: {}, larger: {model.lr: 0.01}, broken: {model.backbone: nan0}}\nseeds: 2",
    )
    out = tmp_path / "out"
    assert main(["compare", grid, "--output", str(out)]) == 1
    assert "2 cells failed, such as broken, seed 0: unknown model 'nan0'" in capsys.readouterr().err
    assert [state for _, state in states(out)] == [TrialState.COMPLETE] * 4 + [TrialState.FAIL] * 2
    table = {row["row"]: row for row in csv.DictReader((out / "compare.csv").open())}
    assert table["nano"]["seeds"] == table["larger"]["seeds"] == "2" and table["broken"]["mean"] == ""
    found = scores(out)
    difference = [found["larger"][s] - found["nano"][s] for s in ("0", "1")]
    assert float(table["larger"]["difference"]) == pytest.approx(sum(difference) / 2)
    assert int(table["nano"]["parameters"]) > 1e6 and int(table["nano"]["macs"]) > 1e6
    assert float(table["nano"]["speed"]) == 1.0 and float(table["larger"]["speed"]) > 0.2
    assert (out / "compare.png").stat().st_size > 5000
    assert "| nano | 0." in (out / "compare.md").read_text()
    before = (out / "nano/seed-0/last.ckpt").stat().st_mtime
    grid = written(tmp_path / "grid.yaml", "rows: {nano: {}, larger: {model.lr: 0.01}}\nseeds: 2")
    assert main(["compare", grid, "--output", str(out)]) == 0
    assert scores(out) == {k: v for k, v in found.items() if k != "broken"}
    assert (out / "nano/seed-0/last.ckpt").stat().st_mtime == before


def worker(grid, out, *options):
    command = [sys.executable, "-m", "crossformer_vision", "compare", grid, "--output", str(out), *options]
    return subprocess.Popen(
        [*command, "--heartbeat", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_worker_and_concurrent_workers(tmp_path):
    """After SIGKILL within a cell, two workers produce the same table as an undisturbed worker."""
    text = "rows: {nano: {}, larger: {model.lr: 0.01}}\nseeds: 2"
    calm, out = tmp_path / "calm", tmp_path / "out"
    grid = written(tmp_path / "grid.yaml", text + "\n")
    (tmp_path / "grid.yaml").write_text(
        (tmp_path / "grid.yaml").read_text().replace("max_epochs: 1", "max_epochs: 3\n  run.save_every: 1")
    )
    undisturbed = worker(grid, calm)
    first = worker(grid, out)
    last = out / "nano/seed-0/last.ckpt"
    while not last.exists() and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (out / "nano/seed-0/results.json").exists()
    others = [worker(grid, out) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in (*others, undisturbed)]
    assert all(process.returncode == 0 for process in (*others, undisturbed)), said
    assert scores(out) == scores(calm)
    done = [cell for cell, state in states(out) if state == TrialState.COMPLETE]
    assert len(done) == len(set(done)) == 4
    trained = [text.count("training crossformer_nano") for text in said[:2]]
    assert sum(trained) == 4 and min(trained) > 0  # only the interrupted cell is repeated


def test_duplicate_trials_are_skipped(tmp_path):
    """If two workers enqueue the same cell concurrently, the later trial is pruned."""
    grid = written(tmp_path / "grid.yaml", "seeds: 1")
    out = tmp_path / "out"
    study = open_study("grid", out, None, 20)
    for _ in range(2):
        digest = read_grid(grid).digest("recipe", 0)
        study.enqueue_trial({}, user_attrs={"cell": "recipe, seed 0", "digest": digest})
    content = compare.run_grid(grid, out)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert list(content["cells"]) == ["recipe"]


@pytest.mark.slow
def test_scores_of_edited_grid_or_recipe_are_not_reused(tmp_path, capsys):
    """Edits the grid or its recipe after a cell has run."""
    out, grid = str(tmp_path / "out"), written(tmp_path / "grid.yaml", "rows: {nano: {}}")
    assert main(["compare", grid, "--output", out]) == 0
    written(tmp_path / "grid.yaml", "rows: {nano: {model.lr: 0.5}}")
    assert main(["compare", grid, "--output", out]) == 1
    assert "'nano, seed 0' was run with other options, or of another recipe" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(find_config("quickstart/classification.yaml"), recipe)
    text = (TINY + "rows: {nano: {}}").replace("quickstart/classification.yaml", str(recipe))
    (tmp_path / "grid.yaml").write_text(text)
    out = str(tmp_path / "other")
    assert main(["compare", grid, "--output", out]) == 0
    recipe.write_text(recipe.read_text() + "\n# edited\n")
    assert main(["compare", grid, "--output", out]) == 1
    written(tmp_path / "grid.yaml", "rows: {other: {model.lr: 0.5}}")  # a new name is a new cell
    assert main(["compare", grid, "--output", str(tmp_path / "out")]) == 0


def test_each_cell_has_its_own_directory(tmp_path):
    """Rows that map to the same directory are rejected, and so are directories of another grid."""
    with pytest.raises(UserError, match=r"rows 'A x' and 'A \(x\)' would share the folder A_x"):
        read_grid(written(tmp_path / "grid.yaml", "rows: {A x: {}, A (x): {model.lr: 0.5}}"))
    grid = read_grid(written(tmp_path / "grid.yaml", ""))
    args = grid.arguments(grid.rows["recipe"], 0)
    folder = tmp_path / "out/recipe/seed-0"
    assert compare.train_cell(args, folder, digest="one")["cell"] == "one"
    assert compare.train_cell(args, folder, digest="one")["cell"] == "one"
    with pytest.raises(UserError, match="seed-0: contains the run of another grid"):
        compare.train_cell(args, folder, digest="another")


def test_digest_is_independent_of_recipe_location(tmp_path):
    found = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copy(find_config("quickstart/classification.yaml"), tmp_path / place / "recipe.yaml")
        (tmp_path / place / "grid.yaml").write_text(f"recipe: {tmp_path / place / 'recipe.yaml'}\n")
        found.add(read_grid(str(tmp_path / place / "grid.yaml")).digest("recipe", 0))
    assert len(found) == 1


def test_failed_timing_is_skipped(tmp_path, capsys, monkeypatch):
    grid = read_grid(written(tmp_path / "grid.yaml", ""))
    compare.train_cell(grid.arguments(grid.rows["recipe"], 0), tmp_path / "run")
    runs = {"fits": (tmp_path / "run", (32, 32)), "does not": (tmp_path / "run", (0, 32))}
    assert list(measure_throughput(runs, batch_size=2)) == ["fits"]
    assert "does not: not timed (" in capsys.readouterr().out


def test_search_with_pruning(tmp_path):
    search = "search: {model.lr: {low: 1.0e-4, high: 1.0e-2, log: true}, data.hflip: {choices: [0.0, 0.5]}}"
    found = run_search(written(tmp_path / "grid.yaml", search), tmp_path / "out", 2)
    assert 1e-4 <= found["best"]["model.lr"] <= 1e-2 and found["best"]["data.hflip"] in (0.0, 0.5)
    assert json.loads((tmp_path / "out/search.json").read_text()) == found
    with pytest.raises(UserError, match="has no search"):
        run_search(written(tmp_path / "grid.yaml", ""), tmp_path / "out", 1)
    with pytest.raises(UserError, match=r"grid.yaml: search: model.lr: must be {low"):
        run_search(written(tmp_path / "grid.yaml", "search: {model.lr: {low: a}}"), tmp_path / "bad", 1)


def test_unreachable_database_raises(tmp_path):
    with pytest.raises(UserError, match="the study's database cannot be opened") as error:
        open_study("x", tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/x", 20)
    assert "secret" not in str(error.value)


@pytest.fixture
def postgresql():
    """The URL of a server of our own, if PostgreSQL is installed (Debian: apt install postgresql)."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    initdb = found[-1] if found else shutil.which("initdb")
    if not initdb or importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL or psycopg is not installed")
    bin = Path(initdb).parent
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # socket paths have a short length limit
    as_user = []
    if os.geteuid() == 0:  # the server does not run as root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user for it")
        as_user = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    subprocess.run([*as_user, bin / "initdb", "-D", folder / "data", "-U", "me", "-A", "trust"], **quiet)
    options = f"-p {port} -k {folder} -h 127.0.0.1"
    control = [*as_user, bin / "pg_ctl", "-D", folder / "data", "-w"]
    subprocess.run([*control, "-o", options, "-l", folder / "log", "start"], **quiet)
    try:
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_workers_sharing_postgresql_server(postgresql, tmp_path):
    """Two workers with separate output directories run each cell once and share one table."""
    grid = written(tmp_path / "grid.yaml", "rows: {nano: {}, larger: {model.lr: 0.01}}\nseeds: 2")
    outs = [tmp_path / "one", tmp_path / "other"]
    both = [worker(grid, out, "--storage", postgresql) for out in outs]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert scores(outs[0]) == scores(outs[1])
    folders = [{str(p.parent.relative_to(out)) for p in out.rglob("results.json")} for out in outs]
    assert not folders[0] & folders[1] and len(folders[0] | folders[1]) == 4 and all(folders)


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "../up", "x" * 300, "é" * 200, "drop [/b]", "with [mixup]", ""]
)
def test_row_names_map_to_valid_directory_names(name, tmp_path):
    folder = folder_name(name)
    assert len(folder.encode()) <= 120 and (tmp_path / folder).resolve().parent == tmp_path.resolve()
    assert folder not in (".", "..")
    if len(name) > 150:
        assert folder_name(name + "y") != folder


def test_names_with_brackets_are_printed_verbatim(tmp_path, capsys):
    grid = written(tmp_path / "grid.yaml", "rows: {'with [mixup]': {}, 'drop [/b]': {}}")
    assert main(["compare", grid, "--output", str(tmp_path / "out?#1")]) == 0
    printed = capsys.readouterr().out
    assert "with [mixup]" in printed and "drop [/b]" in printed
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out?#1"]  # also contains the study


@pytest.mark.parametrize(
    "text, message",
    [
        ("rows: {}", "grid.yaml: rows is empty. Name a row"),
        (
            "rows: {a: {data.root: nowhere}}",
            "nowhere: no such folder of images, which the grid names as data.root",
        ),
    ],
)
def test_invalid_grid_is_reported_once(text, message, tmp_path, capsys):
    assert main(["compare", written(tmp_path / "grid.yaml", text), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count(message) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("max_epochs: 1", "max_epochs: 2"),
            "trial 0 ran with other options or recipes. Choose another --output",
        ),
        (
            ("[0.0, 0.2]", "[0.0, 0.2, 0.8]"),
            "search: model.mixup: choices were [0.0, 0.2], now [0.0, 0.2, 0.8]",
        ),
    ],
)
def test_search_rejects_trials_with_other_options(change, message, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    grid = written(path, "search: {model.mixup: {choices: [0.0, 0.2]}}")
    assert main(["compare", grid, "--output", str(tmp_path / "out"), "--search", "1"]) == 0
    path.write_text(path.read_text().replace(*change))
    assert main(["compare", grid, "--output", str(tmp_path / "out"), "--search", "2"]) == 1
    assert message in capsys.readouterr().err
