"""Tests for classification datasets selected by name: Hugging Face datasets from local files."""

import datasets
import numpy as np
import pytest
from PIL import Image

from crossformer_vision import UserError
from crossformer_vision.data.classification import ClassificationData


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a Parquet dataset with the given columns and returns its name."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8)

    def write_splits(**columns) -> str:
        for split in ("train", "test"):
            data = {}
            kinds = {}
            for name, values in columns.items():
                if values == "image":
                    values, kinds[name] = [Image.fromarray(pixels)] * 8, datasets.Image()
                elif isinstance(values, datasets.ClassLabel):
                    kinds[name] = values
                    values = [n % values.num_classes for n in range(8)]
                else:
                    kinds[name] = datasets.Value("string" if isinstance(values[0], str) else "int64")
                data[name] = values
            table = datasets.Dataset.from_dict(data, features=datasets.Features(kinds))
            table.to_parquet(tmp_path / f"pets/{split}-00000-of-00001.parquet")
        return f"hfds/{tmp_path}/pets"

    return write_splits


def load(dataset, tmp_path, **options):
    return ClassificationData(
        dataset=dataset,
        root=str(tmp_path / "cache"),
        val_split="test",
        batch_size=4,
        num_workers=0,
        image_size=32,
        **options,
    )


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    "columns, options, classes",
    [
        (dict(image="image", label=CLASSES), {}, ["cat", "dog"]),
        (dict(img="image", animal=CLASSES), {}, ["cat", "dog"]),
        (dict(img="image", fine=CLASSES, coarse=CLASSES), {"label_column": "coarse"}, ["cat", "dog"]),
        (dict(left="image", right="image", label=[0, 2] * 4), {"image_column": "right"}, ["0", "1", "2"]),
        (dict(image="image", name=["emu", "bee"] * 4), {"label_column": "name"}, ["bee", "emu"]),
    ],
    ids=["usual", "other names", "label column", "image column and integers", "strings"],
)
def test_image_and_label_columns_are_detected(columns, options, classes, write, tmp_path):
    module = load(write(**columns), tmp_path, **options)
    assert module.num_classes == len(classes) and module.classes == classes
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    first = columns[options.get("label_column", "label" if "label" in columns else "animal")]
    expected = [0, 1, 0, 1] if first is CLASSES else [classes.index(str(v)) for v in first[:4]]
    assert labels.tolist() == expected


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (
            dict(img="image", fine=CLASSES, coarse=CLASSES),
            {},
            "Choose with --data.label_column: fine, coarse",
        ),
        (dict(label=CLASSES, a="image", b="image"), {}, "Choose with --data.image_column: a, b"),
        (dict(image="image", label=CLASSES), {"label_column": "class"}, "has the columns image, label"),
        (dict(image="image", label=CLASSES), {"image_column": "label"}, "column 'label' holds no images"),
        (dict(image=[0, 1] * 4, label=CLASSES), {}, "column 'image' holds no images"),
        (dict(image="image", label=[-1, 0] * 4), {}, "holds neither class indices nor names"),
    ],
    ids=["two labels", "two images", "unknown column", "no images", "images of no type", "negative labels"],
)
def test_invalid_columns_are_rejected(columns, options, message, write, tmp_path):
    with pytest.raises(UserError, match=message):
        _ = load(write(**columns), tmp_path, **options).num_classes


def test_missing_dataset_raises_one_line_error(write, tmp_path):
    with pytest.raises(UserError, match="dataset 'hfds/.*nowhere', split 'train': "):
        _ = load(f"hfds/{tmp_path}/nowhere", tmp_path).num_classes


def test_split_with_fewer_classes_uses_training_class_indices(write, tmp_path):
    name = write(image="image", name=["emu", "bee"] * 4)
    file = str(tmp_path / "pets/test-00000-of-00001.parquet")
    whole = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
    whole.select([0, 2, 4, 6]).to_parquet(file)  # emus
    module = load(name, tmp_path, label_column="name")
    assert module.num_classes == 2
    _, labels = next(iter(module.val_dataloader()))
    assert labels.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dataset", [None, "torch/cifar10"])
def test_column_options_are_rejected_for_other_datasets(dataset):
    with pytest.raises(UserError, match="--data.label_column fine: only for a Hugging Face dataset"):
        ClassificationData(dataset=dataset, label_column="fine")
