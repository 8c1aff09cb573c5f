"""Tests for the options of train and validate: defaults, help and error messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from data.test_classification import image, tree

from crossformer_vision.cli import main
from crossformer_vision.training.recipes import choose_recipe, choose_task

TINY = """
  --data.image_size 32 --data.batch_size 8 --data.num_workers 0 --model.model_args {"depths":[1,1,1,1]}
  --trainer.max_epochs 1 --trainer.accelerator cpu --model.pretrained false
""".split()


def resolved(capsys, *args):
    assert main(["train", *args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_custom_data_uses_default_recipe(capsys, monkeypatch):
    assert choose_recipe("detection", [])[0] == "quickstart/detection.yaml"
    found = resolved(capsys, "--task", "detection", "--data.root", "mine")
    assert found["model"]["min_size"] == 320 and found["data"]["hflip"] == 0.5
    assert resolved(capsys, "--data.root", "mine")["data"]["crop"] == "resized"
    assert resolved(capsys)["data"]["crop"] == "none"  # from the quickstart recipe
    assert (
        resolved(capsys, "--data.root", "x", "--config", "quickstart/classification.yaml")["data"]["crop"]
        == "none"
    )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # closed port
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    for task in ("classification", "detection", "segmentation"):
        name, line = choose_recipe(task, ["--data.root", "x"])  # download fails: use bundled weights
        assert name == f"default/{task}_cpu.yaml" and "cannot be downloaded" in line
        assert choose_recipe(task, ["--data.root", "x", "--trainer.accelerator", "cpu"])[1].count("for a CPU")
        assert (
            choose_recipe(task, ["--data.root", "x", "--model.backbone", "resnet18"])[0]
            == f"default/{task}.yaml"
        )


def test_unavailable_weights_warn(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    tree(tmp_path / "tree")
    options = ["--data.root", str(tmp_path / "tree"), "--model.backbone", "crossformer_tiny", *TINY[:-2]]
    assert main(["train", *options, "--run.dir", str(tmp_path / "run")]) == 0
    assert (
        "published weights of crossformer_tiny are not available: no connection to 127.0.0.1" in caplog.text
    )


def test_task_is_inferred_from_options(tmp_path):
    assert choose_task(["--model.detector", "mask_rcnn"], [])[0] == "detection"
    assert choose_task(["--model.segmenter", "upernet"], [])[0] == "segmentation"
    config = tmp_path / "x.yaml"
    config.write_text("model: {detector: retinanet}", encoding="utf-8")
    assert choose_task([], [str(config)])[0] == "detection"
    assert choose_task(["--model.lr", "1"], [])[0] == "classification"


def test_help_order_and_effective_defaults(capsys):
    assert main(["train", "--data.root", "x", "--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"--{name}") for name in ("resume", "data.root", "model.lr", "run.ema", "trainer.devices")
    ]
    assert places[1:] == sorted(places[1:])
    assert "--trainer.barebones" not in text and "--debug" in text
    wanted = text[text.index("--data.crop {") :]
    wanted = " ".join(wanted.split())
    assert wanted.index("default: resized") < wanted.index("--data.hflip")
    assert main(["validate", "--help"]) == 0
    assert "--checkpoint FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model.lr fast", "--model.lr: 'fast' is not a number"),
        ("--trainer.max_epochs many", "--trainer.max_epochs: 'many' is not an integer or null"),
        ("--data.crop sized", "--data.crop: 'sized' is not one of resized, padded, none"),
        ("--modle.lr 3", "no option --modle.lr. Did you mean --model.lr?"),
        ("--lr fast", "--model.lr: 'fast' is not a number"),
        ("blah", "unexpected argument 'blah'"),
        ("--config a.yaml", "a.yaml: no option model.lrr. Did you mean model.lr?"),
        ("--config b.yaml", "b.yaml: model.lr: 'fast' is not a number"),
        ("--config c.yaml", "c.yaml: no option modell.lr. Did you mean model.lr?"),
        ("--config d.yaml", "d.yaml: not a configuration"),
        (
            "--config quickstart/detecton.yaml",
            "no such configuration file. Did you mean 'quickstart/detection.yaml'?",
        ),
        (
            "--task segmentaton",
            "unknown task 'segmentaton'. Choose from classification, detection, segmentation. Did you",
        ),
        ("--resume", "--resume needs a value"),
    ],
)
def test_error_messages(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = ("model:\n  lrr: 3", "model:\n  lr: fast", "modell:\n  lr: 1", "model: [3")
    for name, content in zip("abcd", contents, strict=True):
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    assert main(["train", *args.split()]) in (1, 2)
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert message in line and "Union" not in line


def test_misspelled_verb_gives_suggestion(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_class_folders_without_splits(tmp_path, capsys):
    """Images of each class are held out; the saved split does not change when images are added."""
    root, run = tmp_path / "photos", tmp_path / "run"
    for name, count in (("ant", 10), ("bee", 5), ("cat", 2)):
        for n in range(count):
            image(root / name / f"{n}.jpg")
    options = ["--data.root", str(root), *TINY]
    assert main(["train", *options, "--run.dir", str(run)]) == 0
    held_out = (run / "val_list.txt").read_text().splitlines()
    assert [sum(line.startswith(name) for line in held_out) for name in ("ant", "bee", "cat")] == [2, 1, 1]
    assert "on 13 images of 3 classes, validating on 4" in capsys.readouterr().out
    for n in range(10, 30):
        image(root / "ant" / f"{n}.jpg")
    accuracy = json.loads((run / "results.json").read_text())["val_accuracy"]
    assert main(["validate", str(run)]) == 0
    assert f"accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    assert "on 33 images of 3 classes, validating on 4" in capsys.readouterr().out
    assert main(["train", *options, "--data.val_share", "0", "--run.dir", str(tmp_path / "x")]) == 1
    assert "photos/train: no such folder" in capsys.readouterr().err


def test_validation_requires_training_classes(tmp_path, capsys):
    tree(tmp_path / "tree")
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", "--data.root", str(tmp_path / "tree"), *TINY, "--run.dir", str(run)]) == 0
    classes = sorted(p.name for p in (tmp_path / "tree/train").iterdir())
    for n in range(3):
        image(other / "val" / classes[1] / f"{n}.jpg")
    assert main(["validate", str(run), "--data.root", str(other)]) == 0  # no train/, subset of classes
    image(other / "val/zebra/0.jpg")
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(other)]) == 1
    assert "class 'zebra' is not among the training classes" in capsys.readouterr().err
    # same number of classes with other names
    for stage in ("train", "val"):
        (tmp_path / "tree" / stage / classes[0]).rename(tmp_path / "tree" / stage / "zebra")
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "2"]) == 1
    assert "class 'zebra' is not among the training classes" in capsys.readouterr().err


def test_validation_on_other_images_uses_all_images(tmp_path, capsys):
    """Uses class folders in which some file names match the held-out training images."""
    root, other, run = tmp_path / "photos", tmp_path / "other", tmp_path / "run"
    for n in range(6):
        for name in ("ant", "bee"):
            image(root / name / f"{n}.jpg")
            image(other / name / f"{n + 3}.jpg")
    assert main(["train", "--data.root", str(root), *TINY, "--run.dir", str(run)]) == 0
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(other)]) == 0
    assert "12 images; plots and results.json" in capsys.readouterr().out
    assert json.loads((run / "validate/results.json").read_text())["data"] == str(other)


def test_run_locked_by_another_process_is_unchanged(tmp_path, capsys):
    options = ["--data.train_images", "16", "--data.val_images", "4", *TINY]
    assert main(["train", *options, "--run.dir", str(tmp_path / "run")]) == 0
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", holds, str(tmp_path / "run/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = (tmp_path / "run/config.yaml").read_text()
        assert main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"]) == 1
        assert "another process is training in it" in capsys.readouterr().err
        assert (tmp_path / "run/config.yaml").read_text() == before
        other.communicate(b"\n")
    assert main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"]) == 0


def test_broken_pipe_exits_silently(tmp_path):
    """``crossformer … | head`` prints no traceback."""
    command = f"{sys.executable} -m crossformer_vision train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("task", ["semantic_segmentation", "detection"])
def test_validation_on_other_images_for_other_tasks(task, tmp_path, capsys):
    """``val_share`` is set to 1 only for class folders."""
    root, run = tmp_path / "other", tmp_path / "run"
    config = f"quickstart/{task}.yaml"
    tiny = ["--data.train_images", "8", "--data.val_images", "2", "--trainer.max_epochs", "1"]
    assert main(["train", "--config", config, *tiny, "--run.dir", str(run)]) == 0
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(root)]) == 1
    assert f"{root}: no such folder" in capsys.readouterr().err
