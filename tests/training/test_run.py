"""End-to-end tests of small classification runs on the command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from PIL import Image
from small_runs import CLASSIFICATION, read_metrics, read_weights

from crossformer_vision import load_predictor
from crossformer_vision.cli import main
from crossformer_vision.data.classification import ClassificationData
from crossformer_vision.files import AtomicCheckpoints
from crossformer_vision.tasks.classification import Classification
from crossformer_vision.training.checkpointing import BestCheckpoint
from crossformer_vision.weights.reading import read_checkpoint

CROSSFORMER = str(Path(sys.executable).with_name("crossformer"))
EVERYTHING = """
  --data.num_workers 1
  --run.ema 0.9 --model.drop_path_rate 0.1 --model.mixup 0.2 --model.cutmix 1.0 --model.mix_prob 0.7 --data.crop padded
  --trainer.accumulate_grad_batches 2 --model.grad_checkpointing true --data.auto_augment rand-m9-mstd0.5-inc1
""".split()


def test_run_outputs(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", *CLASSIFICATION, *EVERYTHING, "--run.dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "epoch 3/3" in printed and "images/s" in printed and f"{folder}/best.ckpt" in printed
    for name in ("curves.png", "confusion_matrix.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300 or name == "predictions.png"
            assert len(picture.convert("L").resize((50, 50)).getcolors()) > 5  # not blank
    assert [int(row["epoch"]) for row in read_metrics(folder)] == [0, 1, 2]
    results = json.loads((folder / "results.json").read_text())
    assert results["model"] == "crossformer_nano" and results["epochs"] == 3
    assert results["val_accuracy"] == pytest.approx(
        max(float(r["val_accuracy"]) for r in read_metrics(folder)), abs=1e-6
    )
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.glob("*.part"))

    # The outputs support validation and fine-tuning, and are protected from being overwritten.
    assert main(["validate", str(folder)]) == 0
    assert f"accuracy {results['val_accuracy']:.4f}" in capsys.readouterr().out
    assert main(["train", *CLASSIFICATION, "--run.dir", str(folder)]) == 1
    assert "contains a run" in capsys.readouterr().err
    other = [*CLASSIFICATION, "--trainer.max_epochs", "1", "--run.dir", str(tmp_path / "other")]
    assert main(["train", *other, "--model.checkpoint", str(folder / "best.ckpt")]) == 0


def test_early_stopping_half_precision_and_timm_model(tmp_path):
    folder = tmp_path / "run"
    options = "--run.patience 1 --trainer.precision bf16-mixed --model.backbone resnet18 --model.lr 0".split()
    args = [a for a in CLASSIFICATION if "depths" not in a and a != "--model.model_args"]
    assert main(["train", *args, *options, "--trainer.max_epochs", "9", "--run.dir", str(folder)]) == 0
    assert len(read_metrics(folder)) < 9


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0, 1], ids=["at epochs", "every step"])
def test_killed_run_matches_uninterrupted_run(tmp_path, save_every):
    """After SIGKILL within an epoch, the resumed run ends with bitwise identical weights."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [
        *CLASSIFICATION,
        *EVERYTHING,
        "--data.train_images",
        "512",
        "--run.save_every",
        str(save_every),
    ]
    options += ["--trainer.max_epochs", "2"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert main(["train", *options, "--run.dir", str(alone)]) == 0
    process = subprocess.Popen(
        [CROSSFORMER, "train", *options, "--run.dir", str(killed)], env=threads, start_new_session=True
    )
    while not (killed / "metrics.csv").exists():  # the first epoch is complete
        assert process.poll() is None
        time.sleep(0.02)
    step = 0
    while save_every and step < 17:  # 16 steps per epoch: within the second epoch
        time.sleep(0.02)
        step = read_checkpoint(killed / "last.ckpt")["global_step"]
    if not save_every:
        time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_metrics(killed)) < 2
    assert main(["train", "--resume", str(killed)]) == 0
    for name in ("last.ckpt", "best.ckpt"):
        a, b = read_weights(alone / name), read_weights(killed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    # After a resume within an epoch, train_loss covers only the remaining steps of that epoch.
    ignored = ("images_per_second", "train_loss") if save_every else ("images_per_second",)
    kept, expected = (
        [{k: r[k] for k in r if k not in ignored} for r in read_metrics(run)] for run in (killed, alone)
    )
    assert kept == expected


def test_two_processes_match_one_process(tmp_path):
    """Two processes with half the batch size each match the losses and weights of one process."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, devices, batch in (("one", 1, 16), ("two", 2, 8)):
        options = f"--trainer.devices {devices} --trainer.strategy {'ddp' if devices > 1 else 'auto'}"
        options += f" --data.batch_size {batch} --data.val_images 21 --run.dir {tmp_path / folder}"
        options += " --model.optimizer adamw"  # Muon amplifies rounding errors of small gradients,
        options += " --trainer.precision 32"  # and so does bfloat16
        command = ["train", *CLASSIFICATION, "--trainer.max_epochs", "2", *options.split()]
        if devices == 1:
            assert main(command) == 0
        else:
            subprocess.run([CROSSFORMER, *command], check=True, env=threads)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy", "lr", "step"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4), name
    a, b = read_weights(tmp_path / "one/last.ckpt"), read_weights(tmp_path / "two/last.ckpt")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_version_0_1_checkpoint_keeps_lda_span(tmp_path, capsys, caplog):
    """Version 0.1 checkpoints have no ``lda_span`` and are built with ``region``."""
    new, old = tmp_path / "new", tmp_path / "old"
    groups = '{"depths":[2,2,1,1],"group_size":[2,2,2,2],"interval":[2,2,2,1]}'  # LDA spans differ at 64x64
    one = [
        *CLASSIFICATION,
        "--model.backbone",
        "crossformer_tiny",
        "--trainer.max_epochs",
        "1",
        "--model.lr",
        "0.02",
    ]
    one += ["--data.image_size", "64", "--data.val_images", "8", "--model.model_args", groups]
    assert main(["train", *one, "--run.dir", str(new)]) == 0
    assert read_checkpoint(new / "best.ckpt")["lda_span"] == "map"
    shutil.copytree(new, old)
    for name in ("best.ckpt", "last.ckpt"):
        content = read_checkpoint(old / name)
        del content["lda_span"]
        torch.save(content, old / name)
    capsys.readouterr()
    caplog.clear()
    assert (
        load_predictor(new / "best.ckpt").net.stages[0].blocks[1].attn.lda_span == "map" and not caplog.text
    )
    found = load_predictor(old / "best.ckpt").net
    assert {m.lda_span for m in found.modules() if hasattr(m, "lda_span")} == {"region"}
    assert "best.ckpt: of version 0.1; built as it was trained" in caplog.text
    named = read_checkpoint(old / "best.ckpt")
    named["hyper_parameters"]["model_args"]["lda_span"] = "map"
    torch.save(named, tmp_path / "named.ckpt")
    assert load_predictor(tmp_path / "named.ckpt").net.stages[0].blocks[1].attn.lda_span == "map"

    # `validate` and `--resume` use the same span, and a resumed run stores it.
    losses = []
    for folder in (new, old):
        assert main(["validate", str(folder), "--run.dir", str(tmp_path / "out")]) == 0
        losses.append(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1])
    assert losses[0] != losses[1]
    assert main(["train", "--resume", str(old), "--trainer.max_epochs", "2"]) == 0
    assert read_checkpoint(old / "last.ckpt")["lda_span"] == "region"
    assert "lda_span: region" in (old / "config.yaml").read_text()


class Scored(L.LightningModule):
    """Validations with these (accuracy, loss)."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.layer = scores, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        accuracy, loss = self.scores[self.current_epoch]
        self.log_dict({"val_accuracy": accuracy, "val_loss": loss})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def best_of(folder, scores):
    """The epoch that `best.ckpt` is of."""
    best = BestCheckpoint(SimpleNamespace(monitor="val_accuracy", monitor_mode="max"))
    best.dirpath = str(folder)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    batches = torch.utils.data.DataLoader(torch.ones(2, 1))
    trainer = L.Trainer(max_epochs=len(scores), callbacks=[best], num_sanity_val_steps=0, **quiet)
    trainer.fit(Scored(scores), batches, batches)
    return read_checkpoint(folder / "best.ckpt")["epoch"]


def test_best_checkpoint_tie_breaking(tmp_path):
    assert best_of(tmp_path / "a", [(0.5, 0.7), (0.5, 0.2), (0.5, 0.4)]) == 1
    assert best_of(tmp_path / "b", [(0.5, 0.7), (0.6, 0.9), (0.5, 0.1)]) == 1
    assert best_of(tmp_path / "c", [(0.5, 0.3), (0.5, 0.3), (0.4, 0.1)]) == 1


def test_moved_run_keeps_best_checkpoint(tmp_path):
    """After resuming a moved run, a worse epoch does not replace the best weights."""
    assert (
        main(["train", *CLASSIFICATION, "--trainer.max_epochs", "1", "--run.dir", str(tmp_path / "one")]) == 0
    )
    (tmp_path / "one").rename(tmp_path / "two")
    path = tmp_path / "two/last.ckpt"
    content = read_checkpoint(path)
    (state,) = (
        v for k, v in content["callbacks"].items() if "'monitor': 'val_accuracy'" in k and "best_loss" in v
    )
    state["best_model_score"] = torch.tensor(2.0)  # unreachable accuracy
    torch.save(content, path)
    before = (tmp_path / "two/best.ckpt").read_bytes()
    assert main(["train", "--resume", str(tmp_path / "two"), "--trainer.max_epochs", "2"]) == 0
    assert (tmp_path / "two/best.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    "options, epochs",
    [("--trainer.limit_val_batches 0", 3), ("--trainer.check_val_every_n_epoch 2", 3)],
)
def test_checkpoint_is_saved_without_validation(options, epochs, tmp_path, capsys):
    assert main(["train", *CLASSIFICATION, *options.split(), "--run.dir", str(tmp_path)]) == 0
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] + 1 == epochs
    results = json.loads((tmp_path / "results.json").read_text())
    assert ("val_accuracy" in results) == ("check_val" in options) and Path(results["checkpoint"]).exists()
    if "limit" in options:
        assert "not validated" in capsys.readouterr().out


