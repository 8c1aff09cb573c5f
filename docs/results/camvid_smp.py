"""CamVid with segmentation-models-pytorch's UPerNet on crossformer_nano, by this library's training loop.

python docs/results/camvid_smp.py CAMVID RUN
"""

import sys

import lightning as L
import segmentation_models_pytorch as smp

import crossformer_vision  # noqa: F401  (registers the models)
from crossformer_vision.data.segmentation import SegmentationData
from crossformer_vision.tasks import run
from crossformer_vision.tasks.segmentation import Segmentation


def main(root: str, folder: str) -> None:
    L.seed_everything(0)
    data = SegmentationData(root, crop_size=256, scales=(0.5, 1.5), batch_size=8)
    task = Segmentation(
        segmenter="upernet",
        model="crossformer_nano.cifar10",
        num_classes=data.num_classes,
        width=64,
        optimizer="nmuon",
        lr=2e-3,
        schedule="poly",
        power=0.9,
    )
    task.net = smp.UPerNet(  # any network from images to logits of their size
        "tu-crossformer_nano", encoder_weights="imagenet", classes=data.num_classes, decoder_channels=64
    )
    kept = run.Run(folder)
    run.quiet()
    trainer = L.Trainer(
        max_epochs=12,
        precision="bf16-mixed",
        check_val_every_n_epoch=2,
        gradient_clip_val=5.0,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **kept.trainer_parts(task, "# docs/results/camvid_smp.py\n", False),
    )
    run.train(trainer, task, data, kept, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
