"""Tests for ``crossformer check``: each kind of fault is planted in a clean data set."""

import json
import re
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image
from spectral_images import write_classification as write_spectral

from crossformer_vision import UserError
from crossformer_vision.cli import main
from crossformer_vision.tools.data_check import check_data

RNG = np.random.default_rng(0)


def noise(path, size=(48, 40), seed=None, **options):
    """Write an image of coarse noise, which no other image resembles."""
    rng = np.random.default_rng(seed) if seed is not None else RNG
    small = Image.fromarray(rng.integers(0, 255, (10, 12, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.NEAREST).save(path, **options)


def folders(root):
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            for n in range(count):
                noise(root / split / name / f"{n}.png")


def csv_file(root):
    rows = []
    for n in range(12):
        noise(root / f"{n}.png")
        rows.append(f"{n}.png,{'cat' if n % 2 else 'dog'},{'val' if n > 9 else 'train'}")
    (root / "labels.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")


def yolo(root):
    for split in ("train", "val"):
        for n in range(6):
            noise(root / f"images/{split}/{n}.png")
            (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
            (root / f"labels/{split}/{n}.txt").write_text(
                f"{n % 2} 0.5 0.5 0.4 0.4\n{1 - n % 2} 0.3 0.3 0.2 0.2\n"
            )
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")


def coco(root):
    for split in ("train", "val"):
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        for n in range(6):
            noise(root / f"images/{split}/{n}.png")
            content["images"].append({"id": n, "file_name": f"{n}.png", "width": 48, "height": 40})
            for k in (1, 2):
                box = [5 * k, 6, 20, 18]
                entry = {
                    "id": 10 * n + k,
                    "image_id": n,
                    "category_id": k,
                    "bbox": box,
                    "area": 360,
                    "iscrowd": 0,
                }
                content["annotations"].append(entry)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def voc(root):
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for split in ("train", "val"):
        for n in range(6):
            name = f"{split}{n}"
            noise(root / f"JPEGImages/{name}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{kind}</name><bndbox><xmin>{x}</xmin><ymin>5</ymin><xmax>{x + 15}</xmax>"
                "<ymax>30</ymax></bndbox></object>"
                for kind, x in (("cat", 3), ("dog", 20))
            )
            size = "<size><width>48</width><height>40</height><depth>3</depth></size>"
            (root / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(f"{split}{n}" for n in range(6)))


def maps(root):
    for split in ("training", "validation"):
        for n in range(6):
            noise(root / f"images/{split}/{n}.png")
            (root / f"annotations/{split}").mkdir(parents=True, exist_ok=True)
            values = np.zeros((40, 48), np.uint8)
            values[10:30, 10:30] = 1
            Image.fromarray(values).save(root / f"annotations/{split}/{n}.png")
    (root / "classes.json").write_text(json.dumps(["soil", "field"]))


def write(path, text):
    return lambda root: (root / path).write_text(text)


def edit_json(change):
    def edit(root):
        path = root / "annotations/instances_train.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def replace(path, old, new):
    return lambda root: (root / path).write_text((root / path).read_text().replace(old, new))


def copy(source, target):
    def edit(root):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, root / target)

    return edit


def truncate(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:300])


def similar(root):
    pixels = np.asarray(Image.open(root / "train/cat/0.png")).astype(int)
    Image.fromarray((pixels + 3).clip(0, 255).astype(np.uint8)).save(root / "val/cat/near.png")


def rotated(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(root / "train/cat/9.jpg", exif=exif)


def class_map(path, values):
    return lambda root: Image.fromarray(values).save(root / path)


def remove(path):
    def edit(root):
        (root / path).unlink() if (root / path).is_file() else shutil.rmtree(root / path)

    return edit


def spectral(change):
    """A change of a data set of four-channel images."""

    def edit(root):
        shutil.rmtree(root)
        write_spectral(root, 6)
        change(root)

    return edit


def save_tiff(path, values):
    return lambda root: tifffile.imwrite(root / path, values, photometric="minisblack", planarconfig="contig")


FOUR = np.full((40, 48, 4), 9, np.uint16)
TRAIN_0 = "labels/train/0.txt"
FAULTS = [
    # writer, fault, severity, text
    (folders, lambda root: (root / "train/cow").mkdir(), "error", "a class folder without images"),
    (
        folders,
        lambda root: noise(root / "val/cow/0.png"),
        "error",
        "class 'cow' is not among the training classes",
    ),
    (folders, truncate("train/cat/0.png"), "error", "train/cat/0.png: cannot read this image"),
    (folders, write("train/dog/9.jpg", "text"), "error", "train/dog/9.jpg: cannot read this image"),
    (folders, write("train/dog/9.png", ""), "error", "train/dog/9.png: cannot read this image"),
    (folders, copy("train/cat/0.png", "train/dog/9.png"), "warning", "is equal to"),
    (folders, copy("train/cat/0.png", "val/cat/9.png"), "warning", "in another split"),
    (folders, similar, "warning", "looks like"),
    (folders, rotated, "warning", "has an EXIF orientation"),
    (
        folders,
        lambda root: Image.new("RGB", (40, 40)).save(root / "train/cat/9.png"),
        "warning",
        "have the value 0",
    ),
    (folders, lambda root: noise(root / "train/cat/9.png", (12, 12)), "warning", "has only 12x12 pixels"),
    (folders, lambda root: noise(root / "train/9.png"), "warning", "outside the class folders"),
    (folders, write("train/cat/notes.txt", "x"), "warning", "files that are not images"),
    (
        folders,
        lambda root: [shutil.rmtree(root / s / "dog") for s in ("train", "val")],
        "error",
        "has one class",
    ),
    (
        folders,
        lambda root: [(root / f"train/dog/{n}.png").unlink() for n in range(4)],
        "warning",
        "has 2 training",
    ),
    (folders, lambda root: shutil.rmtree(root / "val/dog"), "warning", "'dog' does not occur in validation"),
    (
        folders,
        lambda root: [noise(root / f"train/cat/x{n}.png") for n in range(160)],
        "warning",
        "--data.sampling",
    ),
    (folders, save_tiff("train/cat/9.tif", FOUR), "error", "has 4 channels of 16 bits, expected an RGB"),
    (
        folders,
        spectral(save_tiff("train/crop/9.tif", FOUR[..., :3])),
        "error",
        "has 3 channels of 16 bits, expected 4",
    ),
    (
        folders,
        spectral(save_tiff("val/crop/9.tif", FOUR.astype(np.uint8))),
        "error",
        "4 channels of 8 bits, expected",
    ),
    (
        folders,
        spectral(save_tiff("val/crop/9.tif", np.full((40, 48, 4), np.nan, np.float32))),
        "error",
        "another type, expected",
    ),
    (csv_file, write("labels.csv", "path,label\n"), "error", "lists no images"),
    (csv_file, write("labels.csv", "file,label\n0.png,a\n"), "error", "has no column 'path'"),
    (csv_file, replace("labels.csv", "1.png,cat,train", "0.png,cat,val"), "error", "in another split"),
    (csv_file, replace("labels.csv", "1.png,cat", "99.png,cat"), "error", "99.png does not exist"),
    (csv_file, replace("labels.csv", "1.png,cat", "1.png,"), "error", "line 3 has no label"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 0.4\n"), "error", "train/0.txt: row 1 has 4 numbers"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 0.4 0.4\n0 .1 .1 .2 .2 .3 .3\n"), "error", "row 2 has 7 numbers"),
    (yolo, write(TRAIN_0, "7 0.5 0.5 0.4 0.4\n"), "error", "has class 7"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 0.4 1.7\n"), "error", "has the coordinate 1.7"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 nan 0.4\n"), "error", "has the coordinate nan"),
    (yolo, write(TRAIN_0, "0 a b c d\n"), "error", "must contain only numbers"),
    (yolo, remove(TRAIN_0), "warning", "1 image without a label file"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 0.02 0.4\n"), "warning", "has objects of less than 4 pixels"),
    (yolo, write(TRAIN_0, "0 0.5 0.5 0.4 0.4\n" * 2), "warning", "has two equal objects"),
    (yolo, write("data.yaml", "train: images/train\nval: images/val\n"), "error", "data.yaml"),
    (coco, edit_json(lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4])), "warning", "without area"),
    (coco, edit_json(lambda c: c["annotations"][0].update(category_id=9)), "error", "of category 9"),
    (coco, edit_json(lambda c: c["annotations"][0].update(image_id=99)), "error", "refers to image 99"),
    (coco, edit_json(lambda c: c["images"][0].update(id=1)), "error", "two entries have the image id 1"),
    (coco, edit_json(lambda c: c["images"][0].update(file_name="99.png")), "error", "99.png is not in"),
    (coco, edit_json(lambda c: c["images"][0].update(width=99)), "error", "but 99x40 in"),
    (
        coco,
        edit_json(lambda c: c["annotations"][0].update(bbox=[90, 90, 5, 5])),
        "warning",
        "outside the image",
    ),
    (coco, write("annotations/instances_train.json", "{"), "error", "instances_train.json"),
    (voc, write("Annotations/train0.xml", "<annotation>"), "error", "train0.xml"),
    (voc, replace("Annotations/train0.xml", "<xmax>18</xmax>", "<xmax>x</xmax>"), "error", "train0.xml"),
    (voc, remove("JPEGImages/train0.jpg"), "error", "train0"),
    (voc, replace("Annotations/val0.xml", "dog", "cow"), "error", "is of class 'cow'"),
    (
        maps,
        class_map("annotations/training/0.png", np.zeros((20, 48), np.uint8)),
        "error",
        "has 48x20 pixels",
    ),
    (
        maps,
        class_map("annotations/training/0.png", np.full((40, 48), 9, np.uint8)),
        "error",
        "has the value 9",
    ),
    (
        maps,
        class_map("annotations/training/0.png", np.zeros((40, 48, 3), np.uint8)),
        "error",
        "one class index",
    ),
    (
        maps,
        class_map("annotations/training/0.png", np.full((40, 48), 255, np.uint8)),
        "warning",
        "are ignored",
    ),
    (maps, remove("annotations/training/0.png"), "error", "has no class map"),
    (maps, remove("classes.json"), "error", "classes.json"),
]


