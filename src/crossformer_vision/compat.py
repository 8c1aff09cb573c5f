"""Private and undocumented APIs of other libraries, each with the version it was tested with."""

import platform
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.data import DataLoader

from crossformer_vision.types import Checkpoint, JsonObject

if TYPE_CHECKING:
    import lightning as L
    from jsonargparse import ArgumentParser, Namespace
    from torchvision.models.detection._utils import BoxCoder as BoxCoder
    from torchvision.models.detection._utils import Matcher as Matcher
    from torchvision.models.detection.rpn import RegionProposalNetwork

from timm.models._features import FeatureGetterNet as FeatureGetterNet
from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._manipulate import group_parameters as group_parameters

foreach_mul_ = torch._foreach_mul_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_add_ = torch._foreach_add_
"""Operations on lists of tensors in one kernel, as torch's optimizers use them. Tested with torch 2.15."""

BATCH_NORM_BASE: type[nn.Module] = nn.modules.batchnorm._NormBase
"""Base class of all batch and instance norms. Tested with torch 2.15."""


def onednn_has_bfloat16() -> bool:
    """Whether torch's CPU kernels (oneDNN) run bfloat16 products on bfloat16 instructions.

    oneDNN also accepts bfloat16 on AVX-512 CPUs without these instructions and emulates it there, so on x86
    the CPU's own flags are read as well. Tested with torch 2.15.
    """
    if not torch.backends.mkldnn.is_available():
        return False  # macOS wheels have no oneDNN
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # honors ONEDNN_MAX_CPU_ISA
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # on Arm the check above reads the CPU's flags
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def onednn_has_float16() -> bool:
    """Whether torch's CPU kernels (oneDNN) run float16 products on float16 instructions.

    Tested with torch 2.15.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is batched by ``vmap`` or ``is_grads_batched``. Tested with torch 2.15."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def in_forward_ad() -> bool:
    """Whether ``torch.autograd.forward_ad`` computes derivatives. Tested with torch 2.15."""
    return torch.autograd.forward_ad._current_level >= 0


def muon_coefficients(value: str | Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """Coefficients of the Newton-Schulz iterations of timm's Muon. Tested with timm 1.0.31.

    Args:
        value: ``ns_coefficients`` of timm's optimizer: name of a preset, or coefficients.
    """
    from timm.optim.muon import _COEFFICIENTS, resolve_ns_coefficients

    return resolve_ns_coefficients(value, _COEFFICIENTS)


def is_muon_matrix(parameter: Tensor) -> bool:
    """Whether timm's Muon orthogonalizes updates of a parameter, by its shape. Tested with timm 1.0.31."""
    from timm.optim.muon import _is_suitable_for_muon

    return bool(_is_suitable_for_muon(parameter))


def get_trainer(module: "L.LightningModule") -> "L.Trainer | None":
    """The Trainer that a module is attached to, or ``None``. Tested with lightning 2.6."""
    return module._trainer


def setup_fit_data(trainer: "L.Trainer") -> None:
    """Count the training batches where Lightning has not done it yet, as for ``max_steps`` without epochs.

    Tested with lightning 2.6.
    """
    if getattr(trainer, "train_dataloader", ()) is None:
        trainer.fit_loop.setup_data()


def is_accumulating_gradients(trainer: "L.Trainer") -> bool:
    """Whether the current batch is not the last one of an optimizer step. Tested with lightning 2.6."""
    return trainer.fit_loop._should_accumulate()


def batch_progress(checkpoint: Checkpoint) -> JsonObject:
    """Lightning's counters of batches in a checkpoint of a fit. Tested with lightning 2.6."""
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]


