"""Tests for common command-line mistakes: one-line errors with a correct suggestion."""

import json

import numpy as np
import pytest
from PIL import Image

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.data.layout import infer_task
from crossformer_vision.errors import check_output
from crossformer_vision.training.arguments import normalize
from crossformer_vision.training.options import parse_options

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
        ("train nowhere", "unexpected argument 'nowhere', which is no existing folder"),
        ("train --seed_everything true", "--seed-everything: 'True' is not an integer"),
        ("train --model.warmup_steps=-3", "warmup_steps=-3: must be a number at least 0"),
        ("train --model.power=-1", "power=-1.0: must be a number at least 0"),
        ("info crossformer_nano photo.jpg", "unexpected argument 'photo.jpg'"),
        ("info crossformer_nano --devices 2", "no option --devices"),
        ("train --epochs many", "--trainer.max_epochs: 'many' is not an integer or null"),
        ("train --batch 4", "no option --batch. Did you mean --data.batch_size?"),
        ("train --imgsz 64", "no option --imgsz. Did you mean --data.image_size?"),
        ("train --task detection --imgsz 64", "no option --imgsz. Did you mean --model.min_size?"),
        ("train --task segmentation --imgsz 64", "no option --imgsz. Did you mean --data.crop_size?"),
        ("train --device tpu", "--device tpu: not a device. Use cpu, gpu, mps, or the index of a GPU"),
        ("train --devices 2", "Did you mean --device cpu (or gpu), or --trainer.devices N?"),
        ("train --learning-rate 0.1", "no option --learning-rate. Did you mean --model.lr?"),
        ("train --model crossformer_small", "no option --model. Did you mean --model.backbone?"),
        ("train --workers 2", "no option --workers. Did you mean --data.num_workers?"),
        ("train --data data.yaml", "data.yaml: no such folder in"),
        ("train --trainer.accelerator gpu", "--trainer.accelerator gpu: torch finds no such device. Use cpu"),
        (
            "train --trainer.devices 500",
            "--trainer.devices 500: 500 processes on the CPU need 500 cores, and there are",
        ),
        ("train --trainer.max_epochs 0", "--trainer.max_epochs 0: trains nothing. Use 1 or more"),
        ("train --trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches 0: trains nothing"),
        ("train --trainer.val_check_interval 0", "--trainer.val_check_interval 0: must be above 0"),
        ("train --data.interpolation foo", "interpolation='foo': must be one of"),
        (
            "train --model.milestones [3,1]",
            "milestones=[3.0, 1.0]: must be epochs above 0 in ascending order",
        ),
        ("train --data.augmentation no_such.steps", "--data.augmentation no_such.steps: no module 'no_such'"),
        (
            "train --data.augmentation math.steps",
            "--data.augmentation math.steps: module 'math' has no 'steps'",
        ),
        ("train --data.root my_yolo", "my_yolo: has no data.yaml, which lists the classes of labels"),
        (
            "train --data.root my_voc",
            "my_voc/ImageSets/Main/train.txt: no such file, nor a folder train with XML",
        ),
        ("--verison", "unknown command '--verison'. Did you mean '--version'?"),
        ("predict photo.jpg", "the following arguments are required: images"),
        (
            "predict photo.jpg photo.jpg",
            "photo.jpg: is an image. The first argument is a run, a checkpoint or the name",
        ),
        (
            "inspect crossformer_nano.cifar10 photo.jpg --output ./photo.jpg",
            "--output ./photo.jpg: is an input of this command. Choose another path",
        ),
        (
            "predict crossformer_nano.cifar10 photo.jpg --conf 0.3",
            "no option --conf. Did you mean --score-threshold?",
        ),
        (
            "predict crossformer_nano.cifar10 photo.jpg --score-threshold high",
            "--score-threshold: 'high' is not a number",
        ),
        (
            "predict crossformer_nano.cifar10 photo.jpg --tile-size 64",
            "--tile-size 64: only for detectors, but",
        ),
    ],
)
def test_mistake_gives_suggestion(command, line, here, capsys):
    arguments = command.split()
    assert main([*arguments, *(SMALL if command == "train" else [])]) in (1, 2)
    errors = capsys.readouterr().err.strip().splitlines()
    assert line in errors[-1] and "Traceback" not in "".join(errors)
    assert not (here / "runs").exists()
    if command.startswith("info"):  # the options of train are not suggested
        assert "--data.root" not in errors[-1] and "--trainer" not in errors[-1]


