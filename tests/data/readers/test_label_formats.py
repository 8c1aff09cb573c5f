"""Tests for labels in YOLO's and Pascal VOC's format: the same objects as in COCO's, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from label_formats import NAMES, SPLITS, WRITERS, save, write_coco, write_yolo
from PIL import Image
from small_runs import DETECTION

from crossformer_vision import DetectionData, UserError
from crossformer_vision.cli import main


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_same_objects_in_every_format(detector, tmp_path):
    targets = {}
    formats = {"retinanet": ("coco", "yolo", "voc"), "mask_rcnn": ("coco", "yolo")}[detector]
    for name in formats:
        (tmp_path / name).mkdir()
        options = {"polygons": True} if (name, detector) == ("yolo", "mask_rcnn") else {}
        WRITERS[name](tmp_path / name, **options)
        data = DetectionData(str(tmp_path / name), detector=detector, min_size=64, max_size=64, num_workers=0)
        assert data.num_classes == 10 and data.classes == NAMES
        targets[name] = [data.open("val")[n][1] for n in range(SPLITS["val"])]
        assert len(data.open("train")) == SPLITS["train"]
    for name in formats[1:]:
        for expected, found in zip(targets["coco"], targets[name], strict=True):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_same_run_in_every_format(tmp_path, capsys):
    results = {}
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        run = tmp_path / f"run_{name}"
        options = [*DETECTION, "--trainer.max_epochs", "1", "--run.dir", str(run)]
        assert main(["train", *options[2:], "--data.root", str(tmp_path / name)]) == 0  # without --task
        said = capsys.readouterr().out
        assert f"({ {'coco': 'COCO', 'yolo': 'YOLO', 'voc': 'Pascal VOC'}[name] } labels)" in said
        results[name] = json.loads((run / "results.json").read_text())
    for key in ("val_box_ap", "val_box_ap50", "val_box_recall"):
        for name in ("yolo", "voc"):
            assert results[name][key] == pytest.approx(results["coco"][key], abs=1e-6), (name, key)
    rows = {name: (tmp_path / f"run_{name}/metrics.csv").read_text().splitlines()[1] for name in WRITERS}
    losses = {name: float(row.split(",")[4]) for name, row in rows.items()}
    assert losses["yolo"] == pytest.approx(losses["coco"], rel=1e-4)


@pytest.mark.parametrize(
    "data_yaml",
    [
        "names: [cat, dog]\ntrain: ../train/images\nval: ../valid/images\n",  # Roboflow
        "names: [cat, dog]\nnc: 2\n",
        "path: sub\nnames: {0: cat, 1: dog}\ntrain: train.txt\nval: [valid/images]\n",
    ],
)
def test_yolo_layouts(data_yaml, tmp_path):
    root = tmp_path / "sub" if "path: sub" in data_yaml else tmp_path
    for split in ("train", "valid"):
        save(Image.new("RGB", (40, 20)), root / f"{split}/images/1.png")
        save(Image.new("RGB", (40, 20)), root / f"{split}/images/empty.png")
        (root / f"{split}/labels").mkdir()
        (root / f"{split}/labels/1.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (root / "train.txt").write_text("./train/images/1.png\n\n")
    (tmp_path / "data.yaml").write_text(data_yaml)
    for given in (tmp_path, tmp_path / "data.yaml"):
        data = DetectionData(str(given), min_size=32, max_size=64, num_workers=0)
        assert data.num_classes == 2
        assert len(data.open("train")) == (1 if "train.txt" in data_yaml else 2)
        _, target = data.open("val")[0]
        assert target["boxes"].tolist() == [[15, 5, 25, 15]] and target["labels"].tolist() == [2]
        assert len(data.open("val")[1][1]["boxes"]) == 0


@pytest.mark.parametrize(
    "row, message",
    [
        ("0 0.5 0.5 0.2", "1.txt: row 2 has 4 numbers. A box has 5"),
        ("0 0.5 0.5 0.2 0.2 0.1 0.1", "1.txt: row 2 has 7 numbers, but its split has no polygon"),
        ("0 0.5 0.5 0.2 0.2 0.1 0.1 0.3", "1.txt: row 2 has 8 numbers. A box has 5"),
        ("7 0.5 0.5 0.2 0.2", r"1.txt: row 2 has class 7. data.yaml has the classes 0 to 1"),
        ("0.5 0.5 0.5 0.2 0.2", "1.txt: row 2 has class 0.5"),
        ("0 320 240 20 20", "1.txt: row 2 has the coordinate 320. Coordinates must be from 0 to 1"),
        ("0 nan 0.5 0.2 0.2", "1.txt: row 2 has the coordinate nan"),
        ("cat 0.5 0.5 0.2 0.2", "1.txt: row 2 must contain only numbers: 'cat 0.5"),
    ],
)
def test_invalid_yolo_rows(row, message, tmp_path):
    save(Image.new("RGB", (40, 20)), tmp_path / "images/train/1.png")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/1.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{row}\n")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    with pytest.raises(UserError, match=message):
        DetectionData(str(tmp_path)).open("train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("train: images/train", "data.yaml: has no class names"),
        ("names: {0: cat, 2: dog}", "names must have the indices 0 to 1 without gaps"),
        ("names: [cat, cat]", "data.yaml: two classes have the name 'cat'"),
        ("names: [cat, dog]\ntrain: nowhere", "data.yaml: nowhere not found in"),
        ("names: [cat, dog]\ntrain: labels", "split 'train' has no images in labels"),
        ("names: [cat", "data.yaml: cannot be read"),
        ("names: [cat, dog]", "none of 1 image has a label file. For example, .*1.txt is missing"),
        ("names: {0: cat, 1: '', 2: dog}", "data.yaml: a class has no name"),
        ("names: [cat, dog]\nkpt_shape: [17, 3]", "keypoint labels"),
    ],
)
def test_invalid_yolo_data_sets(content, message, tmp_path):
    save(Image.new("RGB", (40, 20)), tmp_path / "images/train/1.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        DetectionData(str(tmp_path)).open("train")


def voc_object(name="cat", box=(5, 5, 20, 15), more=""):
    values = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
    return f"<object><name>{name}</name>{more}<bndbox>{values}</bndbox></object>"


def write_voc_file(root: Path, *objects, split="train"):
    save(Image.new("RGB", (40, 20)), root / f"{split}/1.png")
    (root / f"{split}/1.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    return root


def test_voc_files_beside_images(tmp_path):
    """Roboflow's layout; classes are sorted by name, sizes come from the images, difficult objects are crowds."""
    write_voc_file(tmp_path, voc_object("zebra"), voc_object("ant", (1, 1, 40, 20)))
    write_voc_file(
        tmp_path, voc_object("ant"), voc_object("ant", more="<difficult>1</difficult>"), split="valid"
    )
    data = DetectionData(str(tmp_path), min_size=20, max_size=40, num_workers=0, hflip=0)
    assert data.num_classes == 2 and data.classes == ["ant", "zebra"]
    image, target = data.open("train").source.read(0)
    assert target["boxes"].tolist() == [[4, 4, 20, 15], [0, 0, 40, 20]] and target["labels"].tolist() == [
        2,
        1,
    ]
    assert data.open("val").source.read(0)[1]["iscrowd"].tolist() == [0, 1]
    assert np.asarray(image).shape == (20, 40, 3)


