"""Weights on disk -> networks: published and own files, read safely."""

import _codecs
import json
import logging
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models import variants
from crossformer_vision.models.dense.backbones import DenseModel, under_own_names

log = logging.getLogger("crossformer_vision")

# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


_numpy_scalar: Any = np.float64(0).__reduce__()[0]
# How files begin that people take for checkpoints.
NO_CHECKPOINTS = {
    b"<!doctype html": "a web page, not a checkpoint; download the file again",
    b"<html": "a web page, not a checkpoint; download the file again",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
}
# What may stand in a file beside tensors and plain values. A published classification file holds its training
# configuration, a yacs node: for us a dictionary. Best scores are often NumPy's scalars, under the name of
# their module in NumPy 1 or 2; that function makes a number from a type and bytes.
PLAIN: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_codecs.encode, "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]


def read_checkpoint(source: str | os.PathLike[str] | BinaryIO) -> dict[str, Any]:
    """What a safetensors or a `torch.save` file holds, read without running any code in it.

    An index of shards (`….index.json`) stands for all of them.

    Args:
        source: a path, or an open binary file.

    Raises:
        UserError: no such file, truncated, not a checkpoint, or a pickle of anything but tensors and plain
            values.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _read(source, Path(str(getattr(source, "name", "checkpoint"))))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        return _read(file, path)


def _read(file: BinaryIO, path: Path) -> dict[str, Any]:
    """`read_checkpoint` of an open file, whose name is `path`."""
    start = file.read(64)
    file.seek(0)
    for magic, what in NO_CHECKPOINTS.items():
        if start.lstrip().lower().startswith(magic):
            raise UserError(f"{path}: is {what}")
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        # Eight bytes of length, then JSON: under any name.
        if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[4:8] == bytes(4)):
            return (
                safetensors.torch.load_file(path) if path.is_file() else safetensors.torch.load(file.read())
            )
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path}: not loaded: it holds Python objects beside tensors{what}, and they could run code"
        ) from error
    except Exception as error:  # of many kinds: whatever a damaged file makes a reader stumble over
        raise UserError(f"{path}: truncated or not a checkpoint; copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _read_shards(index: Path) -> dict[str, Any]:
    """All shards that an index (`model.safetensors.index.json`) lists, from its own folder."""
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if not names:
        raise UserError(f"{index}: lists no shards")
    content: dict[str, Any] = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names the shard {name}, which lies outside its folder")
        content |= read_checkpoint(index.parent / name)
    return content


def weights_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint: averaged ones first, as timm does; or the checkpoint itself."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def span_of_a_run(checkpoint: dict[str, Any], source: str) -> dict[str, str]:
    """The backbone's `lda_span` where a run's checkpoint needs one that its options do not name.

    Version 0.1 knew LDA in regions alone, and its checkpoints do not say so.
    """
    options = checkpoint.get("hyper_parameters", {})
    named = "lda_span" in checkpoint or "lda_span" in (options.get("model_args") or {})
    if named or not str(options.get("model")).startswith("crossformer"):
        return {}
    log.warning('%s: of version 0.1; built as it was trained, with lda_span="region"', source)
    return {"lda_span": "region"}


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------

PREFIXES = (
    "module.",
    "_orig_mod.",
    "net.",
    "model.",
    "backbone.",
)  # DataParallel, torch.compile, our tasks, the tasks of others, dense models


@dataclass(repr=False)
class LoadReport:
    """What `load_checkpoint` did, as names of the model's or the file's weights."""

    loaded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # classifier of another class count
    missing: list[str] = field(default_factory=list)  # kept as they were in the model
    unused: list[str] = field(default_factory=list)  # only in the file
    buffers: list[str] = field(default_factory=list)  # indices in the published files, no weights

    def __repr__(self) -> str:
        return f"<LoadReport {self}>"

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} weights loaded"]
        for what, names in (("of another shape", self.dropped), ("not in the file", self.missing)):
            if names:
                parts.append(f"{len(names)} {what}, left as they were ({_some(names)})")
        if self.unused:
            parts.append(f"{len(self.unused)} in the file unused ({_some(self.unused)})")
        if self.buffers:
            parts.append(f"{len(self.buffers)} index buffers in the file, which are no weights")
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module, checkpoint: str | os.PathLike[str] | dict[str, Any], adapt_classifier: bool = True
) -> LoadReport:
    """Load published or own weights into a network.

    Takes files of this library and published ones (`{"model": …}`, `{"state_dict": …}` or bare; names with
    `module.` or `backbone.` in front), `.pth`, `.ckpt` or `.safetensors`. First convolutions of another
    channel count are adapted as timm does, and Swin's position tables to windows of another side. The head
    and the final norm may be absent on either side; anything else must match. A detector takes files of whole
    detectors, and those of backbones alone, whose neck and heads it keeps as they were.

    Args:
        model: a classifier, a `features_only` backbone, or a detector.
        checkpoint: a path, or a state dict or checkpoint in memory.
        adapt_classifier: leave a classifier of another class count as it is, with a notice, instead of
            refusing.

    Returns:
        The names loaded, dropped, missing and unused; also logged.

    Raises:
        UserError: a file that cannot be read, or that belongs to another model.
    """
    source = "state dict" if isinstance(checkpoint, dict) else str(checkpoint)
    content = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    target = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(model, DenseModel):
        inner, heads, class_layers, rename = (
            model.body_name,
            model.heads,
            model.class_layers,
            model.rename_published,
        )
    else:
        inner = "model." if all(name.startswith("model.") for name in target) else ""  # features_only
        heads = class_layers = (inner + str(cfg.get("classifier", "head")),)

        def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
            known = {name: x for name, x in state.items() if inner + name in target}
            others = {name: x for name, x in state.items() if name not in known}
            return {inner + name: x for name, x in {**known, **under_own_names(model, others)}.items()}

    weights = weights_of(content)
    report = LoadReport(buffers=[name for name in weights if variants.PUBLISHED_BUFFERS.search(name)])
    state = _best_names({k: v for k, v in weights.items() if k not in report.buffers}, set(target), rename)

    convs = tuple(f"{inner}{name}.weight" for name in _as_tuple(cfg.get("first_conv")))
    optional = (*heads, inner + "norm.", inner + "head.")
    fitting: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in target:
            report.unused.append(name)
            continue
        if name in convs and value.shape != target[name].shape and value.shape[2:] == target[name].shape[2:]:
            value = adapt_input_conv(target[name].shape[1], value)
        if name.endswith("relative_position_bias_table") and value.shape != target[name].shape:
            value = _resized_table(value, target[name])
        if value.shape == target[name].shape:
            fitting[name] = value
        elif name.startswith(class_layers):
            report.dropped.append(name)
        else:
            raise UserError(
                f"{source}: belongs to another model: {name} is {list(value.shape)} there, "
                f"{list(target[name].shape)} here"
            )
    report.loaded = sorted(fitting)
    report.missing = sorted(set(target) - set(fitting) - set(report.dropped))
    if not any(not name.startswith(optional) for name in fitting):
        raise UserError(
            f"{source}: none of its weights fits this model ({_some(state) or 'it holds no tensors'})"
        )
    if inner and not isinstance(model, DenseModel):  # the later stages may not be wanted
        stages = {".".join(name.split(".")[:3]) for name in target}
        later = [n for n in report.unused if ".stages." in n and ".".join(n.split(".")[:3]) not in stages]
        report.unused = [name for name in report.unused if name not in later]
    partial = tuple(part for part in heads if any(name.startswith(part) for name in fitting))
    for names, what in ((report.missing, "lacks"), (report.unused, "has, and this model has not,")):
        wrong = [
            name
            for name in names
            if (not name.startswith(optional) and _is_backbone(name, inner, target))
            or name.startswith(partial)
        ]
        if wrong:
            raise UserError(
                f"{source}: belongs to another model: it {what} {len(wrong)} weights ({_some(wrong)})"
            )
    if not adapt_classifier and report.dropped:
        name = report.dropped[0]
        if isinstance(model, DenseModel):
            there, here = list(state[name].shape), list(target[name].shape)
            raise UserError(f"{source}: is for other classes: {name} is {there} there, {here} here")
        raise UserError(f"{source}: has {len(state[name])} classes, {len(target[name])} are wanted")
    if not adapt_classifier and report.missing:
        raise UserError(f"{source}: lacks {len(report.missing)} weights ({_some(report.missing)})")
    model.load_state_dict(fitting, strict=False)
    log.log(logging.WARNING if report.dropped or report.missing else logging.INFO, "%s: %s", source, report)
    return report


def _resized_table(table: Tensor, wanted: Tensor) -> Tensor:
    """Swin's biases by offset, for windows of another side: the last ones are cut to a small image's map."""
    side = (math.isqrt(len(wanted)) + 1) // 2
    if table.shape[1:] != wanted.shape[1:] or (2 * side - 1) ** 2 != len(wanted):
        return table
    return resize_rel_pos_bias_table_simple(table, (side, side), tuple(wanted.shape))


def _best_names(
    state: dict[str, Tensor], wanted: set[str], rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`state` under those names, stripped of prefixes and renamed, that match `wanted` most."""
    best: dict[str, Tensor] = {}
    tried = {name: name for name in state}
    while True:
        renamed = rename({short: state[name] for name, short in tried.items()})
        if len(wanted & renamed.keys()) > len(wanted & best.keys()) or not best:
            best = renamed
        prefix = next((p for p in PREFIXES if any(short.startswith(p) for short in tried.values())), None)
        if prefix is None:
            return best
        tried = {name: s.removeprefix(prefix) for name, s in tried.items() if s.startswith(prefix)}


def _is_backbone(name: str, inner: str, target: Iterable[str]) -> bool:
    """Whether a weight sits in a part that the model has: a detector's neck, say, does not."""
    return name.removeprefix(inner).split(".")[0] in {t.removeprefix(inner).split(".")[0] for t in target}


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
