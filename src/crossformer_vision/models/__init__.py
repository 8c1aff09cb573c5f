"""Networks: tensors in, tensors out."""

import difflib

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg


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
