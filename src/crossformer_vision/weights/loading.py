"""Load published and own weights into networks."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from crossformer_vision.errors import UserError, counted
from crossformer_vision.models import variants
from crossformer_vision.models.dense.base import DenseModel, remap_keys
from crossformer_vision.types import Checkpoint
from crossformer_vision.weights.reading import read_checkpoint, select_weights

log = logging.getLogger("crossformer_vision")

# Prefixes added by DataParallel, torch.compile, LightningModules here and elsewhere, and dense models.
PREFIXES = ("module.", "_orig_mod.", "net.", "model.", "backbone.")


@dataclass(repr=False)
class LoadReport:
    """Result of ``load_checkpoint``, as names of weights.

    Attributes:
        loaded: Weights that were loaded.
        dropped: Weights of a classifier with another number of classes.
        missing: Weights of the model that are not in the file, and were not changed.
        unused: Weights that are only in the file.
        buffers: Buffers in published files that are not weights: indices and position biases.
    """

    loaded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<LoadReport {self}>"

    def __str__(self) -> str:
        parts = [f"{counted(len(self.loaded), 'weight')} loaded"]
        for reason, names in (("of another shape", self.dropped), ("not in the file", self.missing)):
            if names:
                parts.append(f"{len(names)} {reason}, not changed ({_abbreviate(names)})")
        if self.unused:
            parts.append(f"{len(self.unused)} in the file unused ({_abbreviate(self.unused)})")
        if self.buffers:
            parts.append(f"{len(self.buffers)} index buffers in the file ignored")
        return "; ".join(parts)


@dataclass
class _Target:
    """A network that weights are loaded into.

    Attributes:
        weights: Its state dict.
        body_prefix: Prefix of the backbone's names.
        heads: Prefixes of the heads' names, which a file of a backbone lacks.
        class_layers: Prefixes of layers whose shape depends on the number of classes.
        first_convs: Names of convolutions that are adapted to other channels.
        rename: Function that gives a state dict the names of the network.
    """

    weights: dict[str, Tensor]
    body_prefix: str
    heads: tuple[str, ...]
    class_layers: tuple[str, ...]
    first_convs: tuple[str, ...]
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    @property
    def optional(self) -> tuple[str, ...]:
        """Prefixes of weights that may be absent on either side."""
        return (*self.heads, self.body_prefix + "norm.", self.body_prefix + "head.")

    def has_part(self, name: str) -> bool:
        """Whether the network has the part, such as ``stages``, that a weight belongs to."""
        part = name.removeprefix(self.body_prefix).split(".")[0]
        return part in {own.removeprefix(self.body_prefix).split(".")[0] for own in self.weights}


def load_checkpoint(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Checkpoint, adapt_classifier: bool = True
) -> LoadReport:
    """Load published or own weights into a network.

    Accepts files of this library and published ones (``{"model": …}``, ``{"state_dict": …}`` or a bare state
    dict, with prefixes such as ``module.`` or ``backbone.``), as ``.pth``, ``.ckpt`` or ``.safetensors``.
    First convolutions are adapted to other numbers of channels, as in timm, and Swin's position tables to
    other windows. The head and the final norm may be absent on either side; everything else must match. A
    detector or segmenter also accepts a backbone, and keeps its neck and heads.

    Args:
        model: Classifier, ``features_only`` model, detector or segmenter.
        checkpoint: Path, or content of a checkpoint, or state dict.
        adapt_classifier: Keep the initialization of a classifier with another number of classes, and of a
            head that the file lacks, with a warning. ``False`` requires a complete, matching file.

    Returns:
        Names of weights that were loaded, dropped, missing and unused. They are also logged.

    Raises:
        UserError: If the file cannot be read or belongs to another model.
    """
    if isinstance(checkpoint, dict):
        return load_weights(model, checkpoint, "state dict", adapt_classifier)
    return load_weights(model, read_checkpoint(checkpoint), str(checkpoint), adapt_classifier)


def load_weights(
    model: nn.Module, content: Checkpoint, source: str, adapt_classifier: bool = True
) -> LoadReport:
    """``load_checkpoint`` for the content of a file.

    Args:
        model: The network.
        content: Content of a checkpoint, or state dict.
        source: Where it is from, for messages.
        adapt_classifier: See ``load_checkpoint``.
    """
    target = _describe_target(model)
    weights = select_weights(content)
    report = LoadReport(buffers=[name for name in weights if variants.PUBLISHED_BUFFERS.search(name)])
    weights = {name: value for name, value in weights.items() if name not in report.buffers}
    state = _best_names(weights, set(target.weights), target.rename)
    fitting = _fit_shapes(state, target, report, source)
    report.loaded = sorted(fitting)
    report.missing = sorted(set(target.weights) - set(fitting) - set(report.dropped))
    if not any(not name.startswith(target.optional) for name in fitting):
        names = _abbreviate(state) or "it contains no tensors"
        raise UserError(f"{source}: none of its weights fits this model ({names})")
    if target.body_prefix and not isinstance(model, DenseModel):
        report.unused = _without_later_stages(report.unused, target)
    _check_names(report, target, source)
    if not adapt_classifier:
        _check_complete(report, state, target, source, isinstance(model, DenseModel))
    model.load_state_dict(fitting, strict=False)
    is_partial = report.dropped or report.missing
    log.log(logging.WARNING if is_partial else logging.INFO, "%s: %s", source, report)
    return report


def _describe_target(model: nn.Module) -> _Target:
    weights = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    first_convs = _as_tuple(cfg.get("first_conv"))
    if isinstance(model, DenseModel):
        prefix, heads, class_layers = model.body_prefix, model.heads, model.class_layers
        rename = model.rename_published
    else:
        is_wrapped = all(name.startswith("model.") for name in weights)  # features_only
        prefix = "model." if is_wrapped else ""
        heads = class_layers = (prefix + str(cfg.get("classifier", "head")),)

        def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
            known = {name: x for name, x in state.items() if prefix + name in weights}
            others = {name: x for name, x in state.items() if name not in known}
            return {prefix + name: x for name, x in {**known, **remap_keys(model, others)}.items()}

    convs = tuple(f"{prefix}{name}.weight" for name in first_convs)
    return _Target(weights, prefix, heads, class_layers, convs, rename)


def _fit_shapes(
    state: dict[str, Tensor], target: _Target, report: LoadReport, source: str
) -> dict[str, Tensor]:
    """Weights with the shapes of the network. Adds unused and dropped ones to the report.

    Raises:
        UserError: If a shape differs that cannot be adapted.
    """
    fitting: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in target.weights:
            report.unused.append(name)
            continue
        wanted = target.weights[name]
        is_conv = name in target.first_convs and value.shape[2:] == wanted.shape[2:] and value.shape[1] == 3
        if is_conv and value.shape != wanted.shape:
            value = adapt_input_conv(wanted.shape[1], value)
        if name.endswith("relative_position_bias_table") and value.shape != wanted.shape:
            value = _resize_table(value, wanted)
        if value.shape == wanted.shape:
            fitting[name] = value
        elif name.startswith(target.class_layers):
            report.dropped.append(name)
        else:
            raise UserError(
                f"{source}: belongs to another model: {name} has shape {list(value.shape)} in the file, "
                f"{list(wanted.shape)} in the model"
            )
    return fitting


def _resize_table(table: Tensor, wanted: Tensor) -> Tensor:
    """Resize Swin's position table. Windows are cut to the map of a small image in its last stages."""
    side = (math.isqrt(len(wanted)) + 1) // 2
    if table.shape[1:] != wanted.shape[1:] or (2 * side - 1) ** 2 != len(wanted):
        return table
    return resize_rel_pos_bias_table_simple(table, (side, side), tuple(wanted.shape))