@pytest.mark.parametrize(
    "objects, message",
    [
        (["<object></object>"], "1.xml: object 1 has no name"),
        (
            [voc_object(), voc_object(box=(1, 2, 3))],
            "1.xml: object 2 has no bndbox with xmin, ymin, xmax, ymax",
        ),
        ([voc_object(box=(1, 2, 3, "inf"))], "1.xml: object 1 has a box with a value that is not finite"),
        (["<object>"], "1.xml: cannot be read as XML"),
        ([], "has no annotations to train on"),
        ([voc_object(box=(100, 100, 120, 120))], "no object of 1 can be trained on"),
    ],
)
def test_invalid_voc_files(objects, message, tmp_path):
    with pytest.raises(UserError, match=message):
        DetectionData(str(write_voc_file(tmp_path, *objects))).open("train")


def test_voc_objects_outside_classes_and_missing_files(tmp_path):
    write_voc_file(tmp_path, voc_object("dog"))
    (tmp_path / "classes.json").write_text('["cat", "cow"]')
    with pytest.raises(
        UserError, match="1.xml: object 1 is of class 'dog', which is not among the classes cat, cow"
    ):
        DetectionData(str(tmp_path)).open("train")
    (tmp_path / "train/1.png").unlink()
    with pytest.raises(UserError, match=r"1\.jpg: no such image"):
        DetectionData(str(tmp_path)).open("train")
    with pytest.raises(UserError, match="Pascal VOC labels have no masks"):
        DetectionData(str(tmp_path), detector="mask_rcnn").open("train")


def test_messages_name_the_file_with_the_labels(tmp_path):
    """The XML file of an image, and not the list of its split; unreadable images are not the labels' fault."""
    size = "<size><width>99</width><height>20</height></size>"
    write_voc_file(tmp_path, size, voc_object())
    with pytest.raises(UserError, match=r"1\.png: is 40x20 .* but 99x20 in .*1\.xml"):
        DetectionData(str(tmp_path)).open("train").source.read(0)
    write_voc_file(tmp_path, voc_object(more="<difficult>1</difficult>"))
    with pytest.raises(UserError, match=r"all objects \(1\) are difficult objects"):
        DetectionData(str(tmp_path)).open("train")
    write_voc_file(tmp_path, voc_object())
    (tmp_path / "train/1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"1\.png: cannot read this image"):
        DetectionData(str(tmp_path)).open("train")[0]


def test_data_without_object_labels(tmp_path):
    save(Image.new("RGB", (40, 20)), tmp_path / "train/cat/1.png")
    with pytest.raises(UserError, match="has no labels in the format of COCO, YOLO or Pascal VOC"):
        DetectionData(str(tmp_path)).open("train")


def test_replaced_image_ids_are_unique(tmp_path):
    """Ids that are not integers are replaced, together with all others."""
    write_coco(tmp_path)
    file = tmp_path / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    for entry in [*content["images"], *content["annotations"]]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = {0: "1", 1: "2a"}.get(entry[key], entry[key] + 10)
    file.write_text(json.dumps(content))
    source = DetectionData(str(tmp_path)).open("val").source
    assert len(set(source.ids.tolist())) == len(source) == SPLITS["val"]


def test_format_option_overrides_detection(tmp_path):
    write_yolo(tmp_path)
    write_coco(tmp_path)
    assert type(DetectionData(str(tmp_path)).open("train").source).__name__ == "CocoImages"
    assert type(DetectionData(str(tmp_path), format="yolo").open("train").source).__name__ == "YoloImages"
    with pytest.raises(UserError, match="format='yoloo': must be one of .*Did you mean 'yolo'"):
        DetectionData(str(tmp_path), format="yoloo")
