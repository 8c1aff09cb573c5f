"""Networks: tensors in, tensors out."""

import difflib
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg

from crossformer_vision.errors import UserError


def find_model(name: str) -> PretrainedCfg:
    """timm's configuration of a model: input size, normalisation, classifier.

    Raises:
        ValueError: unknown name; the message has close ones.
    """
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise ValueError(f"unknown model '{name}'; {hint}")
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"model '{base}' has no weights called '{name.split('.')[-1]}'")
    return cfg


def made(model: str, **keywords: Any) -> Any:
    """A timm model to be asked: of shapes alone, unless it computes with its weights when it is made."""
    try:
        with torch.device("meta"):
            return timm.create_model(model, **keywords)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(model, **keywords)


def fixed_size(model: str, image_size: int | None) -> dict[str, Any]:
    """The keyword of a timm model of fixed size for another one; none for its own, or if it takes any.

    Raises:
        UserError: a size that the model cannot be given.
    """
    cfg = find_model(model)
    own = cfg.input_size[-1]
    if image_size in (None, own) or not cfg.fixed_input_size:
        return {}
    try:
        made(model, img_size=image_size)
    except Exception as error:  # its own words for it, of any kind
        why = "" if "img_size" in str(error) else f" ({(str(error) or type(error).__name__).splitlines()[0]})"
        raise UserError(
            f"model '{model}' takes no images of {image_size} pixels{why}; take image_size {own}"
        ) from None
    return {"img_size": image_size}


def drop_path(model: str, rate: float) -> dict[str, Any]:
    """The keyword of a timm model for stochastic depth; none for a rate of 0, as not every model takes it.

    Raises:
        UserError: a rate for a model without stochastic depth.
    """
    if not rate:
        return {}
    try:
        made(model, drop_path_rate=rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(f"model '{model}' has no stochastic depth; leave drop_path_rate at 0") from None
    return {"drop_path_rate": rate}