@pytest.mark.parametrize(
    "root, task, reason",
    [
        ("my_images", "classification", "its folders are treated as classes"),
        ("my_coco", "detection", "annotations/instances_train.json is a COCO file"),
        ("my_roboflow", "detection", "train/_annotations.coco.json is a COCO file"),
        ("my_maps", "segmentation", "annotations/ holds class maps of images/"),
    ],
)
def test_task_is_inferred_from_directory_layout(root, task, reason, here, capsys):
    assert infer_task(here / root) == (task, reason)
    options = parse_options("train", ["--data.root", root])
    note = f"task: {task} ({root}: {reason}). Override with --task."
    assert options.task == task and (note in options.notes) == (task != "classification")
    assert main(["train", "--data.root", root, "--task", "classification", "--print_config"]) == 0
    assert "\ntask: classification\n" in "\n" + capsys.readouterr().out


@pytest.mark.parametrize("options", [["--score-threshold", "0.3"], ["--score_threshold=0.3"]])
def test_options_with_hyphens_or_underscores(options, here):
    assert main(["predict", "crossformer_nano.cifar10", "photo.jpg", *options, "--save", "none"]) == 0


@pytest.mark.parametrize(
    "plain, long",
    [
        ("my_images --epochs 3", "--data.root my_images --trainer.max_epochs 3"),
        ("--batch_size=4 --lr 1e-3", "--data.batch_size 4 --model.lr 1e-3"),
        ("--data.batch-size 4 --config=x.yaml", "--data.batch_size 4 --config x.yaml"),
        ("--device cpu", "--trainer.accelerator cpu"),
        ("--device cuda:1", "--trainer.accelerator cuda --trainer.devices 1,"),
        ("--device 0", "--trainer.accelerator gpu --trainer.devices 0,"),
        ("--model.min_lr -1 -c x", "--model.min_lr -1 --config x"),
    ],
)
def test_plain_options_expand_to_dotted_options(plain, long, here):
    assert normalize(plain.split()) == long.split()


def test_output_must_not_alias_input(here):
    (here / "link.jpg").symlink_to("photo.jpg")
    (here / "twin.jpg").hardlink_to(here / "photo.jpg")
    for output in ("link.jpg", "twin.jpg", "my_images/../photo.jpg"):
        with pytest.raises(UserError, match=f"--output {output}: is an input of this command"):
            check_output("--output", output, None, "crossformer_nano.cifar10", "photo.jpg")
    check_output("--output", "new.jpg", "photo.jpg", "my_images")


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_predictor_path_is_rejected(source):
    with pytest.raises(UserError, match="the name is empty"):
        load_predictor(source)


def test_run_reports_initial_weights(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *SMALL, "--trainer.max_epochs", "1", "--run.dir", run]) == 0
    assert "weights: none, training from scratch" in capsys.readouterr().out
    bundled = [
        "--model.backbone",
        "crossformer_nano.cifar10",
        "--model.pretrained",
        "true",
        "--trainer.max_epochs",
        "1",
    ]
    assert main(["train", *SMALL, *bundled, "--run.dir", str(tmp_path / "two")]) == 0
    assert "weights: crossformer_nano.cifar10 (bundled)" in capsys.readouterr().out
    checkpoint = ["--model.checkpoint", f"{run}/best.ckpt", "--trainer.max_epochs", "1"]
    assert main(["train", *SMALL, *checkpoint, "--run.dir", str(tmp_path / "three")]) == 0
    assert f"weights: {run}/best.ckpt: " in capsys.readouterr().out
