"""Tests for WebDataset shards: coverage and order across workers and processes, and damaged shards."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from crossformer_vision import ClassificationData, UserError
from crossformer_vision.cli import main
from crossformer_vision.data.readers.shards import ShardImages


def shard(path, first, count, classes=3, kind="cls", extension="jpg"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:

        def add(name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for n in range(first, first + count):
            pixels = np.full((36, 40, 3), n % 250, np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG")
            label = str(n % classes) if kind == "cls" else json.dumps({"label": n % classes, "width": 40})
            add(f"{n:06d}.{kind}", label.encode())  # labels may precede or follow the image
            add(f"{n:06d}.{extension}", stream.getvalue())
            add(f"{n:06d}.txt", b"a caption")
    return path


def shards(root):
    for n in range(3):
        shard(root / f"train/{n:04d}.tar", 10 * n, 10)
    shard(root / "val/0000.tar", 30, 7)
    return root


def data(root, **keywords):
    return ClassificationData(root=str(root), image_size=32, batch_size=4, num_workers=0, **keywords)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_each_image_is_read_once(tmp_path, world, workers):
    module = data(shards(tmp_path))
    assert module.num_classes == 3 and module.classes == ["0", "1", "2"]
    module.num_workers = workers
    seen = {"train": [], "val": []}
    for rank in range(world):
        for stage, kept in seen.items():
            loader = module.create_loader(stage, batch_size=2)
            loader.batches.rank, loader.batches.world = rank, world
            for batch in loader:
                if batch is not None:
                    kept += batch[1].tolist()
            loader.close()
    assert sorted(seen["val"]) == sorted(n % 3 for n in range(30, 37))
    whole = 30 // (2 * world) * 2 * world  # training drops the last incomplete batch
    assert len(seen["train"]) == whole


def test_images_and_sample_names_are_read(tmp_path):
    source = ShardImages([shard(tmp_path / "a-train-0.tar", 0, 5), shard(tmp_path / "b.tar", 5, 5)], [])
    assert len(source) == 10 and source.name(7) == f"{tmp_path / 'b.tar'}/000007.jpg"
    for n in range(10):
        image, label = source.read(n)
        assert label == n % 3 and abs(int(np.asarray(image)[0, 0, 0]) - n) < 3
    by_json = ShardImages([shard(tmp_path / "c.tar", 0, 4, kind="json")], ["x", "y", "z"])
    assert by_json.labels.tolist() == [0, 1, 2, 0] and by_json.classes == ["x", "y", "z"]


def test_training_run_on_shards(tmp_path, monkeypatch):
    """Numbered shards in one directory, with class names."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("train-0000", 0), ("train-0001", 10), ("val-0000", 20)):
        shard(tmp_path / f"data/pets-{name}.tar", first, 10)
    options = ["--data.root", "data", "--data.classes", "[cat,dog,owl]", "--data.image_size", "32"]
    options += ["--data.batch_size", "4", "--data.num_workers", "1", "--trainer.max_epochs", "1"]
    options += ["--model.model_args", '{"depths":[1,1,1,1]}', "--model.pretrained", "false"]
    assert main(["train", *options, "--trainer.accelerator", "cpu", "--run.dir", "run"]) == 0
    best = torch.load("run/best.ckpt", weights_only=True)
    assert best["classes"] == ["cat", "dog", "owl"]


def test_damaged_shards_are_rejected(tmp_path):
    good = shard(tmp_path / "good.tar", 0, 4).read_bytes()
    for cut, name in ((3000, "middle"), (len(good.rstrip(b"\0")), "end"), (0, "empty")):
        (tmp_path / f"{name}.tar").write_bytes(good[:cut])
        with pytest.raises(UserError, match=rf"{name}.tar: cannot be read as a shard .*. Download it again"):
            ShardImages([tmp_path / f"{name}.tar"], [])
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with pytest.raises(UserError, match="text.tar: cannot be read as a shard"):
        ShardImages([tmp_path / "text.tar"], [])
    with pytest.raises(UserError, match=r"000000.jpg: has no class file 000000.cls"):
        ShardImages([shard(tmp_path / "unlabelled.tar", 0, 2, kind="other")], [])
    with pytest.raises(UserError, match="000002.jpg: class 2 is not among the 2 classes"):
        ShardImages([shard(tmp_path / "three.tar", 0, 4)], ["a", "b"])
    with pytest.raises(UserError, match="none.tar: no images in this shard"):
        ShardImages([shard(tmp_path / "none.tar", 0, 2, extension="mp4")], [])


def members(path, *named):
    with tarfile.open(path, "w") as tar:
        for name, content in named:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_unrelated_shard_members_are_ignored(tmp_path):
    """Covers several images per sample, nested directories, operating system metadata and long names."""
    photo = io.BytesIO()
    Image.new("RGB", (40, 36), (200, 0, 0)).save(photo, "PNG")
    red, long = photo.getvalue(), "x" * 150
    path = members(
        tmp_path / "train-0.tar",
        *(("._0.png", b"?"), ("0.png", red), ("._0.cls", b"?"), ("0.seg.png", b"mask"), ("0.CLS", b"1\n")),
        *((f"./a.b/{long}.png", red), (f"./a.b/{long}.json", b'{"label": 0}')),
    )
    (tmp_path / "._train-0.tar").write_bytes(b"?")
    source = ShardImages([path], [])
    assert source.labels.tolist() == [1, 0] and source.name(1).endswith(f"a.b/{long}.png")
    assert source.read(0)[0].getpixel((0, 0)) == (200, 0, 0)
    for wrong in (b"cat", b"1.7", b"99999999999", b"-1", b""):
        with pytest.raises(UserError, match=r"wrong.tar/0.cls: its class is .*, not a whole number"):
            ShardImages([members(tmp_path / "wrong.tar", ("0.png", red), ("0.cls", wrong))], [])
    with pytest.raises(UserError, match=r"wrong.tar/0.json: its class is"):
        ShardImages([members(tmp_path / "wrong.tar", ("0.png", red), ("0.json", b'{"label": [1]}'))], [])
    damaged = bytearray(shard(tmp_path / "damaged.tar", 0, 6).read_bytes())
    third = damaged.index(b"000003.cls")
    damaged[third : third + 4] = b"\xff\xfe\xfd\xfc"  # invalidates the header checksum
    (tmp_path / "damaged.tar").write_bytes(damaged)
    with pytest.raises(
        UserError, match="damaged.tar: cannot be read as a shard .it is truncated or damaged.. Download"
    ):
        ShardImages([tmp_path / "damaged.tar"], [])


def test_missing_shards_raise_error(tmp_path):
    shard(tmp_path / "data/train/0.tar", 0, 5)
    with pytest.raises(UserError, match="data/val: no such folder or tar file"):
        data(tmp_path / "data").val_dataloader()
    with pytest.raises(UserError, match="http://x/y: only local folders can be read"):
        assert data("http://x/y").num_classes
    with pytest.raises(UserError, match="pass the folder of WebDataset shards as --data.root"):
        assert data(tmp_path, dataset="wds/x").num_classes
