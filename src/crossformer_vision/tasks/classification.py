"""Image classification: loss, metrics and plots."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_model_data_config
from timm.data.mixup import mixup_target
from torch import Tensor
from typing_extensions import override

from crossformer_vision.errors import UserError, check_choice, check_range, error_line
from crossformer_vision.models import drop_path_kwargs, find_model, img_size_kwargs, in_chans_kwargs
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task
from crossformer_vision.tasks.class_weights import ClassWeights, check_class_weights, create_class_weights
from crossformer_vision.tasks.classification_losses import asymmetric_loss, focal_loss
from crossformer_vision.tasks.classification_metrics import MultiLabelMetrics, SingleLabelMetrics
from crossformer_vision.tasks.initial_weights import describe_initial_weights, use_published_weights
from crossformer_vision.types import Checkpoint, JsonObject, Kwargs
from crossformer_vision.weights.loading import load_checkpoint

log = logging.getLogger("crossformer_vision")

PLOTTED = 24  # validation images in predictions.png


class Classification(Task):
    """Train and validate any timm model as a classifier.

    Args:
        backbone: timm name of the model, with a tag (``crossformer_small.in1k``) to choose weights.
        num_classes: Number of classes. The command takes it from the data.
        pretrained: Start from the model's published weights; null to use them if they are cached or
            downloadable, with a notice if not.
        checkpoint: Start from this file instead, published or own. A classifier for another number of classes
            is initialized anew.
        model_args: Further arguments of the model, such as ``{embed_dim: 48}``.
        in_chans: Number of channels of the images. The command takes it from the data.
        image_mean: Mean of each channel, by which images are normalized; null for the backbone's. The command
            takes it from the data.
        image_std: Standard deviation of each channel, as ``image_mean``.
        image_size: Side of the images, for models with a fixed input size; null for the model's own. The
            command takes it from the data.
        drop_path_rate: Stochastic depth rate.
        multi_label: Classes are independent, and an image may have any number of them. The command takes it
            from the data.
        label_smoothing: Label smoothing of the cross-entropy.
        mixup: Alpha of mixup, 0 to disable it.
        cutmix: Alpha of CutMix, 0 to disable it.
        mix_prob: Probability that a batch is mixed.
        loss: ``cross_entropy``, or ``focal`` (arXiv 1708.02002), which gives less weight to images that are
            classified well. With several classes per image ``bce``, binary cross-entropy, or ``asymmetric``
            (arXiv 2009.14119), which gives less weight to absent classes. Null for the first of the two.
        focal_gamma: Exponent of the focal loss.
        class_weights: Weight of each class in the loss: ``none``; ``balanced``, in inverse proportion to its
            number of training images, 1 on average over the images; or a list. With several classes per
            image, the weight of the images that have the class: ``balanced`` makes both sides equal.
        **optimization: See ``Task``.

    Raises:
        UserError: If an argument is invalid or the model does not accept it.
    """

    name = "classification"

    def __init__(
        self,
        backbone: str = "crossformer_nano",
        num_classes: int = 10,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: Kwargs | None = None,
        in_chans: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_size: int | None = None,
        drop_path_rate: float = 0.0,
        multi_label: bool = False,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        loss: Literal["cross_entropy", "focal", "bce", "asymmetric"] | None = None,
        focal_gamma: float = 2.0,
        class_weights: ClassWeights = "none",
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = use_published_weights(backbone, pretrained, checkpoint)
        find_model(backbone)
        self.net = timm.create_model(
            backbone,
            pretrained=published,
            num_classes=num_classes,
            **drop_path_kwargs(backbone, drop_path_rate),
            **{**img_size_kwargs(backbone, image_size), **in_chans_kwargs(in_chans), **(model_args or {})},
        )
        if image_size and not self.net.pretrained_cfg.get("fixed_input_size"):
            self._check_size(image_size)
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self._set_up_finetuning()
        self.initial_weights = describe_initial_weights(backbone, num_classes, published, checkpoint, report)
        for name, value in (("label_smoothing", label_smoothing), ("mix_prob", mix_prob)):
            check_range(name, value, 0, 1)
        self.label_smoothing = label_smoothing
        self.multi_label, self.focal_gamma = multi_label, focal_gamma
        losses = ("bce", "asymmetric") if multi_label else ("cross_entropy", "focal")
        self.loss_name = loss or losses[0]
        check_choice("loss", self.loss_name, losses)
        check_range("focal_gamma", focal_gamma, 0)
        self.class_weights = check_class_weights(class_weights, num_classes)
        self.loss_weights: Tensor | None
        self.register_buffer("loss_weights", None, persistent=False)
        self.mix = None
        if multi_label and (mixup or cutmix):
            log.warning("mixup and cutmix need one class per image; they are not used")
        elif mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, prob=mix_prob, label_smoothing=label_smoothing, num_classes=num_classes
            )
        self.metrics = MultiLabelMetrics(num_classes) if multi_label else SingleLabelMetrics(num_classes)
        self.monitor = "val_map" if multi_label else "val_accuracy"
        self.plotted: list[tuple[Tensor, Tensor, Tensor]] = []  # image, target, probabilities

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            weights = create_class_weights(self.class_weights, self._data_module, self.multi_label)
            self.loss_weights = None if weights is None else weights.to(self.device)

    def _check_size(self, side: int) -> None:
        """Try images of a size that is not the model's own.

        Raises:
            UserError: If the model does not accept them.
        """
        name, own = self.hparams["backbone"], self.net.pretrained_cfg["input_size"][-1]
        weight = next(self.net.parameters())
        if side == own or weight.is_meta:
            return
        channels = (self.hparams["model_args"] or {}).get("in_chans", self.hparams["in_chans"])
        self.net.eval()
        try:
            with torch.no_grad():
                self.net(weight.new_zeros(1, channels, side, side))
        except Exception as error:  # models raise errors of any kind
            raise UserError(
                f"model '{name}' does not accept images of {side} pixels ({error_line(error)}). Its own "
                f"image_size is {own}"
            ) from None
        self.net.train()

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Normalized images, shape ``(B, C, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.
        """
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch, mixed by mixup or CutMix."""
        images, labels = batch
        if self.mix:
            images, labels = self.apply_mix(images, labels)
        loss = self.compute_loss(self(images), labels)
        log: Kwargs = dict(on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.log("train_loss", loss, prog_bar=True, **log)
        return loss

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a training batch. Override it for another loss.

        ``val_loss`` stays the cross-entropy, binary with several classes per image.

        Args:
            logits: Shape ``(B, num_classes)``.
            targets: Class indices, shape ``(B,)``, or smoothed probabilities of mixed images, shape
                ``(B, num_classes)``; with several classes per image, 1 for these, shape ``(B, num_classes)``.
        """
        if self.loss_name == "asymmetric":
            return asymmetric_loss(logits, targets, self.loss_weights)
        if self.loss_name == "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.loss_weights)
        smoothing = self.label_smoothing if targets.dim() == 1 else 0.0
        if self.loss_name == "focal":
            if targets.dim() == 1:
                targets = mixup_target(targets, logits.shape[1], smoothing=smoothing)
            return focal_loss(logits, targets, self.focal_gamma, self.loss_weights)
        if self.loss_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        # Divided by the number of images instead of the sum of weights, which would differ between processes.
        options: Kwargs = dict(label_smoothing=smoothing, reduction="none")
        return F.cross_entropy(logits, targets, self.loss_weights, **options).mean()

    def predict_step(self, batch: Tensor | Sequence[Tensor] | None, batch_idx: int) -> Tensor | None:
        """Class probabilities, shape ``(B, num_classes)``, of images or of a batch with images first."""
        if batch is None:
            return None
        return self.probabilities(self(batch if isinstance(batch, Tensor) else batch[0]))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities, shape ``(B, num_classes)``, of logits of this shape."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(1)

    def apply_mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or CutMix to pairs of images. The last image of an odd batch is not mixed.

        Args:
            images: Shape ``(B, C, H, W)``.
            labels: Class indices, shape ``(B,)``.

        Returns:
            Images, and smoothed probabilities of shape ``(B, num_classes)``.
        """
        assert self.mix is not None
        pairs, n = len(images) // 2 * 2, len(images)
        rest = mixup_target(labels[pairs:], self.mix.num_classes, smoothing=self.label_smoothing)
        if not pairs:
            return images, rest
        mixed, targets = self.mix(images[:pairs].clone(), labels[:pairs])
        if pairs == n:
            return mixed, targets
        return torch.cat([mixed, images[pairs:]]), torch.cat([targets, rest])

    def describe(self) -> JsonObject:
        """Classes and preprocessing for a checkpoint."""
        image = resolve_model_data_config(self.net)
        image["mean"], image["std"] = self.normalization
        if side := self.hparams["image_size"]:
            image["input_size"] = (image["input_size"][0], side, side)
        return {**super().describe(), "image": {k: v for k, v in image.items() if k != "crop_mode"}}

    def on_validation_epoch_start(self) -> None:
        """Clear the images of the last validation."""
        self.plotted = []

    def validation_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> None:
        """Update the metrics with a batch. ``None`` is a batch without readable images."""
        if batch is None:
            return
        images, labels = batch
        logits = self(images).float()
        self.metrics.update(logits, labels)
        # Some images of every n-th batch, because images may be ordered by class.
        batches = self.evaluation_batches
        count = ceil_div(PLOTTED, batches) if batch_idx % max(1, batches // PLOTTED) == 0 else 0
        probabilities = self.probabilities(logits)
        for i in range(min(len(images), count)):
            if len(self.plotted) < PLOTTED:
                self.plotted.append((images[i].float().cpu(), labels[i].cpu(), probabilities[i].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all processes, including those without images."""
        for name, value in self.metrics.compute().items():
            self.log(
                f"val_{name}", value.to(self.device, torch.float32), prog_bar=f"val_{name}" == self.monitor
            )

    @override
    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.metrics, MultiLabelMetrics):
            checkpoint["thresholds"] = self.metrics.thresholds

    @override
    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.metrics, MultiLabelMetrics):
            self.metrics.thresholds = checkpoint.get("thresholds", self.metrics.thresholds)

    @override
    def use_thresholds(self, thresholds: list[float]) -> None:
        if isinstance(self.metrics, MultiLabelMetrics):
            self.metrics.thresholds, self.metrics.keep_thresholds = thresholds, True

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Write ``predictions.png``, ``classes.csv`` and a plot of the classes."""
        self.metrics.plot(plot_dir, classes)
        rows = [
            (self.to_display(image), *self._describe_prediction(target, probabilities, classes))
            for image, target, probabilities in self.plotted
        ]
        visualize.plot_predictions(rows, plot_dir / "predictions.png")

    def _describe_prediction(
        self, target: Tensor, probabilities: Tensor, classes: list[str]
    ) -> tuple[str, str, float]:
        """True classes, predicted classes, and the lowest probability of the latter."""
        if not isinstance(self.metrics, MultiLabelMetrics):
            probability, predicted = probabilities.max(0)
            return classes[int(target)], classes[int(predicted)], float(probability)
        is_found = probabilities >= torch.tensor(self.metrics.thresholds)
        names = [
            [classes[k] for k in chosen.nonzero().flatten().tolist()] for chosen in (target > 0.5, is_found)
        ]
        lowest = float(probabilities[is_found].min()) if is_found.any() else float(1 - probabilities.max())
        true, found = (", ".join(chosen) or "no class" for chosen in names)
        return true, found, lowest
