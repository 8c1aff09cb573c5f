"""Tests for resuming interrupted runs, with the same or with changed options."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from small_runs import CLASSIFICATION, read_metrics, read_weights

from crossformer_vision.cli import main
from crossformer_vision.files import create_run_dir
from crossformer_vision.weights.reading import read_checkpoint


class Interrupt(L.Callback):
    """Ctrl-C, pressed in a batch of training, or of the validation of an epoch."""

    def __init__(self, step: int = -1, epoch: int = -1, number: int = 2) -> None:
        self.step, self.epoch, self.number = step, epoch, number

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            signal.raise_signal(self.number)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "alone"
    options = ["--data.val_images", "40", "--data.num_workers", "0", "--trainer.accumulate_grad_batches", "2"]
    options += ["--run.ema", "0.9", "--data.train_images", "100"]
    assert main(["train", *CLASSIFICATION, *options, "--run.dir", str(folder)]) == 0
    return folder, options


@pytest.mark.parametrize(
    "where, number",
    [
        ("step: 1", 2),
        pytest.param("step: 4", 15, marks=pytest.mark.slow),
        pytest.param("epoch: 0", 2, marks=pytest.mark.slow),
        ("epoch: 2", 2),
    ],
)
def test_interrupted_run_matches_uninterrupted_run(where, number, alone, tmp_path, capsys):
    """Interrupts in the first epoch, a later epoch, the first validation and the last validation."""
    (left, options), folder = alone, tmp_path / "run"
    callback = f"[{{class_path: training.test_resume.Interrupt, init_args: {{{where}, number: {number}}}}}]"
    command = [
        "train",
        *CLASSIFICATION,
        *options,
        "--run.dir",
        str(folder),
        "--trainer.callbacks",
        callback,
    ]
    assert main(command) == 128 + number
    said = capsys.readouterr().err
    step = int(re.search(r"stopped after step (\d+); continue with: (.*)", said)[1])
    assert f"train --resume {folder}" in said and "Traceback" not in said
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == step
    assert step == (int(where[-1]) + 1 if "step" in where else 3 * (int(where[-1]) + 1))  # interrupted step
    assert main(["train", "--resume", str(folder), "--trainer.callbacks", "null"]) == 0
    printed = capsys.readouterr().out
    assert (f"resuming after step {step}" in printed and "epoch 3/3" in printed) or step == 9
    a, b = read_weights(left / "last.ckpt"), read_weights(folder / "last.ckpt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    same = ("epoch", "step", "lr", "val_accuracy", "val_loss")
    assert [[r[k] for k in same] for r in read_metrics(folder)] == [
        [r[k] for k in same] for r in read_metrics(left)
    ]
    results = json.loads((folder / "results.json").read_text())
    assert results["images_seen"] == 3 * 96


def test_failure_before_first_step_leaves_no_files(tmp_path, capsys):
    tree = tmp_path / "images"
    for name in ("a", "b"):
        for split in ("train", "val"):
            (tree / split / name).mkdir(parents=True)
            (tree / split / name / "x.jpg").write_bytes(b"rubbish")
    folder = tmp_path / "run"
    options = ["--data.root", str(tree), "--data.num_workers", "0", "--run.dir", str(folder)]
    assert main(["train", *options]) == 1
    assert "cannot read this image" in capsys.readouterr().err and not folder.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("kept")
    assert main(["train", *options, "--run.dir", str(tmp_path / "mine")]) == 1
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_invalid_run_dir_preserves_existing_files(tmp_path, monkeypatch, capsys):
    """Files in the working directory are kept if the run directory cannot be created."""
    monkeypatch.chdir(tmp_path)
    Path("precious.txt").write_text("kept")
    Path("a_file").write_text("not a folder")
    for folder in ("a_file/run", "a_file", "/proc/run"):
        assert main(["train", *CLASSIFICATION, "--run.dir", folder]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{folder}: " in line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "precious.txt"]


def test_resume_without_checkpoint_starts_from_scratch(alone, tmp_path):
    (left, _), folder = alone, tmp_path / "run"
    folder.mkdir()
    shutil.copy(left / "config.yaml", folder)
    assert main(["train", "--resume", str(folder), "--trainer.max_epochs", "1"]) == 0
    assert len(read_metrics(folder)) == 1


def test_option_changes_on_resume(alone, tmp_path, capsys):
    (left, _), folder = alone, tmp_path / "run"
    shutil.copytree(left, folder)
    before = (folder / "results.json").read_bytes(), (folder / "best.ckpt").read_bytes()
    assert main(["train", "--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == ((folder / "results.json").read_bytes(), (folder / "best.ckpt").read_bytes())

    for option, value in (
        ("--model.backbone", "resnet18"), ("--model.optimizer", "sgd"), ("--model.model_args", '{"depths":[2,1,1,1]}'),
    ):  # fmt: skip
        assert main(["train", "--resume", str(folder), "--trainer.max_epochs", "4", option, value]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"--resume keeps the run's {option[2:]}: " in line and "--model.checkpoint" in line

    minutes = json.loads((folder / "results.json").read_text())["minutes"]
    options = (
        "--trainer.max_epochs 6 --model.lr 0.01 --data.batch_size 10 --trainer.accumulate_grad_batches 1"
    )
    assert main(["train", "--resume", str(folder), *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "data.batch_size 16 -> 10" in printed and "model.lr 0.002 -> 0.01" in printed
    table = read_metrics(folder)
    assert [int(r["epoch"]) for r in table] == list(range(6))
    assert [int(r["step"]) for r in table] == [3, 6, 9, 19, 29, 39]  # whole epochs of ten batches
    # The schedule counts images: 288 of 588 were seen, and the last learning rate is the smallest.
    cosine = [1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * seen / 588)) / 2 for seen in (388, 488, 588)]
    assert [float(r["lr"]) for r in table[3:]] == pytest.approx(cosine)
    results = json.loads((folder / "results.json").read_text())
    assert results["images_seen"] == 288 + 300 and results["minutes"] > minutes
    assert "lr: 0.01" in (folder / "config.yaml").read_text()


def test_batch_size_change_within_epoch(tmp_path, capsys):
    """64 of 160 images are seen in batches of 16, the remaining 96 once in batches of 8."""
    folder = tmp_path / "run"
    options = [
        *CLASSIFICATION,
        "--data.num_workers",
        "0",
        "--data.train_images",
        "160",
        "--trainer.max_epochs",
        "1",
    ]
    callback = "[{class_path: training.test_resume.Interrupt, init_args: {step: 3}}]"
    assert main(["train", *options, "--run.dir", str(folder), "--trainer.callbacks", callback]) == 130
    resumed = ["--trainer.callbacks", "null", "--data.batch_size", "8"]
    assert main(["train", "--resume", str(folder), *resumed]) == 0
    (row,) = read_metrics(folder)
    assert int(row["step"]) == 4 + 12 and row["val_accuracy"]
    assert read_checkpoint(folder / "last.ckpt")["images_seen"] == 160


def test_run_dirs_are_unique(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [create_run_dir(Path("runs/x")).name for _ in range(3)] == ["x", "x-2", "x-3"]
    one = [*CLASSIFICATION, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    for _ in range(2):
        assert main(["train", *one]) == 0
    assert {p.name for p in Path("runs").iterdir()} >= {"classification-crossformer_nano", "classification-crossformer_nano-2"}  # fmt: skip
    assert "run directory: runs/classification-crossformer_nano-2" in capsys.readouterr().out
    for n in ("", "-2"):
        assert main(["validate", "runs/classification-crossformer_nano"]) == 0
        assert (Path("runs/classification-crossformer_nano") / f"validate{n}/results.json").exists()


def test_trainer_options(tmp_path, capsys, caplog):
    one = [*CLASSIFICATION, "--data.num_workers", "0", "--trainer.max_epochs", "2"]
    theirs = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary",
        "--trainer.overfit_batches",
        "2",
    ]
    theirs += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]  # fmt: skip
    assert main(["train", *one, *theirs, "--run.dir", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "logs").rglob("metrics.csv")) and (tmp_path / "run/tensorboard").exists()
    assert [int(r["step"]) for r in read_metrics(tmp_path / "run")] == [2, 4]
    assert "Params" in caplog.text + capsys.readouterr().err
    none = ["--trainer.logger", "false", "--trainer.max_epochs", "1", "--run.dir", str(tmp_path / "none")]
    assert main(["train", *one, *none]) == 0
    assert not (tmp_path / "none/tensorboard").exists()
    for option in (
        "enable_checkpointing false",
        "barebones true",
        "default_root_dir x",
        "log_every_n_steps 3",
    ):
        assert main(["train", *one, *f"--trainer.{option}".split()]) == 1
        name = option.split()[0]
        assert f"--trainer.{name} is not supported: " in capsys.readouterr().err
