"""Tests for tasks in Lightning's Trainer: custom data, custom losses, argument validation and seeding."""

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

from crossformer_vision import (
    Classification,
    ClassificationData,
    ClassificationResult,
    Detection,
    DetectionData,
    Segmentation,
    SegmentationData,
    UserError,
    load_checkpoint,
    load_predictor,
)
from crossformer_vision.training.checkpointing import PatienceInEpochs

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
def test_train_and_predict_with_custom_data(data, tmp_path):
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


TASKS = {
    "classification": (Classification, ClassificationData, {"model_args": SMALL}, {"image_size": 32}),
    "detection": (
        Detection,
        DetectionData,
        {"width": 16, "model_args": SMALL, "min_size": 64, "max_size": 64},
        {"image_size": 64, "min_size": 64, "max_size": 64},
    ),
    "segmentation": (Segmentation, SegmentationData, {"width": 16, "model_args": SMALL}, {"crop_size": 64}),
}


@pytest.mark.parametrize("name", TASKS)
def test_trainer_test_and_predict(name, tmp_path):
    kind, data, options, sizes = TASKS[name]
    data = data(train_images=4, val_images=5, batch_size=2, num_workers=0, **sizes)
    task = kind(num_classes=data.num_classes, **options)
    run = trainer(tmp_path)
    (tested,) = run.test(task, data, verbose=False)
    (validated,) = run.validate(task, data, verbose=False)
    assert {k.replace("test_", "val_"): v for k, v in tested.items()} == validated
    for where in (data, data.val_dataloader()):
        predicted = run.predict(task, where)
        assert sum(map(len, predicted)) == 5
    if name == "classification":
        assert predicted[0].shape == (2, 10) and predicted[0].sum(1).allclose(torch.ones(2))
    elif name == "segmentation":
        assert predicted[0].shape == (1, 64, 64) and predicted[0].dtype == torch.int64
    else:
        assert predicted[0][0].keys() == {"boxes", "labels", "scores"}


