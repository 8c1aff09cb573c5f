"""Networks: tensors in, tensors out."""

import difflib
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from crossformer_vision.errors import UserError, error_line
from crossformer_vision.types import Kwargs


def find_model(name: str) -> PretrainedCfg:
    """Look up timm's configuration of a model: input size, normalization, classifier.

    Args:
        name: timm name, with or without a tag of weights.

    Raises:
        ValueError: If there is no such model or tag; the message has similar names.
    """
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        names = " or ".join(f"'{name}'" for name in close)
        hint = f"Did you mean {names}?" if close else "timm.list_models() lists them"
        raise ValueError(f"unknown model '{name}'. {hint}")
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"model '{base}' has no weights called '{name.split('.')[-1]}'")
    return cfg


def create_on_meta(model: str, **kwargs: Any) -> nn.Module:
    """Create a timm model on the meta device, to query its attributes.

    Args:
        model: timm name.
        **kwargs: Arguments of the model.

    Returns:
        The model; on the CPU if its constructor computes with its weights.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(model, **kwargs)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(model, **kwargs)


def img_size_kwargs(model: str, image_size: int | None) -> Kwargs:
    """Arguments that build a timm model of fixed input size for another size.

    Args:
        model: timm name.
        image_size: Side of the images in pixels. ``None`` for the model's own.

    Returns:
        ``img_size``, or nothing if the model accepts the size without it.

    Raises:
        UserError: If the model cannot be built for this size.
    """
    cfg = find_model(model)
    own_size = cfg.input_size[-1]
    if image_size in (None, own_size) or not cfg.fixed_input_size:
        return {}
    try:
        create_on_meta(model, img_size=image_size)
    except Exception as error:  # models raise errors of any kind
        reason = "" if "img_size" in str(error) else f" ({error_line(error)})"
        raise UserError(
            f"model '{model}' does not accept images of {image_size} pixels{reason}. "
            f"Use image_size {own_size}"
        ) from None
    return {"img_size": image_size}


def drop_path_kwargs(model: str, rate: float) -> Kwargs:
    """Arguments that build a timm model with stochastic depth.

    Args:
        model: timm name.
        rate: Stochastic depth rate. Not every model accepts one, so 0 passes no argument.

    Raises:
        UserError: If the rate is not 0 and the model has no stochastic depth.
    """
    if not rate:
        return {}
    try:
        create_on_meta(model, drop_path_rate=rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(f"model '{model}' has no stochastic depth. Leave drop_path_rate at 0") from None
    return {"drop_path_rate": rate}


def in_chans_kwargs(channels: int) -> Kwargs:
    """Arguments that build a timm model for images with other than three channels."""
    return {} if channels == 3 else {"in_chans": channels}