def epochs_started(checkpoint: Checkpoint) -> int:
    """Number of epochs that a fit had started when a checkpoint was saved. Tested with lightning 2.6."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"])


def parser_actions(parser: "ArgumentParser") -> list[Action]:
    """All actions of an argparse or jsonargparse parser. Tested with Python 3.13 and jsonargparse 4.49."""
    return list(parser._actions)


def argument_types(parser: "ArgumentParser") -> dict[str, object]:
    """Type of each argument of a jsonargparse parser by its name. Tested with jsonargparse 4.49."""
    return {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}


def oblivious_sizes() -> AbstractContextManager[object]:
    """Context in which tracing does not treat sizes of 0 and 1 as special. Tested with torch 2.15."""
    import torch.fx.experimental._config as config

    return config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def assume(condition: bool | torch.SymBool) -> None:
    """Tell the tracer that a condition on sizes holds. Tested with torch 2.15."""
    torch._check(condition)


def set_size_ranges(graph: torch.export.ExportedProgram, min_side: int) -> None:
    """Widen the ranges of sizes in a graph to batches from 1 and sides from ``min_side``.

    The tracer narrows them to what holds for the example, although no operation depends on it. Tested with
    torch 2.15.

    Args:
        graph: The graph, which is changed.
        min_side: Minimum height and width.
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    for symbol, values in graph.range_constraints.items():
        if str(symbol).startswith("s"):
            minimum = 1 if values.lower <= 2 else min_side
            graph.range_constraints[symbol] = ValueRanges(minimum, values.upper)


def in_dispatch_mode() -> bool:
    """Whether a mode intercepts operations, such as fake tensors. Tested with torch 2.15."""
    return is_in_torch_dispatch_mode()


def in_functional_transform() -> bool:
    """Whether a transform of torch.func is active. Tested with torch 2.15."""
    return torch._C._functorch.maybe_current_level() is not None


def softmax_backward(grad: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of a softmax over the last dimension, from its output. Tested with torch 2.15.

    Args:
        grad: Gradient of the output.
        output: Output of the softmax.
        dtype: Dtype of the input.
    """
    return torch.ops.aten._softmax_backward_data(grad, output, -1, dtype)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks. Tested with torch 2.15."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks)
    return any((*hooks, module._backward_hooks))


def instantiate(parser: "ArgumentParser", config: "Namespace") -> "Namespace":
    """Build the objects that a configuration describes. Renamed in jsonargparse 4.49; tested with 4.49."""
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return build(config)


def dump_config(parser: "ArgumentParser", config: "Namespace") -> str:
    """A configuration as YAML, with null values, without values that follow from others.

    An argument was renamed in jsonargparse 4.49; tested with 4.49.
    """
    options = {"skip_unset": False} if hasattr(parser, "instantiate") else {"skip_none": False}
    return str(parser.dump(config, skip_link_targets=True, **options))


def numpy_scalar() -> Callable[..., object]:
    """NumPy's function that restores a pickled scalar from a dtype and bytes. Tested with NumPy 2.4."""
    return np.float64(0).__reduce__()[0]  # type: ignore[return-value]


def codecs_encode() -> Callable[..., object]:
    """The function that pickled NumPy scalars use to encode bytes. Tested with Python 3.13."""
    import _codecs

    return _codecs.encode


def shut_down_workers(loader: DataLoader[object]) -> None:
    """End the workers of a DataLoader, as Lightning does. Tested with torch 2.15."""
    workers = loader._iterator
    loader._iterator = None
    if workers is not None and hasattr(workers, "_shutdown_workers"):
        workers._shutdown_workers()


def rpn_proposal_counts(rpn: "RegionProposalNetwork") -> tuple[int, int]:
    """Proposals before (per level) and after (per image) non-maximum suppression, in evaluation.

    Args:
        rpn: A torchvision ``RegionProposalNetwork``. Tested with torchvision 0.29.
    """
    return rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"]


@contextmanager
def compiler_config(freezing: bool) -> Iterator[None]:
    """Settings of torch.compile for many networks that share code. Tested with torch 2.15.

    Args:
        freezing: Treat parameters as constants.
    """
    import torch._dynamo
    import torch._inductor.config

    limit = torch._dynamo.config.patch(recompile_limit=256)
    with limit, torch._inductor.config.patch(freezing=freezing):
        yield
