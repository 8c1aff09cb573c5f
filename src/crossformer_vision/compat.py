"""Private APIs of other libraries, each with the versions it was tested with."""

import platform
from typing import Any

import torch
from torch import Tensor


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
    """Whether a tensor stands for a batch inside ``vmap`` or batched gradients. Tested with torch 2.15."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def in_forward_ad() -> bool:
    """Whether ``torch.autograd.forward_ad`` computes derivatives. Tested with torch 2.15."""
    return torch.autograd.forward_ad._current_level >= 0


def muon_coefficients(value: Any) -> list[tuple[float, float, float]]:
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
