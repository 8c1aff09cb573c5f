"""Numeric precision of a run: resolution of ``auto``, warnings and errors."""

import logging
from typing import Literal

import torch

from crossformer_vision.devices import computes_fast, emulation_note, fast_dtype
from crossformer_vision.errors import UserError

log = logging.getLogger("crossformer_vision")

Precision = Literal[
    "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true",
    "32", "bf16", "16", "64", 32, 16, 64,
]  # fmt: skip
"""``auto``, or a precision of Lightning's Trainer."""

AUTO = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed", torch.float32: "32-true"}


def training_device(accelerator: object) -> torch.device | None:
    """The device that Lightning's Trainer selects for an ``accelerator`` option.

    Args:
        accelerator: ``auto``, ``gpu``, ``cpu``, ``cuda``, ``mps`` or anything else that Lightning takes.

    Returns:
        The device, or ``None`` for an accelerator without a torch device type.
    """
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device(str(accelerator)) if accelerator in ("cpu", "cuda", "mps") else None


def resolve_precision(precision: object, accelerator: object, prefer_fast: bool = False) -> str:
    """Choose the precision of a run.

    A precision that the device emulates is accepted with a warning; weights in 16 bits are refused there.

    Args:
        precision: ``auto``, or a precision of Lightning's Trainer.
        accelerator: Accelerator option of Lightning's Trainer.
        prefer_fast: Replace mixed precision that the device emulates by float32, for weights that were
            trained on another device.

    Returns:
        A precision of Lightning's Trainer.

    Raises:
        UserError: If 16-bit weights are requested on a device that emulates them.
    """
    device = training_device(accelerator)
    if precision in ("auto", None):
        return "32-true" if device is None else AUTO[fast_dtype(device)]
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(
        str(precision), str(precision)
    )
    if device is None or not precision.startswith(("16", "bf16")):
        return precision
    # Lightning turns float16 on CPUs into bfloat16.
    bfloat16 = precision.startswith("bf16") or (device.type == "cpu" and precision == "16-mixed")
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    if computes_fast(device, dtype):
        return precision
    if precision.endswith("-true"):
        note = emulation_note(device, dtype)
        raise UserError(f"--trainer.precision {precision}: {note}. Use --trainer.precision auto")
    if prefer_fast:
        return "32-true"
    note = emulation_note(device, dtype)
    log.warning("--trainer.precision %s: %s. --trainer.precision auto is faster here.", precision, note)
    return precision
