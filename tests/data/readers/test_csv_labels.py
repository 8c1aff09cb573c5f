"""Tests for CSV files of images and classes."""

import pytest
from PIL import Image
from small_runs import CLASSIFICATION

from crossformer_vision import ClassificationData, UserError
from crossformer_vision.cli import main

TINY = [
    option
    for option in CLASSIFICATION
    if option not in ("--data.train_images", "--data.val_images", "64", "20")
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(12):
        Image.new("RGB", (20, 16), (20 * n, 0, 0)).save(tmp_path / f"images/{n}.png")
    return tmp_path


def write(root, rows, header="path,label", encoding="utf-8"):
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return str(root / "labels.csv")


def read(data, stage):
    """File name and class name of each image."""
    source = data.open(stage).source
    return {source.names[n].rpartition("/")[2]: data.classes[source.read(n)[1]] for n in range(len(source))}


def test_splits_and_classes(root):
    rows = [f"images/{n}.png,{'猫' if n % 2 else 'dog'},{'val' if n > 7 else 'train'},x" for n in range(12)]
    file = write(root, rows, "path,label,split,comment", encoding="utf-8-sig")
    data = ClassificationData(root=file, num_workers=0)
    assert data.num_classes == 2 and data.classes == ["dog", "猫"]
    assert read(data, "train") == {f"{n}.png": "猫" if n % 2 else "dog" for n in range(8)}
    assert read(data, "val") == {f"{n}.png": "猫" if n % 2 else "dog" for n in range(8, 12)}


def test_images_are_held_out_without_splits(root):
    data = ClassificationData(
        root=write(root, [f"images/{n}.png,{n % 3}" for n in range(12)]), val_share=0.25
    )
    assert data.num_classes == 3
    train, val = read(data, "train"), read(data, "val")
    assert sorted(val.values()) == ["0", "1", "2"] and len(train) == 9 and not train.keys() & val.keys()


def test_run_validates_and_resumes_with_the_same_images(root, capsys):
    file = write(root, [f"images/{n}.png,{n % 2}" for n in range(12)])
    run = root / "run"
    options = [*TINY, "--data.batch_size", "4", "--trainer.max_epochs", "1", "--run.dir", str(run)]
    assert main(["train", file, *options]) == 0
    assert "12 images" not in capsys.readouterr().err
    assert len((run / "val_list.txt").read_text().split()) == 2
    assert main(["validate", str(run)]) == 0
    assert "2 images; plots" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    "rows, header, message",
    [
        ([], "path,label", "labels.csv: lists no images"),
        (["images/1.png,a"], "file,label", "labels.csv: has no column 'path', but file, label"),
        (["images/1.png,a", "images/2.png,"], "path,label", "labels.csv: line 3 has no label"),
        (["images/1.png,a", "", "images/2.png,"], "path,label", "labels.csv: line 4 has no label"),
        (["images/1.png,a", ",b"], "path,label", "labels.csv: line 3 has no path"),
        (["images/1.png,a", "images/99.png,b"], "path,label", "line 3: images/99.png does not exist"),
        (["images/1.png,a", "../1.png,b"], "path,label", "line 3: ../1.png lies outside"),
        (
            ["images/1.png,a,train", "images/1.png,a,val"],
            "path,label,split",
            "line 3 repeats images/1.png of line 2",
        ),
        (["images/1.png,a,test"], "path,label,split", "column split has no 'train'"),
    ],
)
def test_invalid_files(rows, header, message, root):
    with pytest.raises(UserError, match=message):
        ClassificationData(root=write(root, rows, header)).open("train")


def test_missing_file(root):
    with pytest.raises(UserError, match="none.csv: no such file. --data.root needs a CSV file"):
        ClassificationData(root=str(root / "none.csv")).open("train")
