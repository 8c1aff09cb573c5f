"""Plausible mistakes on the command line: each gets one line with a suggestion that is right."""

import json

import numpy as np
import pytest
from PIL import Image

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.data.layout import infer_task
from crossformer_vision.errors import check_output

SMALL = "--data.train_images 4 --data.val_images 2 --data.batch_size 2 --data.num_workers 0 --data.image_size 32".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a folder of images, a photo, and data in several layouts."""
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    for name in (
        "my_images/train/a/0.png",
        "my_coco/train/0.png",
        "my_maps/images/training/0.png",
        "photo.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "my_coco/annotations").mkdir()
    (tmp_path / "my_coco/annotations/instances_train.json").write_text(json.dumps({"images": []}))
    (tmp_path / "my_maps/annotations/training").mkdir(parents=True)
    Image.new("L", (50, 40)).save(tmp_path / "my_maps/annotations/training/0.png")
    for name in (
        "my_roboflow/train/_annotations.coco.json",
        "my_yolo/labels/train/0.txt",
        "my_voc/Annotations/0.xml",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "command, line",
    [
        ("train my_images", "'my_images' is not understood; did you mean --data.root my_images?"),
        ("train nowhere", "'nowhere' is not understood; options are given as --data.root FOLDER"),
        ("train --epochs 3", "no option --epochs; did you mean --trainer.max_epochs?"),
        ("train --batch-size 4", "no option --batch-size; did you mean --data.batch_size?"),
        ("train --imgsz 64", "no option --imgsz; did you mean --data.image_size?"),
        ("train --task detection --imgsz 64", "no option --imgsz; did you mean --model.min_size?"),
        ("train --task segmentation --imgsz 64", "no option --imgsz; did you mean --data.crop_size?"),
        ("train --device cuda", "did you mean --trainer.accelerator cpu (or gpu), or --trainer.devices N?"),
        ("train --lr 0.1", "no option --lr; did you mean --model.lr?"),
        ("train --workers 2", "no option --workers; did you mean --data.num_workers?"),
        ("train --data data.yaml", "--data.root names the folder of your images. A data.yaml is YOLO's"),
        ("train --trainer.accelerator gpu", "--trainer.accelerator gpu: torch finds none here. Use cpu"),
        (
            "train --trainer.devices 500",
            "--trainer.devices 500: there is no GPU to use, and 500 processes need 500",
        ),
        ("train --trainer.max_epochs 0", "--trainer.max_epochs 0: trains nothing. Use 1 or more"),
        ("train --trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches 0: trains nothing"),
        ("train --trainer.val_check_interval 0", "--trainer.val_check_interval 0: must be above 0"),
        ("train --data.interpolation foo", "interpolation='foo': it is one of"),
        (
            "train --model.milestones [3,1]",
            "milestones=[3.0, 1.0]: they are epochs above 0 in ascending order",
        ),
        ("train --data.augmentation no_such.steps", "--data.augmentation no_such.steps: no module 'no_such'"),
        (
            "train --data.augmentation math.steps",
            "--data.augmentation math.steps: module 'math' has no 'steps'",
        ),
        ("train --data.root my_yolo", "labels/train/0.txt holds detection labels in YOLO's format"),
        ("train --data.root my_voc", "Annotations/0.xml holds detection labels in Pascal VOC's format"),
        ("--verison", "no verb '--verison'; did you mean --version?"),
        ("predict photo.jpg", "the following arguments are required: images"),
        (
            "predict photo.jpg photo.jpg",
            "photo.jpg: is an image. First comes a run, a checkpoint or the name of",
        ),
        (
            "inspect crossformer_nano.cifar10 photo.jpg --out ./photo.jpg",
            "--out ./photo.jpg: is an input of this command. Choose another path",
        ),
        ("predict crossformer_nano.cifar10 photo.jpg --tile 64", "--tile 64: tiles are for detectors, and"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(command, line, here, capsys):
    arguments = command.split()
    assert main([*arguments, *(SMALL if command == "train" else [])]) in (1, 2)
    errors = capsys.readouterr().err.strip().splitlines()
    assert line in errors[-1] and "Traceback" not in "".join(errors)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    "root, task, reason",
    [
        ("my_images", "classification", "its folders are taken for classes"),
        ("my_coco", "detection", "annotations/instances_train.json is a COCO file"),
        ("my_roboflow", "detection", "train/_annotations.coco.json is a COCO file"),
        ("my_maps", "segmentation", "annotations/ holds class maps of images/"),
    ],
)
def test_the_task_follows_from_the_layout(root, task, reason, here, capsys):
    assert infer_task(here / root) == (task, reason)
    assert main(["train", "--data.root", root, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert (f"task: {task}, since in {root} {reason}; --task names another" in printed) == (
        task != "classification"
    )
    assert f"\ntask: {task}\n" in "\n" + printed
    assert main(["train", "--data.root", root, "--task", "classification", "--print_config"]) == 0
    assert "\ntask: classification\n" in "\n" + capsys.readouterr().out


def test_obvious_names_of_options_are_taken(here, capsys):
    for option in ("--score", "--score-threshold", "--conf"):
        assert (
            main(["predict", "crossformer_nano.cifar10", "photo.jpg", option, "0.3", "--save", "nothing"])
            == 0
        )


def test_an_output_is_no_input_under_another_name(here):
    (here / "link.jpg").symlink_to("photo.jpg")
    (here / "twin.jpg").hardlink_to(here / "photo.jpg")
    for output in ("link.jpg", "twin.jpg", "my_images/../photo.jpg"):
        with pytest.raises(UserError, match=f"--out {output}: is an input of this command"):
            check_output("--out", output, None, "crossformer_nano.cifar10", "photo.jpg")
    check_output("--out", "new.jpg", "photo.jpg", "my_images")


@pytest.mark.parametrize("source", ["", "  "])
def test_a_predictor_of_no_path_is_refused(source):
    with pytest.raises(UserError, match="no checkpoint is named"):
        load_predictor(source)


def test_the_start_of_a_run_says_what_it_starts_from(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *SMALL, "--trainer.max_epochs", "1", "--run.folder", run]) == 0
    assert "weights: none, training from scratch" in capsys.readouterr().out
    bundled = [
        "--model.model",
        "crossformer_nano.cifar10",
        "--model.pretrained",
        "true",
        "--trainer.max_epochs",
        "1",
    ]
    assert main(["train", *SMALL, *bundled, "--run.folder", str(tmp_path / "two")]) == 0
    assert "weights: crossformer_nano.cifar10 (bundled)" in capsys.readouterr().out
    checkpoint = ["--model.checkpoint", f"{run}/best.ckpt", "--trainer.max_epochs", "1"]
    assert main(["train", *SMALL, *checkpoint, "--run.folder", str(tmp_path / "three")]) == 0
    assert f"weights: {run}/best.ckpt: " in capsys.readouterr().out