def _without_later_stages(names: list[str], target: _Target) -> list[str]:
    """Names of unused weights, except those of stages that a ``features_only`` model does not have."""
    stages = {".".join(name.split(".")[:3]) for name in target.weights}
    return [name for name in names if ".stages." not in name or ".".join(name.split(".")[:3]) in stages]


def _check_names(report: LoadReport, target: _Target, source: str) -> None:
    """Check that the backbone matches, and each head if any of its weights does.

    Raises:
        UserError: If the file belongs to another model.
    """
    heads = tuple(head for head in target.heads if any(name.startswith(head) for name in report.loaded))
    for names, reason in ((report.missing, "lacks"), (report.unused, "has")):
        wrong = [
            name
            for name in names
            if (not name.startswith(target.optional) and target.has_part(name)) or name.startswith(heads)
        ]
        if wrong:
            suffix = "" if reason == "lacks" else " that the model lacks"
            raise UserError(
                f"{source}: belongs to another model: it {reason} {counted(len(wrong), 'weight')} "
                f"({_abbreviate(wrong)}){suffix}"
            )


def _check_complete(
    report: LoadReport, state: dict[str, Tensor], target: _Target, source: str, is_dense: bool
) -> None:
    """Check that no weight keeps its initialization.

    Raises:
        UserError: If the file is for other classes or incomplete.
    """
    if report.dropped:
        name = report.dropped[0]
        there, here = list(state[name].shape), list(target.weights[name].shape)
        if is_dense:
            raise UserError(f"{source}: is for other classes: {name} has shape {there}, not {here}")
        raise UserError(f"{source}: has {there[0]} classes, {here[0]} are needed")
    if report.missing:
        raise UserError(
            f"{source}: lacks {counted(len(report.missing), 'weight')} ({_abbreviate(report.missing)})"
        )


def _best_names(
    state: dict[str, Tensor], wanted: set[str], rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The state dict with prefixes stripped and names replaced so that most names match the wanted ones."""
    best: dict[str, Tensor] = {}
    stripped = {name: name for name in state}
    while True:
        renamed = rename({short: state[name] for name, short in stripped.items()})
        if len(wanted & renamed.keys()) > len(wanted & best.keys()) or not best:
            best = renamed
        prefix = next((p for p in PREFIXES if any(short.startswith(p) for short in stripped.values())), None)
        if prefix is None:
            return best
        stripped = {name: s.removeprefix(prefix) for name, s in stripped.items() if s.startswith(prefix)}


def _as_tuple(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _abbreviate(names: Iterable[str]) -> str:
    """The first three names."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
