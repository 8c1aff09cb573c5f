"""Tests for the fast dtypes of a device, compared with measurements."""

import os
import subprocess
import sys

import pytest
import torch

from crossformer_vision import devices

BETWEEN = 3  # slowdown vs. float32: native matrix products take at most 2x, emulated ones at least 5x


@pytest.mark.slow  # timings depend on other processes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_dtype_matches_measurement(dtype):
    assert devices.computes_fast("cpu", dtype) == (devices.slowdown("cpu", dtype) < BETWEEN)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512 to switch off")
@pytest.mark.parametrize(
    "isa",
    ["AVX2", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("AVX512_CORE", "AVX512_CORE_VNNI"))],
)
def test_onednn_isa_limit_is_respected(isa):
    """Simulates a CPU with fewer instructions."""
    code = (
        "import torch; from crossformer_vision.devices import *;"
        "print(fast_dtype('cpu'), slowdown('cpu', torch.bfloat16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    dtype, ratio = done.stdout.split()
    assert dtype == "torch.float32" and float(ratio) > BETWEEN


@pytest.mark.parametrize("native", [False, True])
def test_cpu_dtype_depends_on_instruction_set(native, monkeypatch):
    monkeypatch.setattr(devices, "onednn_has_bfloat16", lambda: native)
    monkeypatch.setattr(devices, "onednn_has_float16", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert devices.fast_dtype("cpu") == (torch.bfloat16 if native else torch.float32)  # never float16
    note = devices.emulation_note("cpu", torch.bfloat16)
    assert note is None if native else note.startswith("this CPU emulates bfloat16: a matrix product takes")


@pytest.mark.parametrize(
    "bfloat16, capability, expected",
    [(True, (9, 0), torch.bfloat16), (False, (7, 5), torch.float16), (False, (6, 1), torch.float32)],
)
def test_gpu_dtype_depends_on_compute_capability(bfloat16, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.fast_dtype("cuda") == expected


def test_other_devices_default_to_float32():
    assert devices.fast_dtype("mps") == torch.float32
