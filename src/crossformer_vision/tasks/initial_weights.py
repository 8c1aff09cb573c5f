"""Weights that training starts from."""

from crossformer_vision.errors import counted
from crossformer_vision.models import find_model
from crossformer_vision.weights.loading import LoadReport
from crossformer_vision.weights.published import is_available


def use_published_weights(model: str, pretrained: bool | None, checkpoint: str | None) -> bool:
    """Whether to build a model with its published weights.

    Args:
        model: timm name of the model.
        pretrained: Whether to use them; ``None`` to use them if they are cached or downloadable.
        checkpoint: File of other weights, which takes precedence.
    """
    if checkpoint:
        return False
    return is_available(model) if pretrained is None else pretrained


def describe_initial_weights(
    model: str, num_classes: int, pretrained: bool, checkpoint: str | None, report: LoadReport | None
) -> str:
    """Describe the initial weights in one line.

    Args:
        model: timm name of the model or backbone.
        num_classes: Number of classes of the task.
        pretrained: Whether the model was built with its published weights.
        checkpoint: File of weights that were loaded, if any.
        report: Report on the weights loaded from it.
    """
    if checkpoint:
        return f"weights: {checkpoint}: {report}"
    if not pretrained:
        return "weights: none, training from scratch (--model.pretrained or --model.checkpoint loads some)"
    cfg = find_model(model)
    place = "bundled" if cfg.file else cfg.hf_hub_id or cfg.url or "published"
    line = f"weights: {model} ({place})"
    if cfg.num_classes == num_classes:
        return line
    return f"{line}; the classifier is new, for {counted(num_classes, 'class', 'classes')}"
