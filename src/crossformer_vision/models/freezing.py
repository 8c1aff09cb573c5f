"""Freeze position biases for deployment."""

import torch
from torch import nn

from crossformer_vision.models.crossformer import DynamicPositionBias


def freeze_position_bias(model: nn.Module, height: int = 224, width: int = 224) -> nn.Module:
    """Replace the computation of DPB in a trained CrossFormer by buffers.

    A buffer holds the biases of the largest offsets in images of up to ``height x width``. Smaller groups use
    a part of it, and larger ones are computed. Freeze again after weights have changed. ``model.train()``
    removes the buffers.

    Args:
        model: Classifier, ``features_only`` model, detector or segmenter.
        height: Height of the largest image, in pixels.
        width: Width of the largest image, in pixels.

    Returns:
        The model, in eval mode.
    """
    body: nn.Module = getattr(model.eval(), "body", model)
    modules = [module for module in model.modules() if isinstance(module, DynamicPositionBias)]
    if not modules:
        return model
    sizes: dict[DynamicPositionBias, tuple[int, int]] = {}
    for module in modules:
        module.frozen = None
    hooks = [m.register_forward_pre_hook(lambda m, args: sizes.update({m: args[:2]})) for m in modules]
    weight = next(p for p in body.parameters() if p.dim() == 4)  # of the first embedding
    image = weight.new_zeros(1, weight.shape[1], height, width)
    with torch.no_grad():
        body(image)
        for hook in hooks:
            hook.remove()
        for module, (gh, gw) in sizes.items():
            module.frozen = module.compute(gh, gw, image).view(-1, 2 * gh - 1, 2 * gw - 1)
    return model
