"""Fine-tuning: frozen stages and layer-wise learning-rate decay."""

import re
from typing import Any, Literal

from timm.models import FeatureListNet
from torch import nn

from crossformer_vision.compat import group_parameters
from crossformer_vision.errors import UserError, missing_extra
from crossformer_vision.models import create_on_meta
from crossformer_vision.models.dense.base import DenseModel
from crossformer_vision.types import Kwargs

Freeze = int | Literal["all"]


def layer_ids(net: nn.Module, backbone: str, model_args: Kwargs, coarse: bool) -> dict[str, int]:
    """Layer of each parameter of the backbone, from timm's ``group_matcher``.

    Args:
        net: Classifier, detector or segmenter.
        backbone: timm name of the model or backbone.
        model_args: Its arguments.
        coarse: Number stages instead of blocks. The stem is layer 0.

    Returns:
        Layer by parameter name. In a classifier, the classifier and the final norm are the last layer.

    Raises:
        UserError: If the model has no ``group_matcher``.
    """
    model = create_on_meta(backbone, **model_args) if isinstance(net, DenseModel) else net
    if not (matcher := getattr(model, "group_matcher", None)):
        raise UserError(
            f"model '{backbone}' has no group_matcher, which --model.freeze and --model.layer_decay need"
        )
    ids: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    if not isinstance(net, DenseModel):
        return ids
    is_flat = isinstance(net.body, FeatureListNet)  # renames layers.0 to layers_0
    names = {name: re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", name) if is_flat else name for name in ids}
    layers = {net.body_prefix + name: layer for name, layer in ids.items()}
    layers |= {net.body_prefix + names[name]: layer for name, layer in ids.items()}
    plain = {
        name: re.sub(r"\.(base_layer|lora_[AB]\.\w+)\.", ".", name) for name, _ in net.named_parameters()
    }
    return {name: layers[plain[name]] for name in plain if plain[name] in layers}


def freeze_parameters(net: nn.Module, stages: Freeze, backbone: str, model_args: Kwargs) -> None:
    """Freeze the first stages of a backbone.

    Args:
        net: Classifier, detector or segmenter.
        stages: Number of stages, in addition to the stem; ``"all"`` for everything except the classifier or
            the heads.
        backbone: timm name of the model or backbone.
        model_args: Its arguments.

    Raises:
        UserError: If the backbone has fewer stages.
    """
    if stages == "all":
        trained = head_parameters(net)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in trained)
        return
    ids = layer_ids(net, backbone, model_args, coarse=True)
    count = max(ids.values()) - (not isinstance(net, DenseModel))
    if stages > count:
        raise UserError(
            f"--model.freeze {stages}: model '{backbone}' has {count} stages. 'all' freezes them all"
        )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(ids.get(name, stages + 1) > stages)


def head_parameters(net: Any) -> set[str]:
    """Names of the parameters of the classifier, or of the neck and heads of a dense model."""
    if isinstance(net, DenseModel):
        return {name for name, _ in net.named_parameters() if not name.startswith(net.body_prefix)}
    heads = net.get_classifier()  # two for distilled models
    heads = heads if isinstance(heads, tuple) else (heads,)
    classifier = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) in classifier}


def add_lora(net: nn.Module, rank: int) -> None:
    """Add low-rank adapters (LoRA, arXiv 2106.09685) to the backbone. Only they and the heads are trained.

    The product of each adapter is added unscaled to the output of a linear layer. Position biases get none.

    Args:
        net: Classifier, detector or segmenter.
        rank: Rank of the adapters.

    Raises:
        UserError: If the backbone has no linear layers, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise missing_extra(error, "lora") from None
    trained = head_parameters(net)
    targets = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in trained and "position_bias" not in name
    ]
    if not targets:
        raise UserError("--model.lora: this backbone has no linear layers. Use --model.freeze or layer_decay")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained or ".lora_" in name)


def describe_frozen(net: nn.Module) -> str:
    """How many parameters are frozen, in one line."""
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in net.parameters())
    return f"frozen: {frozen / 1e6:.1f} of {total / 1e6:.1f} M parameters"


def merge_lora(net: nn.Module) -> None:
    """Merge adapters of ``add_lora`` into the weights, and remove them."""
    for name, module in list(net.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())


def set_frozen_to_eval(net: nn.Module) -> None:
    """Put modules whose parameters are all frozen into evaluation mode: norms, dropout, stochastic depth."""
    parameters = list(net.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        net.eval()
        return
    for child in net.children():
        set_frozen_to_eval(child)


def learning_rate_scales(
    net: nn.Module, backbone: str, model_args: Kwargs, layer_decay: float, backbone_scale: float
) -> dict[str, float]:
    """Factor of the learning rate of each parameter, as in timm's ``param_groups_layer_decay``.

    Args:
        net: Classifier, detector or segmenter.
        backbone: timm name of the model or backbone.
        model_args: Its arguments.
        layer_decay: Factor from one layer to the previous one. The classifier or the heads have factor 1.
        backbone_scale: Further factor of the backbone.

    Returns:
        Factor by parameter name.
    """
    heads = head_parameters(net)
    scales = {name: 1.0 if name in heads else backbone_scale for name, _ in net.named_parameters()}
    if layer_decay != 1:
        ids = layer_ids(net, backbone, model_args, coarse=False)
        last = max(ids.values()) + isinstance(net, DenseModel)
        for name, layer in ids.items():
            scales[name] *= layer_decay ** (last - layer)
    return scales
