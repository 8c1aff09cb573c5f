"""Which number formats a device computes fast, held against a measurement."""

import os
import subprocess
import sys

import pytest
import torch

from crossformer_vision.training import devices

BETWEEN = 3  # a native product takes at most twice as long as in float32, an emulated one at least five times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answer_agrees_with_a_measurement(dtype):
    assert devices.computes_fast("cpu", dtype) == (devices.slowdown("cpu", dtype) < BETWEEN)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512 to switch off")
@pytest.mark.parametrize(
    "isa",
    ["AVX2", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("AVX512_CORE", "AVX512_CORE_VNNI"))],
)
def test_instructions_that_onednn_may_not_use_do_not_count(isa):
    """A CPU of another kind, as far as this one can stand for it."""
    code = (
        "import torch; from crossformer_vision.training.devices import *;"
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
def test_dtype_of_a_cpu_follows_its_instructions(native, monkeypatch):
    monkeypatch.setattr(devices, "onednn_has_bfloat16", lambda: native)
    monkeypatch.setattr(devices, "onednn_has_float16", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert devices.fast_dtype("cpu") == (torch.bfloat16 if native else torch.float32)  # float16 never
    note = devices.emulation_note("cpu", torch.bfloat16)
    assert note is None if native else note.startswith("this CPU emulates bfloat16: a matrix product takes")


@pytest.mark.parametrize(
    "bfloat16, capability, expected",
    [(True, (9, 0), torch.bfloat16), (False, (7, 5), torch.float16), (False, (6, 1), torch.float32)],
)
def test_dtype_of_a_gpu_follows_its_generation(bfloat16, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.fast_dtype("cuda") == expected


def test_devices_without_a_measurement_compute_in_float32():
    assert devices.fast_dtype("mps") == torch.float32
