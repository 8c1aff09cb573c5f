"""Tests for archives, class lists and directory layouts: accepted variants and messages for others."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from crossformer_vision import ClassificationData, SegmentationData, UserError
from crossformer_vision.data.class_lists import IGNORED, UNKNOWN, read_classes


def png(value=0, size=(20, 16)):
    content = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(content, "png")
    return content.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def labels(data, stage="train"):
    source = data.open(stage).source
    return [
        (source.read(n)[0].getpixel((0, 0))[0], source.classes[source.read(n)[1]]) for n in range(len(source))
    ]


def test_tar_class_is_the_top_level_folder(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for value, name in enumerate(("dog/day", "dog/night", "cat/day", "./cat/night")):
                add(tar, f"{name}/x.png", png(value))
            add(tar, "cat/._x.png", b"\0\5\26\7")  # macOS metadata
            add(tar, "__MACOSX/cat/x.png", png())
            add(tar, "readme.txt", b"text")
    data = ClassificationData(root=str(tmp_path), num_workers=0)
    assert data.num_classes == 2 and data.classes == ["cat", "dog"]
    assert labels(data) == [(0, "dog"), (1, "dog"), (2, "cat"), (3, "cat")]


def test_nested_tar_files_are_classes_as_in_imagenet(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for value, name in enumerate(("n02", "n01")):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as images:
                    add(images, f"{name}_1.png", png(10 + value))
                    add(images, f"{name}_2.png", png(20 + value))
                add(tar, f"{name}.tar", inner.getvalue())
    data = ClassificationData(root=str(tmp_path), num_workers=0)
    assert data.num_classes == 2
    assert labels(data) == [(10, "n02"), (20, "n02"), (11, "n01"), (21, "n01")]


def test_workers_read_tar_file_opened_in_main_process(tmp_path):
    for split, n in (("train", 2), ("val", 40)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for k in range(2 * n):
                add(tar, f"{'ab'[k % 2]}/{k}.png", png(k))

    def read(workers):
        data = ClassificationData(root=str(tmp_path), num_workers=workers, image_size=32, batch_size=8)
        data.open("val").source.read(0)[0].load()
        return torch.cat([images for images, _ in data.val_dataloader()])

    assert torch.equal(read(3), read(0))


@pytest.mark.parametrize("content", [b"no tar file", b""])
def test_damaged_tar_files_are_named_in_error(content, tmp_path):
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match="train.tar: "):
        assert ClassificationData(root=str(tmp_path)).num_classes


def test_shard_keys_may_contain_dots(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for n, key in enumerate(("a", "b.v2", "c.2024.01", "d")):
                add(tar, f"{key}.png", png(n))
                add(tar, f"{key}.cls", str(n % 2).encode())
                if key == "d":
                    add(tar, "d.seg.png", png(99))  # not an input image
    data = ClassificationData(root=str(tmp_path), num_workers=0)
    assert data.num_classes == 2
    assert labels(data) == [(0, "0"), (1, "1"), (2, "0"), (3, "1")]


def test_images_beside_class_folders_are_reported(tmp_path, caplog):
    for split in ("train", "val"):
        for name in ("a/0.png", "b/0.png", "1.png", "2.png"):
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_bytes(png())
    assert ClassificationData(root=str(tmp_path), num_workers=0).num_classes == 2
    assert "train: skipped 2 images outside the class folders, such as 1.png" in caplog.text


@pytest.mark.parametrize(
    "classes",
    [
        ["bg", "fg"],
        {"fg": 1, "bg": 0},
        {"1": "fg", "0": "bg"},
        [{"id": 1, "name": "fg"}, {"id": 0, "name": "bg"}],
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_list_formats_and_encodings(classes, encoding, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes}), encoding=encoding)
    found = read_classes(tmp_path)
    assert found.names == ["bg", "fg"] and found.values[:3].tolist() == [0, 1, UNKNOWN]
    assert found.values[255] == IGNORED and not found.has_ignore_index


def test_class_values_with_gaps_and_ignored_class(tmp_path):
    content = {"classes": {"void": 0, "road": 7, "car": 26}, "ignore_index": 0}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    found = read_classes(tmp_path)
    assert found.names == ["road", "car"] and found.has_ignore_index
    assert found.values[[0, 7, 26, 8, 255]].tolist() == [IGNORED, 0, 1, UNKNOWN, IGNORED]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"classes": ["a", "b"], "ignored": 0},
            "unknown key 'ignored'. Valid keys: classes, first_index, ignore_index",
        ),
        ({"classes": {"a": 0, "b": 0}}, "two classes have the same value"),
        ({"classes": {"a": 0.5, "b": 1}}, "0.5 is not a whole number"),
        ({"classes": {"a": 0, "b": 300}}, "values of classes are from 0 to 253"),
        (
            {"classes": ["a", "b"], "ignore_index": 1},
            "lists 1 class without the ignored one; two or more are needed",
        ),
        ({"classes": "a, b"}, "not a list of classes like"),
    ],
)
def test_invalid_class_lists_are_rejected(content, message, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path)


@pytest.mark.parametrize("year", ["2007", "2012"])
def test_pascal_voc_2007_and_2012(year, tmp_path):
    base = tmp_path / f"VOCdevkit/VOC{year}"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (64, 48)).save(base / f"JPEGImages/{split}.jpg")
        Image.fromarray(np.full((48, 64), 15, np.uint8)).save(base / f"SegmentationClass/{split}.png")
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}\n")
    data = SegmentationData(root=str(tmp_path), num_workers=0)
    assert data.num_classes == 21 and len(data.open("val")) == 1
    (base / "SegmentationClass/val.png").unlink()
    with pytest.raises(UserError, match="val.png: no such file, which .*val.txt names"):
        SegmentationData(root=str(tmp_path), classes=data.classes).open("val")


def test_checkpoint_selection_on_test_images_is_reported(tmp_path, caplog):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png())
    data = ClassificationData(root=str(tmp_path), num_workers=0)
    assert data.num_classes == 2 and data.open("val") and data.found_splits["val"] == tmp_path / "test"
    assert "best.ckpt is selected on the test images" in caplog.text


@pytest.mark.parametrize("low, high", [(-2.1, 2.6), (0.0, 255.0)])
def test_normalizing_augmentation_is_rejected(low, high, tmp_path):
    def steps(image):
        return torch.linspace(low, high, 3 * 32 * 32).view(3, 32, 32)

    data = ClassificationData(num_workers=0, image_size=32, augmentation=steps)
    with pytest.raises(UserError, match="without normalization, which comes afterwards"):
        data.open("train")[0]
