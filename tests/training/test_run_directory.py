"""Tests for run directories and callbacks: file protection, patience, weight averaging and locks."""

import errno
import fcntl
import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from small_runs import CLASSIFICATION, read_metrics

from crossformer_vision.cli import main
from crossformer_vision.data.classification import ClassificationData
from crossformer_vision.tasks.classification import Classification
from crossformer_vision.training.checkpointing import AverageWeights
from crossformer_vision.training.run_directory import RUN_FILES
from crossformer_vision.weights.reading import read_checkpoint

ADAMW = ["--model.optimizer", "adamw"]


@pytest.mark.parametrize("epochs", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_with_patience_at_end_of_epoch(epochs, tmp_path, capsys):
    run = str(tmp_path / "run")
    one = [*CLASSIFICATION, *ADAMW, "--run.patience", "2", "--trainer.max_epochs", "1"]
    assert main(["train", *one, "--run.dir", run]) == 0
    assert main(["train", "--resume", run, "--trainer.max_epochs", str(epochs)]) == 0
    assert len(read_metrics(tmp_path / "run")) == epochs


def test_patience_is_preserved_on_resume(tmp_path, capsys):
    """Without improvement (learning rate 0), a run stops after 1 + 3 epochs, resumed or not."""
    run, still = tmp_path / "run", ["--model.lr", "0", "--model.warmup_lr", "0", "--model.min_lr", "0"]
    options = [*CLASSIFICATION, *ADAMW, *still, "--run.patience", "3", "--run.dir", str(run)]
    assert main(["train", *options, "--trainer.max_epochs", "2"]) == 0
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "9"]) == 0
    assert len(read_metrics(run)) == 4
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0  # already finished
    assert "is finished. To train longer, pass" in capsys.readouterr().out and len(read_metrics(run)) == 4
    again = [*options, "--resume", "auto", "--trainer.max_epochs", "9"]
    assert main(["train", *again]) == 0 and len(read_metrics(run)) == 4
    assert main(["train", "--resume", str(run), "--run.patience", "5"]) == 0
    assert len(read_metrics(run)) == 6


@pytest.mark.parametrize("name", sorted(RUN_FILES))
def test_directory_with_foreign_files_is_rejected(name, tmp_path, capsys):
    (tmp_path / name).write_text("of another program")
    assert main(["train", *CLASSIFICATION, "--run.dir", str(tmp_path)]) == 1
    assert f"a run would overwrite {name}. Choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of another program"


def test_failed_run_preserves_foreign_files(tmp_path, capsys):
    theirs = tmp_path / "project/tensorboard/last_year"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("three weeks of training")
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / f"images/{split}/{name}").mkdir(parents=True)
            (tmp_path / f"images/{split}/{name}/0.png").write_bytes(b"no image")
    options = ["--data.root", str(tmp_path / "images"), "--run.dir", str(tmp_path / "project")]
    assert main(["train", *options, "--data.image_size", "32", "--data.num_workers", "0"]) == 1
    assert sorted(p.name for p in (tmp_path / "project").rglob("*")) == ["last_year", "tensorboard"]


def test_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert (
        main(
            [
                "train",
                *CLASSIFICATION,
                *ADAMW,
                "--trainer.max_epochs",
                "1",
                "--run.dir",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert "this file system has no locks (Function not implemented)" in caplog.text


def test_ema_warmup_in_short_runs():
    """After 10 updates the decay is 11/20 instead of 0.9999, so the first steps have little weight."""
    averaging = AverageWeights(0.9999)
    averaged = torch.zeros(3)
    for n in range(1, 11):
        averaged = averaging._kwargs["avg_fn"](averaged, torch.ones(3), torch.tensor(n))
    assert averaged.min() > 0.99
    counters = averaging._kwargs["avg_fn"](torch.tensor(3), torch.tensor(7), torch.tensor(5))
    assert counters == 7 and counters.dtype == torch.int64
    late = averaging._kwargs["avg_fn"](torch.zeros(3), torch.ones(3), torch.tensor(10**7))
    torch.testing.assert_close(late, torch.full((3,), 1e-4), rtol=1e-2, atol=0)


def test_stochastic_weight_averaging_is_rejected(tmp_path, capsys):
    swa = "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging"
    options = [
        *CLASSIFICATION,
        swa,
        "--trainer.callbacks.swa_lrs=0.01",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *options]) == 1
    assert "its weights would not be in best.ckpt. Use --run.ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    "schedule", ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("poly", "step"))]
)
def test_lr_finder_result_is_used(schedule, tmp_path):
    class Found(LearningRateFinder):
        largest = 0.0

        def on_train_batch_end(self, trainer, task, *args):
            self.largest = max(self.largest, trainer.optimizers[0].param_groups[0]["lr"])

    L.seed_everything(0)
    finder = Found(min_lr=1e-7, max_lr=1e-2, num_training_steps=30, early_stop_threshold=None)
    data = ClassificationData(train_images=480, val_images=4, batch_size=4, num_workers=0, image_size=32)
    task = Classification(
        optimizer="sgd", lr=0.3, schedule=schedule, warmup_epochs=0.25, model_args={"depths": [1] * 4}
    )
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer = L.Trainer(
        max_epochs=1, callbacks=[finder], enable_checkpointing=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(task, data)
    assert task.lr != 0.3 and finder.largest == pytest.approx(task.lr, rel=0.05)


def test_program_exits_after_caught_worker_error(tmp_path):
    """Workers ignore SIGTERM, which Python sends at exit."""
    for name in "ab":
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(6):
                (tmp_path / split / name / f"{n}.png").write_bytes(b"no image")
    code = f"""
import gc
from crossformer_vision import ClassificationData
def read():
    data = ClassificationData(root={str(tmp_path)!r}, num_workers=2, image_size=32, batch_size=4)
    list(data.train_dataloader())
try:
    read()
except ValueError:
    print("caught")
gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "caught" in done.stdout


@pytest.mark.parametrize(
    "option, value", [("--run.patience", "-1"), ("--run.ema", "1.5"), ("--run.save_every", "-2")]
)
def test_run_options_out_of_range(option, value, capsys):
    assert main(["train", *CLASSIFICATION, option, value]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    limits = "from 0 to 1" if option == "--run.ema" else "at least 0"
    assert f"{option}={value}: must be a number {limits}" in line


def test_checkpoint_contains_averaged_weights(tmp_path):
    run = tmp_path / "run"
    assert main(["train", *CLASSIFICATION, *ADAMW, "--run.ema", "0.9", "--run.dir", str(run)]) == 0
    best, last = (read_checkpoint(run / f"{name}.ckpt") for name in ("best", "last"))
    assert "current_model_state" in last and best["state_dict"].keys() == last["state_dict"].keys()
    assert json.loads((run / "results.json").read_text())["epochs"] == 3