@pytest.mark.parametrize("writer", [folders, csv_file, yolo, coco, voc, maps])
def test_clean_data_have_no_findings(writer, tmp_path, capsys, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    writer(root)
    monkeypatch.chdir(tmp_path)
    path = root / "labels.csv" if writer is csv_file else root
    assert main(["check", str(path)]) == 0
    assert "no problems found" in capsys.readouterr().out
    page = (tmp_path / "check/index.html").read_text()
    pictures = re.findall(r'src="(\w+\.png)"', page)
    assert pictures == ["train.png", "val.png"] and "No problems found" in page
    assert all(Image.open(tmp_path / "check" / name).width > 500 for name in pictures)


@pytest.mark.parametrize(("writer", "fault", "severity", "text"), FAULTS, ids=[case[3] for case in FAULTS])
def test_planted_faults_are_found(writer, fault, severity, text, tmp_path):
    writer(tmp_path)
    fault(tmp_path)
    root = tmp_path / "labels.csv" if writer is csv_file else tmp_path
    task = {yolo: "detection", maps: "segmentation"}.get(writer)
    result = check_data(str(root), task)
    matching = [finding for finding in result.findings if text in finding.text]
    assert [finding.severity for finding in matching][:1] == [severity], [str(f) for f in result.findings]
    assert result.has_errors == (severity == "error")


def test_all_label_faults_are_counted_by_kind(tmp_path, capsys):
    yolo(tmp_path / "data")
    for n in range(3):
        (tmp_path / f"data/labels/train/{n}.txt").write_text("0 0.5 0.5 0.4\n9 0.5 0.5 0.4 0.4\n")
    assert main(["check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "row 1 has 4 numbers" in out and "row 2 has class 9" in out and out.count("(3 in all)") == 2


def test_data_without_a_training_split_can_be_validated(tmp_path):
    folders(tmp_path)
    shutil.rmtree(tmp_path / "train")
    (finding,) = check_data(str(tmp_path)).findings
    assert finding.severity == "warning" and "not trained on" in finding.text
    shutil.rmtree(tmp_path / "val")
    assert check_data(str(tmp_path)).has_errors


def test_output_is_never_written_into_the_data(tmp_path, capsys):
    folders(tmp_path)
    assert main(["check", str(tmp_path), "--output", str(tmp_path / "train/report")]) == 1
    assert "lies inside the data" in capsys.readouterr().err and not (tmp_path / "train/report").exists()
    with pytest.raises(UserError, match="no such folder or file"):
        check_data(str(tmp_path / "nothing"))
