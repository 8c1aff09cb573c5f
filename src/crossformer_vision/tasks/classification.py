"""Image classification: loss, metrics, and what a validation shows."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_model_data_config
from timm.data.mixup import mixup_target
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from crossformer_vision.errors import UserError, check_range
from crossformer_vision.models import drop_path, find_model, fixed_size
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task, describe_initial_weights, starts_from_published
from crossformer_vision.weights.checkpoints import load_checkpoint

SHOWN = 24  # validation images in the picture of predictions


class Classification(Task):
    """Train and validate any timm model as a classifier.

    Args:
        model: timm name, with a tag (`crossformer_small.in1k`) to choose weights.
        num_classes: classes; the command takes them from the data.
        pretrained: start from the model's published weights; null where they are here or can be
            fetched, with a notice where not.
        checkpoint: start from these weights instead, published or own; a classifier of another class count is
            trained anew.
        model_args: further keywords of the model, such as `{embed_dim: 48}`.
        image_size: side of the images, for models that are of a fixed one; null for the model's own. The
            command takes it from the data.
        drop_path_rate: stochastic depth.
        label_smoothing: of the cross-entropy.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mix_prob: share of the batches that are mixed.
        **optimization: see `Task`.
    """

    name = "classification"
    monitor = "val_accuracy"

    def __init__(
        self,
        model: str = "crossformer_nano",
        num_classes: int = 10,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: dict[str, Any] | None = None,
        image_size: int | None = None,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = starts_from_published(model, pretrained, checkpoint)
        find_model(model)
        self.net = timm.create_model(
            model,
            pretrained=published,
            num_classes=num_classes,
            **drop_path(model, drop_path_rate),
            **{**fixed_size(model, image_size), **(model_args or {})},
        )
        if image_size and not self.net.pretrained_cfg.get("fixed_input_size"):
            self._check_size(image_size)
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self.initial_weights = describe_initial_weights(model, num_classes, published, checkpoint, report)
        for name, value in (("label_smoothing", label_smoothing), ("mix_prob", mix_prob)):
            check_range(name, value, 0, 1)
        self.label_smoothing = label_smoothing
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, prob=mix_prob, label_smoothing=label_smoothing, num_classes=num_classes
            )
        # Lightning's own mean is wrong where processes have unequal shares of images.
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.accuracy_top5 = (
            MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes > 5 else None
        )
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.shown: list[
            tuple[Tensor, int, int, float]
        ] = []  # image, class, predicted class, its probability

    def _check_size(self, side: int) -> None:
        """A UserError if images of this size, which is not the model's own, break it."""
        name, own = self.hparams["model"], self.net.pretrained_cfg["input_size"][-1]
        weight = next(self.net.parameters())
        if side == own or weight.is_meta:
            return
        channels = (self.hparams["model_args"] or {}).get("in_chans", 3)
        self.net.eval()
        try:
            with torch.no_grad():
                self.net(weight.new_zeros(1, channels, side, side))
        except Exception as error:  # its own words for it, of any kind
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"model '{name}' takes no images of {side} pixels ({said}); its own image_size is {own}"
            ) from None
        self.net.train()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> logits (B, num_classes)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix:
            images, labels = self.mixed(images, labels)
        loss = self.compute_loss(self(images), labels)
        self.log(
            "train_loss",
            loss,
            on_step=False,
            on_epoch=True,
            batch_size=len(images),
            sync_dist=True,
            prog_bar=True,
        )
        return loss

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a training batch, to be overridden; `val_loss` is the cross-entropy in any case.

        Args:
            logits: (B, classes).
            targets: (B,), classes; or (B, classes), their shares, smoothed, where images are mixed.
        """
        smoothing = self.label_smoothing if targets.dim() == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Images (B, C, H, W), or a batch of which they come first -> probabilities (B, num_classes)."""
        if batch is None:
            return None
        return self(batch if isinstance(batch, Tensor) else batch[0]).float().softmax(1)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and CutMix; labels (B,) become (B, classes), smoothed.

        Images are mixed in pairs: of an odd batch the last one stays as it is.
        """
        assert self.mix is not None
        pairs, n = len(images) // 2 * 2, len(images)
        plain = mixup_target(labels[pairs:], self.mix.num_classes, smoothing=self.label_smoothing)
        if not pairs:
            return images, plain
        mixed, targets = self.mix(images[:pairs].clone(), labels[:pairs])
        if pairs == n:
            return mixed, targets
        return torch.cat([mixed, images[pairs:]]), torch.cat([targets, plain])

    def describe(self) -> dict[str, Any]:
        image = resolve_model_data_config(self.net)
        if side := self.hparams["image_size"]:
            image["input_size"] = (image["input_size"][0], side, side)
        return {**super().describe(), "image": {k: v for k, v in image.items() if k != "crop_mode"}}

    def on_validation_epoch_start(self) -> None:
        self.shown = []

    def validation_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> None:
        if batch is None:
            return
        images, labels = batch
        logits = self(images).float()
        self.loss(F.cross_entropy(logits, labels), len(images))
        self.accuracy(logits, labels)
        self.confusion(logits, labels)
        n = len(images)
        if self.accuracy_top5 is not None:
            self.accuracy_top5(logits, labels)
        # A few of every n-th batch, since batches may come class by class.
        batches = self.batches_evaluated
        few = -(-SHOWN // batches) if batch_idx % max(1, batches // SHOWN) == 0 else 0
        for i in range(min(n, few)):
            if len(self.shown) < SHOWN:
                probability, predicted = logits[i].softmax(0).max(0)
                self.shown.append(
                    (images[i].float().cpu(), int(labels[i]), int(predicted), float(probability))
                )

    def on_validation_epoch_end(self) -> None:
        # Here, and not in the step: a process without a share of the images takes part.
        metrics: dict[str, Any] = {"loss": self.loss, "accuracy": self.accuracy}
        if self.accuracy_top5 is not None:
            metrics["accuracy_top5"] = self.accuracy_top5
        for name, metric in metrics.items():
            self.log(f"val_{name}", metric.compute(), prog_bar=name == "accuracy")
            metric.reset()
        self.matrix = self.confusion.compute().cpu()
        self.confusion.reset()

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw the last validation: `confusion_matrix.png` and `predictions.png`."""
        cfg = self.net.pretrained_cfg
        visualize.confusion_matrix(self.matrix.numpy(), classes, folder / "confusion_matrix.png")
        shown = [
            (
                visualize.denormalised(image.numpy(), cfg["mean"], cfg["std"], self.shown_channels),
                classes[true],
                classes[predicted],
                p,
            )
            for image, true, predicted, p in self.shown
        ]
        visualize.predictions(shown, folder / "predictions.png")
