"""Tests for classification data: supported directory layouts and errors for invalid ones."""

import pickle
import tarfile

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from crossformer_vision import UserError
from crossformer_vision.data.classification import ClassificationData


def image(path, seed=0, size=(40, 36), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def tree(root, val="val", nested="", classes=("ant", "bee"), count=4):
    for split in ("train", val):
        for c, name in enumerate(classes):
            for i in range(count):
                image(root / split / name / nested / f"{i}.jpg", seed=10 * c + i)
    return root


def data(root, **kwargs):
    return ClassificationData(root=str(root), batch_size=4, num_workers=0, **kwargs)


@pytest.mark.parametrize("val", ["val", "validation", "test"])
@pytest.mark.parametrize("nested", ["", "images"])
def test_folder_layouts(tmp_path, val, nested):
    module = data(tree(tmp_path, val, nested))
    assert module.num_classes == 2 and module.classes == ["ant", "bee"]
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape == (4, 3, 64, 64) and labels.tolist() == [0, 0, 0, 0]
    assert (
        sorted(label for batch in module.train_dataloader() for label in batch[1].tolist())
        == [0] * 4 + [1] * 4
    )


def test_all_image_formats_and_symlinked_folders(tmp_path, caplog):
    tree(tmp_path / "data")
    for n, extension in enumerate(("webp", "bmp", "tif", "TIFF", "ppm", "gif", "avif")):
        image(tmp_path / f"data/train/ant/more.{extension}", seed=n)
    for i in range(3):
        image(tmp_path / f"extra/{i}.png", seed=i)
    (tmp_path / "data/train/bee/more").symlink_to(tmp_path / "extra")
    (tmp_path / "data/train/bee/loop").symlink_to(tmp_path / "data/train")
    (tmp_path / "data/train/bee/notes.txt").write_text("x")
    # metadata files of other tools are neither classes nor images
    image(tmp_path / "data/train/.ipynb_checkpoints/0.jpg")
    image(tmp_path / "data/train/ant/.ipynb_checkpoints/0.jpg")
    image(tmp_path / "data/train/__MACOSX/ant/0.jpg")
    image(tmp_path / "data/train/ant/hidden.jpg")
    (tmp_path / "data/train/ant/hidden.jpg").rename(tmp_path / "data/train/ant/._0.jpg")
    module = data(tmp_path / "data")
    assert module.num_classes == 2 and module.classes == ["ant", "bee"]
    source = module.images["train"].source
    samples = [(source.name(n), source.labels[n]) for n in range(len(source))]
    assert sum(label == 0 for _, label in samples) == 4 + 7
    assert sum(label == 1 and "loop" not in path for path, label in samples) == 4 + 3
    assert len(samples) == 18 and "1 files that are not images" in caplog.text
    for n in range(len(samples)):
        module.images["train"][n]


def test_invalid_class_folders_are_rejected(tmp_path):
    tree(tmp_path / "one", classes=("only",))
    with pytest.raises(UserError, match="one: has one class, 'only'; a classifier needs two or more"):
        assert data(tmp_path / "one").num_classes
    tree(tmp_path / "empty")
    (tmp_path / "empty/train/cat").mkdir()
    with pytest.raises(UserError, match=r"empty/train/cat: a class folder without images. Add images"):
        assert data(tmp_path / "empty").num_classes
    tree(tmp_path / "links")
    (tmp_path / "links/train/ant/x.png").symlink_to("/nowhere/x.png")
    module = data(tmp_path / "links")
    assert module.num_classes == 2 and len(module.images["train"]) == 9
    with pytest.raises(UserError, match=r"x.png: cannot read this image .no such file."):
        module.images["train"][4]


def test_unreadable_images_are_skipped_in_validation(tmp_path):
    """Training substitutes a neighboring image; validation does not count any image twice."""
    tree(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "ant/0.jpg").write_bytes(b"broken")
    module = data(tmp_path, skip_corrupt=True)
    assert module.num_classes == 2
    seen = [x.numpy().tobytes() for batch, _ in module.val_dataloader() for x in batch]
    assert len(seen) == len(set(seen)) == 7
    assert sum(len(batch) for batch, _ in module.train_dataloader()) == 8 and module.skipped == 2


def test_tar_archives(tmp_path):
    tree(tmp_path / "tree")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("ant", "bee"):
                tar.add(tmp_path / "tree" / split / name, name)
    folder, tar = data(tmp_path / "tree"), data(tmp_path)
    assert tar.num_classes == folder.num_classes
    for a, b in zip(folder.val_dataloader(), tar.val_dataloader(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_torchvision_dataset_by_name(tmp_path):
    """Uses the CIFAR-10 file format with synthetic images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    from torchvision.datasets import CIFAR10

    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    CIFAR10._check_integrity, check = lambda self: True, CIFAR10._check_integrity
    meta = CIFAR10.meta
    CIFAR10.meta = {**meta, "md5": None}
    try:
        module = data(tmp_path, dataset="torch/cifar10")
        assert module.num_classes == 10 and module.classes[3] == "class 3"
        assert len(module.images["train"]) == 20 and len(module.images["val"]) == 4
        assert next(iter(module.val_dataloader()))[1].tolist() == [0, 1, 2, 9]
    finally:
        CIFAR10._check_integrity, CIFAR10.meta = check, meta


def test_default_dataset_is_digits():
    module = ClassificationData(train_images=40, val_images=10, batch_size=10, num_workers=0)
    assert module.num_classes == 10 and len(module.train_dataloader()) == 4


def test_augmentation_changes_per_epoch_only_in_training(tmp_path):
    module = data(tree(tmp_path), auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    assert module.num_classes == 2
    train, val = module.images["train"], module.images["val"]
    assert not torch.equal(train[0][0], train[0][0])
    assert torch.equal(val[0][0], val[0][0])
    for crop in ("padded", "none"):
        module = data(tmp_path, crop=crop, hflip=0.0)
        assert module.num_classes == 2
        again = torch.equal(module.images["train"][0][0], module.images["train"][0][0])
        assert again == (crop == "none")


def test_all_image_modes_are_converted_to_rgb(tmp_path):
    tree(tmp_path)
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")):
        path = tmp_path / "train" / "ant" / f"{mode.replace(';', '')}.{suffix}"
        image(path, mode=mode)
    for images, _ in data(tmp_path).train_dataloader():
        assert images.shape[1:] == (3, 64, 64)


def test_corrupt_and_truncated_images_are_reported(tmp_path):
    tree(tmp_path)
    whole = (tmp_path / "train/ant/0.jpg").read_bytes()
    (tmp_path / "train/ant/1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/bee/2.jpg").write_bytes(b"not an image")
    for workers in (0, 2):
        module = data(tmp_path)
        module.num_workers = workers
        with pytest.raises(UserError, match=r"train/(ant/1|bee/2)\.jpg: cannot read this image \(") as error:
            list(module.train_dataloader())
        assert "\n" not in str(error.value) and "--data.skip_corrupt" in str(error.value)
        module = data(tmp_path, skip_corrupt=True)
        module.num_workers = workers
        assert sum(len(images) for images, _ in module.train_dataloader()) == 8
        assert module.skipped == 2


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda root: None, "nowhere: no such folder"),
        (
            lambda root: root.mkdir(),
            r"nowhere/train: no such folder or tar file, nor class folders in .*nowhere. Name the split with --data.train",
        ),
        (lambda root: (root / "train").mkdir(parents=True), "nowhere/train: no images in class folders"),
        (
            lambda root: [image(root / p) for p in ("train/a/x.jpg", "train/b/x.jpg")],
            "nowhere/train: too few images to hold some out for validation",
        ),
        (
            lambda root: [image(root / p) for p in ("train/a/x.jpg", "train/c/x.jpg", "val/b/x.jpg")],
            "nowhere/val/b: class 'b' is not among the training classes",
        ),
        (
            lambda root: [root.mkdir(), (root / "train.tar").write_bytes(b"rubbish")],
            "nowhere/train.tar: cannot be read as a tar file",
        ),
    ],
)
def test_missing_files_are_named_in_error(tmp_path, break_it, message):
    break_it(tmp_path / "nowhere")
    with pytest.raises(UserError, match=message) as error:
        print(data(tmp_path / "nowhere").num_classes)
    assert "\n" not in str(error.value)


def test_unknown_dataset_and_oversized_batch(tmp_path, caplog):
    with pytest.raises(UserError, match="dataset 'torch/nothing', split 'train'"):
        print(data(tmp_path, dataset="torch/nothing").num_classes)
    module = ClassificationData(train_images=4, val_images=4, batch_size=8)
    assert [len(labels) for _, labels in module.train_dataloader()] == [4]
    assert "4 training images do not fill a batch of 8; using batches of 4" in caplog.text


def test_training_and_validation_match_without_crop(tmp_path):
    """Both stages resize the whole image instead of taking a center crop."""
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :40], wide[:, 80:] = (255, 0, 0), (0, 0, 255)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(wide).save(tmp_path / split / name / "x.png")
    module = data(tmp_path, crop="none", hflip=0.0, image_size=64)
    assert module.num_classes == 2
    trained, validated = (module.images[stage][0][0] for stage in ("train", "val"))
    assert torch.equal(trained, validated)
    assert module.describe()["image"]["crop_mode"] == "squash"
    red, blue = validated[0].mean(0), validated[2].mean(0)
    assert red[:15].min() > red[30] and blue[-15:].min() > blue[30]


def test_validation_subset_contains_all_classes(tmp_path):
    tree(tmp_path, count=8)
    images = data(tmp_path)
    images.trainer = L.Trainer(
        limit_val_batches=1, logger=False, accelerator="cpu", enable_checkpointing=False
    )
    images.setup("validate")
    assert next(iter(images.val_dataloader()))[1].tolist() == [0, 0, 1, 1]
