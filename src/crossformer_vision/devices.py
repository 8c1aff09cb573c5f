"""Dtypes that a device computes natively, the cost of emulated ones, and the number of CPU cores."""

import os
import time

import torch

from crossformer_vision.compat import onednn_has_bfloat16, onednn_has_float16

# Values of ONEDNN_MAX_CPU_ISA that switch bfloat16 instructions off although the CPU has them. oneDNN itself
# reports bfloat16 as unsupported below AVX512_CORE.
ISA_WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")


def count_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_fast(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a device computes matrix products of a dtype natively instead of emulating them.

    Emulated products take from five (AVX-512 without BF16) to fifty times (AVX2) as long as float32 ones; see
    ``docs/results/cpu_training.md``.

    Args:
        device: Device, or its type (``"cpu"``, ``"cuda"``, ``"mps"``).
        dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        ``True`` for float32 anywhere; for 16 bits where the device has instructions for them.
        ``False`` for 16 bits on devices that this was not measured on, such as MPS.
    """
    if dtype == torch.float32:
        return True
    kind = torch.device(device).type
    if kind == "cpu":
        if dtype == torch.float16:
            return onednn_has_float16()
        return os.environ.get("ONEDNN_MAX_CPU_ISA") not in ISA_WITHOUT_BFLOAT16 and onednn_has_bfloat16()
    if kind == "cuda":
        if dtype == torch.bfloat16:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    return False


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for mixed precision on a device.

    Returns:
        bfloat16 where it is native, else float16 on GPUs that have it, else float32. Never float16 on a CPU,
        where mixed precision in torch and Lightning is bfloat16 only.
    """
    if computes_fast(device, torch.bfloat16):
        return torch.bfloat16
    if torch.device(device).type != "cpu" and computes_fast(device, torch.float16):
        return torch.float16
    return torch.float32


def slowdown(device: torch.device | str, dtype: torch.dtype, side: int = 256, rounds: int = 3) -> float:
    """Measure how much longer a matrix product takes in a dtype than in float32.

    Args:
        device: Device to measure on.
        dtype: Dtype that is compared with float32.
        side: Rows and columns of the matrices.
        rounds: Products in each dtype after a warm-up; the fastest counts.

    Returns:
        Time in ``dtype`` divided by the time in float32, below 1 where ``dtype`` is faster.
    """

    def seconds(kind: torch.dtype) -> float:
        matrix = torch.ones(side, side, device=device, dtype=kind)
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for an accelerator
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(dtype) / seconds(torch.float32)


def emulation_note(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Warning about a dtype that the device emulates.

    Args:
        device: Device to compute on.
        dtype: Dtype that was chosen.

    Returns:
        Measured slowdown of a matrix product relative to float32, as text. ``None`` for a native dtype.
    """
    if computes_fast(device, dtype):
        return None
    name, ratio = str(dtype).removeprefix("torch."), slowdown(device, dtype)
    kind = torch.device(device).type.upper()
    return f"this {kind} emulates {name}: a matrix product takes {ratio:.0f} times as long as in float32"
