"""Train UPerNet of segmentation-models-pytorch (smp) for CamVid, with the training loop of this library.

Usage: python docs/results/camvid_smp.py DATA_ROOT RUN_DIR
"""

import sys

import lightning as L
import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn

import crossformer_vision  # noqa: F401  (registers the models)
from crossformer_vision.data.segmentation import SegmentationData
from crossformer_vision.tasks.segmentation import Segmentation
from crossformer_vision.training import run


class PadToMultiple(nn.Module):
    """Pad images to multiples of 32, which networks of smp require, and crop the output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        return self.net(F.pad(images, (0, -W % 32, 0, -H % 32)))[..., :H, :W]


def main(root: str, run_dir: str) -> None:
    """Train and validate."""
    L.seed_everything(0)
    data = SegmentationData(root, crop_size=256, scales=(0.5, 1.5), batch_size=8)
    task = Segmentation(
        segmenter="upernet",
        backbone="crossformer_nano.cifar10",
        num_classes=data.num_classes,
        width=64,
        optimizer="nmuon",
        lr=2e-3,
        schedule="poly",
        power=0.9,
    )
    net = smp.UPerNet(
        "tu-crossformer_nano.cifar10", encoder_weights=True, classes=data.num_classes, decoder_channels=64
    )
    task.net = PadToMultiple(net)  # any network that maps images to logits of the same size
    run.silence_lightning()
    options = run.RunOptions(dir=run_dir)
    trainer = L.Trainer(
        max_epochs=12,
        precision="bf16-mixed",
        check_val_every_n_epoch=2,
        gradient_clip_val=5.0,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        callbacks=run.run_callbacks(options, task, "# docs/results/camvid_smp.py\n", use_logger=False),
    )
    run.train(trainer, task, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