def test_fast_dev_run(tmp_path, capsys):
    assert main(["train", *CLASSIFICATION, "--trainer.fast_dev_run", "true", "--run.dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["checkpoint"] is None


def test_non_finite_loss_stops_training(tmp_path, capsys):
    options = "--model.optimizer sgd --model.lr 1e12 --model.warmup_lr 1e12 --model.warmup_epochs 0"
    options += " --trainer.gradient_clip_val null"
    assert main(["train", *CLASSIFICATION, *options.split(), "--run.dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        re.search(r"the loss is (nan|inf) at step \d+, learning rate 9\.\d+e\+11", line)
        and "--model.lr" in line
    )
    assert not (tmp_path / "best.ckpt").exists()


def test_validate_without_weights_is_rejected(capsys):
    for task in ("classification", "detection", "segmentation"):
        assert main(["validate", "--task", task, "--model.pretrained", "false"]) == 1
        assert "validate needs weights: a run directory" in capsys.readouterr().err


def test_validate_last_checkpoint(tmp_path, capsys):
    """Papers report metrics of the last iteration."""
    assert main(["train", *CLASSIFICATION, "--model.lr", "0.01", "--run.dir", str(tmp_path)]) == 0
    capsys.readouterr()
    last = read_metrics(tmp_path)[-1]
    assert main(["validate", str(tmp_path), "--checkpoint", str(tmp_path / "last.ckpt")]) == 0
    assert f"loss {float(last['val_loss']):.4f}" in capsys.readouterr().out


def test_validate_counts_the_images_it_uses(tmp_path, capsys):
    assert main(["train", *CLASSIFICATION, "--trainer.max_epochs", "1", "--run.dir", str(tmp_path)]) == 0
    validate = ["validate", str(tmp_path), "--trainer.limit_val_batches"]
    capsys.readouterr()
    assert main([*validate, "1"]) == 0
    assert "\n16 images; plots and results.json in" in capsys.readouterr().out
    assert json.loads((tmp_path / "validate/results.json").read_text())["images"] == 16
    assert main([*validate, "0"]) == 1
    assert "there are no images to validate on" in capsys.readouterr().err
    assert not (tmp_path / "validate-2").exists()


@pytest.mark.parametrize("decay_on", ["weights", "all_but_norms", "all"])
def test_weight_decay_parameter_groups(decay_on):
    task = Classification("crossformer_nano", optimizer="sgd", weight_decay=0.1, decay_on=decay_on)
    decayed = {id(p) for g in task.create_optimizer().param_groups if g["weight_decay"] for p in g["params"]}
    block = task.net.stages[0].blocks[0]
    assert id(block.mlp.fc1.weight) in decayed
    assert (id(block.mlp.fc1.bias) in decayed) == (decay_on != "weights")
    assert (id(block.norm1.weight) in decayed) == (decay_on == "all")
    groups = task.create_optimizer().param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(task.net.parameters()))
    task.net.stages[0].requires_grad_(False)
    trained = {id(p) for group in task.create_optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for p in task.net.parameters() if p.requires_grad}


def test_full_disk_keeps_previous_checkpoint(tmp_path):
    """A file size limit simulates a full disk: the write fails partway."""
    script = """
import resource, signal, sys, torch
from crossformer_vision.files import AtomicCheckpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
io, path = AtomicCheckpoints(), sys.argv[1]
io.save_checkpoint({"x": torch.zeros(10)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
io.save_checkpoint({"x": torch.ones(1_000_000)}, path)
"""
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert f"{path}: cannot save the checkpoint (" in done.stderr and "File too large" in done.stderr
    assert torch.equal(AtomicCheckpoints().load_checkpoint(path)["x"], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_order_and_augmentation_differ_between_epochs():
    """Regression test: the sampler epoch was not set, so every epoch repeated the first."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append((trainer.current_epoch, *(round(float(image.sum()), 3) for image in batch[0])))

    data = ClassificationData(train_images=16, val_images=4, image_size=32, batch_size=8, num_workers=1)
    task = Classification(num_classes=data.num_classes, model_args={"depths": [1, 1, 1, 1]})
    quiet = dict(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    L.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[Watch()], use_distributed_sampler=False, **quiet
    ).fit(task, data)
    images = [{value for epoch, *batch in seen if epoch == n for value in batch} for n in range(3)]
    assert all(len(values) == 16 for values in images)
    assert not images[0] & images[1] and not images[1] & images[2]
