"""Shared test configuration: single-threaded test processes and the reference outputs for parity tests."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch is imported

import pytest

import crossformer_vision  # noqa: F401  (registers the models)

PARITY = Path(__file__).parent / "parity"
LARGE_MODELS = (  # tested only in slow tests because the smaller models share their code
    "crossformer_base",
    "crossformer_large",
    "crossformer_pp_base",
    "crossformer_pp_large",
    "crossformer_pp_huge",
)


def mark_large_models(names: list[str]) -> list:
    """Build test parameters from model names. Large models are marked as slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in LARGE_MODELS else ()) for name in names]


@pytest.fixture(scope="session")
def classifier_configs() -> dict:
    return json.loads((PARITY / "classifier_configs.json").read_text())


@pytest.fixture(scope="session")
def classifier_keys() -> dict:
    return json.loads((PARITY / "classifier_keys.json").read_text())
