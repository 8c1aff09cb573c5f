"""Tests for the docs: Python snippets run unmodified and command lines parse, also in zsh."""

import itertools
import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_files import state_dict_of_2021

from crossformer_vision.cli import main
from crossformer_vision.tools.benchmark_step import parse_spec
from crossformer_vision.tools.grid import read_grid
from crossformer_vision.weights import published

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("crossformer ") and "…" not in line.split("#")[0]]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Directory with the files used in the docs: photos, a run of each task and a published checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    tasks = {
        "classification": [],
        "detection": "--config quickstart/detection.yaml --model.width 16".split(),
        "segmentation": "--config quickstart/semantic_segmentation.yaml --model.width 16 --data.crop_size 32".split(),
    }
    small = "--trainer.max_epochs 1 --data.train_images 8 --data.val_images 2 --data.batch_size 4 --data.num_workers 0"
    for task, options in tasks.items():
        run = folder / f"runs/{task}-crossformer_nano"
        assert main(["train", *options, *small.split(), "--run.dir", str(run)]) == 0
    shutil.copytree(folder / "runs/classification-crossformer_nano", folder / "runs/x")
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    (folder / "folder").mkdir()
    for name in ("photo.jpg", "folder/one.png"):
        Image.fromarray(noise).save(folder / name)
    torch.save({"model": state_dict_of_2021("crossformer_small")}, folder / "crossformer-s.pth")
    hub = folder / "hub"
    (hub / "checkpoints").mkdir(parents=True)
    shutil.copy(
        folder / "crossformer-s.pth", hub / "checkpoints" / published.PUBLISHED["crossformer_small"].filename
    )
    return folder


def restore_run(desk, task):
    """Make ``runs/x`` a run of a task, whatever earlier tests have left there, and remove what they shared."""
    for folder in ("runs/x", "my_classifier"):
        shutil.rmtree(desk / folder, ignore_errors=True)
    shutil.copytree(desk / f"runs/{task}-crossformer_nano", desk / "runs/x")


# The Chinese pages have the same code, as tested below.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow) if p == "docs/export.md" else p  # takes two minutes
        for p in PAGES
        if blocks(p, "python") and ".zh" not in p
    ],
)
def test_snippets_run_unmodified(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(desk / "hub"))
    task = {"docs/detection.md": "detection", "docs/segmentation.md": "segmentation"}.get(
        page, "classification"
    )
    restore_run(desk, task)
    for line in commands(page):  # the Python snippets read the output of this command
        args = shlex.split(line, comments=True)[1:]
        if args[0] == "share" and not args[-1].startswith("hf:"):
            assert main(args) == 0
    loggers = [logging.getLogger(name) for name in ("crossformer_vision", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    names: dict = {}
    for block in blocks(page, "python"):
        if "torch.export" not in block:  # takes minutes; test_timm.py covers dynamic sizes
            exec(compile(block, page, "exec"), names)
    for logger, level in zip(loggers, levels, strict=True):  # one page changes the log levels
        logger.setLevel(level)


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads((ROOT / "docs/start.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "start.ipynb", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) and ".zh" not in page])
def test_commands_are_valid(page, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    restore_run(desk, "classification")
    for line in commands(page):
        assert not re.search(r"(?<!['\"\w])\[", line.split(" #")[0]), (
            f"zsh takes a bracket for a pattern: {line}"
        )
        args = shlex.split(line, comments=True)[1:]
        if args[0] == "compare":  # too slow to run
            read_grid(args[1])
            continue
        if args[0] == "benchmark":  # too slow to run; only the names are parsed
            for what in itertools.takewhile(lambda arg: not arg.startswith("-"), args[1:]):
                parse_spec(what)
            continue
        if args[0] in (
            "demo",
            "benchmark-data",
            "check",
        ):  # a server, and data of the user; covered by tests/tools
            continue
        if args[0] == "share":
            if args[-1].startswith("hf:"):
                continue
            shutil.rmtree(args[-1], ignore_errors=True)
        if args[0] == "export" or any(
            arg.endswith((".onnx", ".xml")) for arg in args
        ):  # takes minutes; covered by test_export.py
            continue
        if args[0] == "train" and "--resume" not in args and "--help" not in args:
            args.append("--print_config")
        elif args[0] == "train" and "--resume" in args:
            args += ["--trainer.max_epochs", "1"]  # the run is already finished
        if args[0] != "download":  # test_checkpoints.py covers downloads with a local server
            assert main(args) == 0, line
    capsys.readouterr()


@pytest.mark.parametrize(
    "english, chinese",
    [("README.md", "README.zh-CN.md")]
    + [
        (p, p.replace(".md", ".zh.md"))
        for p in PAGES
        if p.startswith("docs") and ".zh" not in p and p != "docs/development.md"
    ],
)
def test_english_and_chinese_pages_have_the_same_code(english, chinese):
    def code(page):
        lines = [
            line for kind in ("bash", "python") for block in blocks(page, kind) for line in block.splitlines()
        ]
        return [re.sub(r"\s*(#.*)?$", "", line) for line in lines]

    assert code(english) == code(chinese)


def test_parameter_counts_match_readme_table():
    for page in ("README.md", "README.zh-CN.md"):
        rows = re.findall(
            r"\| `(crossformer_\w+)` \| ([\d.]+) M \|", (ROOT / page).read_text(encoding="utf-8")
        )
        assert len(rows) == 9
        import timm

        for name, millions in rows:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=1000)
            assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions, name