@pytest.mark.slow
def test_two_devices_with_default_trainer(tmp_path):
    """Lightning's distributed sampler is not added: each process sees its half of the images once."""
    (tmp_path / "run.py").write_text(
        """
import lightning as L, torch
from crossformer_vision import Classification, ClassificationData

class Counting(Classification):
    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), *batch[0].mean((1, 2, 3)).tolist()]
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        torch.save(self.seen, f"seen{self.global_rank}.pt")

data = ClassificationData(train_images=16, val_images=6, batch_size=4, num_workers=0, image_size=32, hflip=0)
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
trainer = L.Trainer(**quiet, accelerator="cpu", max_epochs=1, devices=2, strategy="ddp")
trainer.fit(Counting(num_classes=10, model_args={"depths": [1, 1, 1, 1]}), data)
"""
    )
    subprocess.run([sys.executable, "run.py"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    seen = [torch.load(tmp_path / f"seen{rank}.pt") for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 8 and len({*seen[0], *seen[1]}) == 16


def test_custom_losses(tmp_path):
    """Overriding ``compute_loss`` changes the training loss; the validation loss stays comparable."""

    class Focal(Classification):
        def compute_loss(self, logits, targets):
            p = logits.softmax(1).gather(1, targets[:, None])
            return -((1 - p) ** 2 * p.log()).mean()

    class Doubled(Detection):
        def compute_loss(self, images, targets):
            return {name: 2 * loss for name, loss in super().compute_loss(images, targets).items()}

    class Tripled(Segmentation):
        def compute_loss(self, logits, labels):
            return 3 * super().compute_loss(logits, labels)

    found = {}
    kinds = {"classification": Focal, "detection": Doubled, "segmentation": Tripled}
    for name, (plain, data, options, sizes) in TASKS.items():
        options = {**options, "label_smoothing": 0.0} if name == "classification" else options
        for kind in (plain, kinds[name]):
            torch.manual_seed(0)
            images = data(train_images=2, val_images=2, batch_size=2, num_workers=0, **sizes)
            task = kind(num_classes=10 + (name == "segmentation"), lr=0.0, seed=0, **options)
            run = trainer(tmp_path, enable_checkpointing=False)
            run.fit(task, images)
            found[kind] = {k: float(v) for k, v in run.callback_metrics.items()}
    assert found[Doubled]["train_loss"] == pytest.approx(2 * found[Detection]["train_loss"], rel=1e-5)
    assert found[Tripled]["train_loss"] == pytest.approx(3 * found[Segmentation]["train_loss"], rel=1e-5)
    assert found[Tripled]["val_loss"] == pytest.approx(found[Segmentation]["val_loss"], rel=1e-5)
    assert found[Focal]["train_loss"] < 0.9 * found[Classification]["train_loss"]
    assert found[Focal]["val_loss"] == pytest.approx(found[Classification]["val_loss"], rel=1e-5)


class Seen(Dataset):
    def __init__(self):
        self.order = []

    def __len__(self):
        return 24

    def __getitem__(self, i):
        self.order.append(i)
        return torch.zeros(3, 32, 32), i % 2


def test_training_preserves_user_seed(tmp_path):
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


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_fit_after_fit_or_test_restarts_schedule(tmp_path):
    def rates(task, **options):
        seen = Rates()
        run = trainer(tmp_path, max_epochs=2, callbacks=[seen], **options)
        run.fit(task, loader(), loader())
        assert task.images_seen == 4  # a custom loader counts batches
        return seen.seen, run

    options = dict(num_classes=2, model_args=SMALL, lr=1e-3, warmup_epochs=0)
    task = Classification(**options)
    first, run = rates(task)
    assert len(first) == 4 and first[0] == 1e-3 and first[-1] < 5e-4
    assert rates(task)[0] == first
    other = Classification(**options)
    best = run.checkpoint_callback.best_model_path
    trainer(tmp_path).test(other, loader(), ckpt_path=best)
    assert rates(other, enable_checkpointing=False)[0] == first
    loaded = Classification.load_from_checkpoint(best, weights_only=True)
    weights = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


class Weighted(Classification):
    """Arguments, an optimizer and a loss of its own."""

    def __init__(self, weight: list[float], **options) -> None:
        super().__init__(**options)
        self.register_buffer("weight", torch.tensor(weight))

    def compute_loss(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, weight=self.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_subclass_with_custom_loss_and_optimizer(tmp_path):
    fit = trainer(tmp_path)
    options = dict(num_classes=2, model_args=SMALL, label_smoothing=0.0, image_size=96)
    fit.fit(Weighted([1.0, 2.0], **options), loader())
    predictor = load_predictor(fit.checkpoint_callback.best_model_path, device="cpu")
    assert predictor.info.image["input_size"] == (3, 96, 96)  # from the task, since the loader is custom
    assert predictor(Image.new("RGB", (50, 40))).probabilities.shape == (2,)


def test_schedule_requires_finite_run_length(tmp_path):
    stream = DataLoader(Stream(), 4)
    quick = dict(enable_checkpointing=False)
    with pytest.raises(
        UserError, match="schedule 'cosine' depends on the length of the run: give the Trainer"
    ):
        trainer(tmp_path, **quick).fit(Classification(num_classes=2, model_args=SMALL), stream)
    with pytest.raises(UserError, match="schedule 'poly' depends on the length of the run"):
        endless = dict(max_epochs=-1, max_time="00:00:01:00")
        task = Classification(num_classes=2, model_args=SMALL, schedule="poly")
        trainer(tmp_path, **endless, **quick).fit(task, loader())
    trainer(tmp_path, **quick).fit(Classification(num_classes=2, model_args=SMALL, schedule="step"), stream)


def test_segmentation_accepts_tensor_batches(tmp_path):
    pairs = DataLoader(TensorDataset(torch.randn(4, 3, 64, 64), torch.randint(3, (4, 64, 64))), 2)
    task = Segmentation(num_classes=3, width=16, model_args=SMALL)
    trainer(tmp_path, enable_checkpointing=False).fit(task, pairs, pairs)
    assert task.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_lr_finder_and_stochastic_weight_averaging(tmp_path):
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
        (lambda: Classification(schedule="cosin"), "schedule='cosin': must be one of 'cosine', 'poly', 'step'. Did you mean"),
        (lambda: Classification(optimizer="adamww"), "unknown optimizer 'adamww'. Did you mean 'adamw'"),
        (lambda: Classification(lr=-1.0), "lr=-1.0: must be a number at least 0"),
        (lambda: Classification(mix_prob=1.5), "mix_prob=1.5: must be a number from 0 to 1"),
        (lambda: Classification("vgg11", drop_path_rate=0.1), "model 'vgg11' has no stochastic depth"),
        (lambda: ClassificationData(crop="paded"), "crop='paded': .* Did you mean 'padded'"),
        (lambda: ClassificationData(hflip=2), "hflip=2: must be a number from 0 to 1"),
        (lambda: ClassificationData(batch_size=0), "batch_size=0: must be a number at least 1"),
        (lambda: Classification(classes=["cat", " "]), "classes: a class has no name"),
        (lambda: ClassificationData(classes=["cat", "cat"]), "classes: two classes have the name 'cat'"),
        (lambda: Classification("crossformer_nano", image_size=20), "'crossformer_nano' does not accept images of 20 pixels"),
        (lambda: Classification("hrnet_w18_small", image_size=50), "does not accept images of 50 pixels .* Its own image_size is 224"),
        (lambda: Segmentation(backbone="tnt_s_patch16_224"), "cannot process an image of 64x96 .* pass img_size to the model"),
        (lambda: Detection(backbone="crossvit_tiny_240"), r"has feature maps at strides \[12, 17\]. One of 8, 16 or 32 is needed"),
        (lambda: load_predictor("x.ckpt", score_threshold=50), "score_threshold=50: must be a number from 0 to 1"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_num_classes_mismatch_raises(tmp_path):
    data = ClassificationData(train_images=4, val_images=4, batch_size=2, num_workers=0)
    with pytest.raises(UserError, match="the task has num_classes=3, but the data has 10 classes"):
        trainer(tmp_path).fit(Classification(num_classes=3, model_args=SMALL), data)


def test_fixed_size_models():
    """Classifiers set the size from ``image_size``; segmenters use ``img_size`` and sliding windows."""
    net = Classification("vit_tiny_patch16_224", image_size=96).net.eval()
    assert net.patch_embed.img_size == (96, 96) and net(torch.zeros(1, 3, 96, 96)).shape == (1, 10)
    task = Segmentation(
        backbone="nest_tiny", num_classes=3, width=16, window=128, model_args={"img_size": 128}
    ).eval()
    with torch.no_grad():
        assert task([torch.zeros(1, 3, 150, 200)]).shape == (1, 3, 150, 200)


def test_predictor_accepts_lists_and_reprs_are_short(tmp_path):
    trainer(tmp_path).fit(Classification(num_classes=2, model_args=SMALL), loader())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(UserError, match="device 'gpu': "):
        load_predictor(checkpoint, device="gpu")
    predictor = load_predictor(checkpoint, device="cpu")
    images = [Image.new("RGB", (40, 40), (200, 9, 9)), np.zeros((30, 60, 3), np.uint8)]
    found = predictor(images)
    for result, image in zip(found, images, strict=True):  # a list is processed as a batch
        np.testing.assert_allclose(result.probabilities, predictor(image).probabilities, atol=1e-6)
    assert repr(predictor) == "<ClassificationPredictor: 2 classes, on cpu>"
    assert repr(found[0]).startswith("<ClassificationResult image: ")
    assert Image.open(__import__("io").BytesIO(found[0]._repr_png_())).width >= 320
    names = [f"class number {i}" for i in range(1000)]
    many = ClassificationResult("x.jpg", images[0], names, np.full(1000, 1e-3, np.float32))
    report = load_checkpoint(predictor.net, predictor.net.state_dict())
    assert max(len(repr(many)), len(repr(report))) < 300


@pytest.mark.parametrize(
    "options, checks", [({"check_val_every_n_epoch": 2}, 3), ({"val_check_interval": 0.5}, 12)]
)
def test_patience_is_measured_in_epochs(options, checks, tmp_path):
    task = Classification(num_classes=2, model_args=SMALL)
    patience = PatienceInEpochs(6, task)
    fit = trainer(tmp_path, callbacks=[patience], enable_checkpointing=False, **options)
    fit.fit(task, loader(), loader())
    assert patience.patience == checks


@pytest.mark.parametrize("size", [5, 1, 4])
def test_mixup_with_odd_batch_sizes(size):
    torch.manual_seed(0)
    np.random.seed(0)
    task = Classification(num_classes=3, mixup=1.0, label_smoothing=0.1, model_args=SMALL)
    images, labels = torch.rand(size, 3, 32, 32), torch.arange(size) % 3
    mixed, targets = task.apply_mix(images, labels)
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
predictor = cv.load_predictor("runs/x", device="cpu", score_threshold=0.3)
result = predictor("photo.jpg")
print(result.plot().size, [r.to_dict() for r in predictor(["a.jpg", "b.jpg"])])
detector = cv.create_detector("mask_rcnn", "crossformer_nano", num_classes=3)
segmenter = cv.create_segmenter("upernet", num_classes=3)
frozen = cv.freeze_position_bias(model, 64, 64)
wrong = cv.load_predictor(5, score_threshold="high")
wronger = cv.create_detector("mask_rcn", nclasses=3)
wrongest = cv.no_such_name
"""


@pytest.mark.slow  # mypy re-analyzes torch
def test_package_is_typed(tmp_path):
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
