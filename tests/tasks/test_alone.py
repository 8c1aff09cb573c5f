"""Tasks without the command: in Lightning's Trainer, with data of one's own, checked and seeded."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from crossformer_vision import UserError, load_checkpoint, load_predictor
from crossformer_vision.data.classification import ClassificationData
from crossformer_vision.predict import Classified
from crossformer_vision.tasks.classification import Classification
from crossformer_vision.tasks.run import Patience

SMALL = {"depths": [1, 1, 1, 1]}


def trainer(folder, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return L.Trainer(**{**quiet, "max_epochs": 1, "default_root_dir": folder, **options})


def loader(n=8, size=4):
    return DataLoader(TensorDataset(torch.randn(n, 3, 32, 32), torch.arange(n) % 2), size)


class Own(L.LightningDataModule):
    def train_dataloader(self):
        return loader()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(3, 32, 32), i % 2) for i in range(32)])


@pytest.mark.parametrize(
    "data", [loader(), Own(), DataLoader(Stream(), 4)], ids=["loader", "module", "stream"]
)
def test_own_data_train_and_predict(data, tmp_path):
    steps = (
        {"max_steps": 6, "max_epochs": -1}
        if isinstance(data, DataLoader) and isinstance(data.dataset, Stream)
        else {}
    )
    fit = trainer(tmp_path, **steps)
    fit.fit(Classification(num_classes=2, classes=["cat", "dog"], model_args=SMALL), data)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    result = load_predictor(checkpoint, device="cpu")(Image.new("RGB", (50, 40)))
    assert {name for name, _ in result.top()} == {"cat", "dog"}
    assert "train_loss" in fit.progress_bar_metrics


class Seen(Dataset):
    def __init__(self):
        self.order = []

    def __len__(self):
        return 24

    def __getitem__(self, i):
        self.order.append(i)
        return torch.zeros(3, 32, 32), i % 2


def test_seeds_are_the_users_and_a_step_takes_nothing_from_them(tmp_path):
    def run(seed):
        L.seed_everything(seed, verbose=False)
        data, task = Seen(), Classification(num_classes=2, model_args=SMALL, drop_path_rate=0.2)
        trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
            task, DataLoader(data, 8, shuffle=True)
        )
        return (
            [str(data.order[24 * k : 24 * k + 24]) for k in range(3)],
            float(torch.rand(())),
            sum(p.sum() for p in task.net.parameters()),
        )

    runs = [run(seed) for seed in (1, 2, 1)]
    assert not set(runs[0][0]) & set(runs[1][0]) and runs[0][1] != runs[1][1]
    assert runs[0][0] == runs[2][0] and runs[0][1] == runs[2][1] and runs[0][2] == runs[2][2]


def test_other_peoples_schedulers(tmp_path):
    data = ClassificationData(train_images=40, val_images=8, batch_size=8, num_workers=0, image_size=32)
    options = dict(enable_checkpointing=False)
    found = Tuner(trainer(tmp_path, **options)).lr_find(
        Classification(num_classes=10, model_args=SMALL), datamodule=data, num_training=4
    )
    assert len(found.results["lr"]) >= 4
    average = trainer(tmp_path, max_epochs=3, callbacks=[StochasticWeightAveraging(1e-3)], **options)
    average.fit(Classification(num_classes=2, model_args=SMALL), loader())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Classification(schedule="cosin"), "schedule='cosin': it is one of 'cosine', 'poly', 'step'; did you mean"),
        (lambda: Classification(optimizer="adamww"), "unknown optimizer 'adamww'; did you mean adamw"),
        (lambda: Classification(lr=-1.0), "lr=-1.0: it is a number from 0"),
        (lambda: Classification(mix_prob=1.5), "mix_prob=1.5: it is a number from 0 to 1"),
        (lambda: Classification("vgg11", drop_path_rate=0.1), "model 'vgg11' has no stochastic depth"),
        (lambda: ClassificationData(crop="paded"), "crop='paded': .* did you mean 'padded'"),
        (lambda: ClassificationData(hflip=2), "hflip=2: it is a number from 0 to 1"),
        (lambda: ClassificationData(batch_size=0), "batch_size=0: it is a number from 1"),
        (lambda: load_predictor("x.ckpt", score=50), "score=50: it is a number from 0 to 1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_predictors_take_lists_and_everything_has_a_short_repr(tmp_path):
    trainer(tmp_path).fit(Classification(num_classes=2, model_args=SMALL), loader())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(UserError, match="device 'gpu': "):
        load_predictor(checkpoint, device="gpu")
    predictor = load_predictor(checkpoint, device="cpu")
    images = [Image.new("RGB", (40, 40), (200, 9, 9)), np.zeros((30, 60, 3), np.uint8)]
    found = predictor(images)
    assert [r.top() for r in found] == [predictor(image).top() for image in images]
    assert repr(predictor) == "<Predictor of classification: 2 classes, on cpu>"
    assert repr(found[0]).startswith("<Classified image: ")
    assert Image.open(__import__("io").BytesIO(found[0]._repr_png_())).width >= 320
    names = [f"class number {i}" for i in range(1000)]
    many = Classified("x.jpg", images[0], names, np.full(1000, 1e-3, np.float32))
    report = load_checkpoint(predictor.net, predictor.net.state_dict())
    assert max(len(repr(many)), len(repr(report))) < 300


@pytest.mark.parametrize(
    "options, checks", [({"check_val_every_n_epoch": 2}, 3), ({"val_check_interval": 0.5}, 12)]
)
def test_patience_counts_epochs(options, checks, tmp_path):
    task = Classification(num_classes=2, model_args=SMALL)
    patience = Patience(6, task)

    class Count(L.Callback):
        def on_train_start(self, trainer, task):
            patience.count(trainer)

    fit = trainer(tmp_path, callbacks=[patience, Count()], enable_checkpointing=False, **options)
    fit.fit(task, loader(), loader())
    assert patience.patience == checks


@pytest.mark.parametrize("size", [5, 1, 4])
def test_odd_batches_are_mixed_too(size):
    torch.manual_seed(0)
    np.random.seed(0)
    task = Classification(num_classes=3, mixup=1.0, label_smoothing=0.1, model_args=SMALL)
    images, labels = torch.rand(size, 3, 32, 32), torch.arange(size) % 3
    mixed, targets = task.mixed(images, labels)
    assert mixed.shape == images.shape and targets.shape == (size, 3)
    assert torch.allclose(targets.sum(1), torch.ones(size))
    assert ((mixed != images).flatten(1).any(1)).sum() >= size // 2 * 2 - 1
    if size % 2:
        assert torch.equal(mixed[-1], images[-1]) and targets[-1].argmax() == labels[-1]


CLIENT = """\
import crossformer_vision as cv
from crossformer_vision import CrossFormer, LoadReport

model = CrossFormer(num_classes=3)
report: LoadReport = cv.load_checkpoint(model, "x.pth")
print(len(report.loaded))
predictor = cv.load_predictor("runs/x", device="cpu", score=0.3)
result = predictor("photo.jpg")
print(result.plot().size, [r.to_dict() for r in predictor(["a.jpg", "b.jpg"])])
detector = cv.create_detector("mask_rcnn", "crossformer_nano", num_classes=3)
segmenter = cv.create_segmenter("upernet", num_classes=3)
frozen = cv.freeze_position_bias(model, 64, 64)
wrong = cv.load_predictor(5, score="high")
wronger = cv.create_detector("mask_rcn", nclasses=3)
wrongest = cv.no_such_name
"""


@pytest.mark.slow  # mypy reads torch's types anew
def test_type_checkers_see_the_package(tmp_path):
    (tmp_path / "client.py").write_text(CLIENT)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--ignore-missing-imports",
    ]
    done = subprocess.run(
        [*command, "--cache-dir", str(root / ".mypy_cache"), str(tmp_path / "client.py")],
        cwd=root / "src", capture_output=True, text=True,
    )  # fmt: skip
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert lines == {13, 14, 15}, done.stdout
