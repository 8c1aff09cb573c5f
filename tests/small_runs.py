"""Options for small training runs, and readers for their outputs."""

import csv

from crossformer_vision.weights.reading import read_checkpoint

CLASSIFICATION = """
  --data.train_images 64 --data.val_images 20 --data.image_size 32 --data.batch_size 16 --data.num_workers 0
  --model.model_args {"depths":[1,1,1,1]} --trainer.max_epochs 3 --trainer.accelerator cpu
  --model.optimizer adamw --trainer.precision 32
""".split()
DETECTION = """
  --task detection --data.image_size 64 --data.train_images 32 --data.val_images 7 --data.batch_size 4
  --data.num_workers 0 --model.width 16 --model.min_size 64 --model.max_size 96 --trainer.max_epochs 2
  --model.model_args {"depths":[1,1,1,1]} --trainer.accelerator cpu
  --model.optimizer adamw --trainer.precision 32
""".split()
SEGMENTATION = """
  --task segmentation --data.crop_size 48 --data.train_images 16 --data.val_images 5 --data.batch_size 4
  --data.num_workers 0 --model.width 16 --trainer.max_epochs 2
  --model.model_args {"depths":[1,1,1,1]} --trainer.accelerator cpu
  --model.optimizer adamw --trainer.precision 32
""".split()


def read_metrics(run_dir):
    """Return the rows of ``metrics.csv``."""
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def read_weights(path):
    """Return the state dict of a checkpoint."""
    return read_checkpoint(path)["state_dict"]
