"""Numbers of images in epochs, batches and steps of a Trainer, also of a resumed run."""

import lightning as L

from crossformer_vision.compat import batch_progress
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.types import Checkpoint


def images_in(trainer: L.Trainer, global_batch: int, epochs: int = 0, batches: int = 0) -> int:
    """Number of images in epochs and batches.

    Args:
        trainer: Trainer with a training loader.
        global_batch: Images of a batch of all processes.
        epochs: Number of epochs.
        batches: Number of further batches.
    """
    per_epoch = trainer.num_training_batches
    return (epochs * (1 if per_epoch == float("inf") else int(per_epoch)) + batches) * global_batch


def images_in_steps(trainer: L.Trainer, global_batch: int, steps: int) -> int:
    """Number of images in optimizer steps. The last step of an epoch may have fewer batches.

    Args:
        trainer: Trainer with a training loader.
        global_batch: Images of a batch of all processes.
        steps: Number of steps.
    """
    accumulate, per_epoch = trainer.accumulate_grad_batches, trainer.num_training_batches
    if per_epoch == float("inf"):
        return images_in(trainer, global_batch, batches=steps * accumulate)
    epochs, more = divmod(steps, ceil_div(int(per_epoch), accumulate))
    return images_in(trainer, global_batch, epochs, min(more * accumulate, int(per_epoch)))


def rescale_progress(checkpoint: Checkpoint, trainer: L.Trainer, done: int) -> None:
    """Convert Lightning's position within the epoch to the current batch size.

    Args:
        checkpoint: Checkpoint that training resumes from, which is changed.
        trainer: Trainer of the resumed run.
        done: Completed batches of the epoch, in the current batch size.
    """
    if checkpoint.get("batches_per_epoch") == trainer.num_training_batches:
        return
    progress = batch_progress(checkpoint)
    before = progress["current"]
    # "completed" is one behind "ready" if the checkpoint was saved at the end of a batch.
    progress["current"] = {k: done - (before["ready"] - n) for k, n in before.items()}
