"""The options of `train` and `validate`: defaults that hold, help in order, errors in words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from data.test_classification import image, tree

from crossformer_vision.cli import main
from crossformer_vision.cli.options import recipe, task_of

TINY = """
  --data.image_size 32 --data.batch_size 8 --data.num_workers 0 --model.model_args {"depths":[1,1,1,1]}
  --trainer.max_epochs 1 --trainer.accelerator cpu --model.pretrained false
""".split()


def resolved(capsys, *args):
    assert main(["train", *args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_own_data_start_from_a_recipe_of_their_own(capsys, monkeypatch):
    assert recipe("detection", [])[0] == "quickstart/detection.yaml"
    found = resolved(capsys, "--task", "detection", "--data.root", "mine")
    assert found["model"]["min_size"] == 320 and found["data"]["hflip"] == 0.5
    assert resolved(capsys, "--data.root", "mine")["data"]["crop"] == "resized"
    assert resolved(capsys)["data"]["crop"] == "none"  # the quickstart's
    assert (
        resolved(capsys, "--data.root", "x", "--config", "quickstart/classification.yaml")["data"]["crop"]
        == "none"
    )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    for task in ("classification", "detection", "segmentation"):
        name, line = recipe(task, ["--data.root", "x"])  # weights cannot be had: those that come along
        assert name == f"default/{task}_cpu.yaml" and "come with the library" in line
        assert recipe(task, ["--data.root", "x", "--trainer.accelerator", "cpu"])[1].count("for a CPU")
        assert recipe(task, ["--data.root", "x", "--model.model", "resnet18"])[0] == f"default/{task}.yaml"


def test_weights_that_are_not_at_hand_are_said_and_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    tree(tmp_path / "tree")
    options = ["--data.root", str(tmp_path / "tree"), "--model.model", "crossformer_tiny", *TINY[:-2]]
    assert main(["train", *options, "--run.folder", str(tmp_path / "run")]) == 0
    assert "published weights of crossformer_tiny are not at hand: no connection to 127.0.0.1" in caplog.text


def test_the_task_follows_from_its_options(tmp_path):
    assert task_of(["--model.detector", "mask_rcnn"], []) == "detection"
    assert task_of(["--model.segmenter=upernet"], []) == "segmentation"
    config = tmp_path / "x.yaml"
    config.write_text("model: {detector: retinanet}", encoding="utf-8")
    assert task_of([], [str(config)]) == "detection"
    assert task_of(["--model.lr", "1"], []) == "classification"


def test_help_begins_with_our_options_and_shows_what_holds(capsys):
    assert main(["train", "--data.root", "x", "--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"--{name}") for name in ("resume", "data.root", "model.lr", "run.ema", "trainer.devices")
    ]
    assert places[1:] == sorted(places[1:])
    assert "--trainer.barebones" not in text and "--debug" in text
    wanted = text[text.index("--data.crop {") :]
    assert wanted.index("default: resized") < wanted.index("--data.hflip")
    assert main(["validate", "--help"]) == 0
    assert "--checkpoint FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model.lr fast", "--model.lr: 'fast' is not a number"),
        ("--trainer.max_epochs many", "--trainer.max_epochs: 'many' is not an integer or null"),
        ("--data.crop sized", "--data.crop: 'sized' is not one of resized, padded, none"),
        ("--modle.lr 3", "no option --modle.lr; did you mean --model.lr?"),
        ("--lr 3", "no option --lr; did you mean --model.lr?"),
        ("blah", "'blah' is not understood"),
        ("--config a.yaml", "a.yaml: no option model.lrr; did you mean model.lr?"),
        ("--config b.yaml", "b.yaml: model.lr: 'fast' is not a number"),
        ("--config c.yaml", "c.yaml: no option modell.lr; did you mean model.lr?"),
        ("--config d.yaml", "d.yaml: not a configuration"),
        (
            "--config quickstart/detecton.yaml",
            "no such configuration file; did you mean quickstart/detection.yaml?",
        ),
        (
            "--task segmentaton",
            "no task 'segmentaton'; there are: classification, detection, segmentation; did you",
        ),
        ("--resume", "--resume needs a value"),
    ],
)
def test_errors_in_words(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = ("model:\n  lrr: 3", "model:\n  lr: fast", "modell:\n  lr: 1", "model: [3")
    for name, content in zip("abcd", contents, strict=True):
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    assert main(["train", *args.split()]) in (1, 2)
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert message in line and "Union" not in line


def test_a_verb_that_is_meant(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'; did you mean train?" in capsys.readouterr().err


def test_class_folders_without_splits(tmp_path, capsys):
    """Some of each class are held out; which ones is written, and stays so when images are added."""
    root, run = tmp_path / "photos", tmp_path / "run"
    for name, count in (("ant", 10), ("bee", 5), ("cat", 2)):
        for n in range(count):
            image(root / name / f"{n}.jpg")
    options = ["--data.root", str(root), *TINY]
    assert main(["train", *options, "--run.folder", str(run)]) == 0
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
    assert main(["train", *options, "--data.val_share", "0", "--run.folder", str(tmp_path / "x")]) == 1
    assert "photos/train: no such folder" in capsys.readouterr().err


def test_validation_needs_what_it_validates_and_the_same_classes(tmp_path, capsys):
    tree(tmp_path / "tree")
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", "--data.root", str(tmp_path / "tree"), *TINY, "--run.folder", str(run)]) == 0
    classes = sorted(p.name for p in (tmp_path / "tree/train").iterdir())
    for n in range(3):
        image(other / "val" / classes[1] / f"{n}.jpg")
    assert main(["validate", str(run), "--data.root", str(other)]) == 0  # neither a train/ nor all classes
    image(other / "val/zebra/0.jpg")
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(other)]) == 1
    assert "class 'zebra' is not among the training classes" in capsys.readouterr().err
    # as many classes, by other names
    for stage in ("train", "val"):
        (tmp_path / "tree" / stage / classes[0]).rename(tmp_path / "tree" / stage / "zebra")
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "2"]) == 1
    assert "class 'zebra' is not among the training classes" in capsys.readouterr().err


def test_other_images_are_validated_whole(tmp_path, capsys):
    """A plain folder of other images, some of the same names as those held out in training."""
    root, other, run = tmp_path / "photos", tmp_path / "other", tmp_path / "run"
    for n in range(6):
        for name in ("ant", "bee"):
            image(root / name / f"{n}.jpg")
            image(other / name / f"{n + 3}.jpg")
    assert main(["train", "--data.root", str(root), *TINY, "--run.folder", str(run)]) == 0
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(other)]) == 0
    assert "12 images; pictures and results.json" in capsys.readouterr().out
    assert json.loads((run / "validate/results.json").read_text())["data"] == str(other)


def test_a_run_that_is_trained_by_another_is_left_alone(tmp_path, capsys):
    options = ["--data.train_images", "16", "--data.val_images", "4", *TINY]
    assert main(["train", *options, "--run.folder", str(tmp_path / "run")]) == 0
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


def test_nobody_listens(tmp_path):
    """`crossformer … | head`: no traceback."""
    command = f"{sys.executable} -m crossformer_vision train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("task", ["semantic_segmentation", "detection"])
def test_other_images_of_any_task_are_validated(task, tmp_path, capsys):
    """`val_share`, which is then all, is an option of class folders alone."""
    root, run = tmp_path / "other", tmp_path / "run"
    config = f"quickstart/{task}.yaml"
    tiny = ["--data.train_images", "8", "--data.val_images", "2", "--trainer.max_epochs", "1"]
    assert main(["train", "--config", config, *tiny, "--run.folder", str(run)]) == 0
    capsys.readouterr()
    assert main(["validate", str(run), "--data.root", str(root)]) == 1
    assert f"{root}: no such folder" in capsys.readouterr().err
