"""Shared by all tests: one thread in each of two test processes, the oracle's records."""

import json
from pathlib import Path

import pytest
import torch

import crossformer_vision  # noqa: F401  (registers the models)

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def classifier_configs() -> dict:
    return json.loads((PARITY / "classifier_configs.json").read_text())


@pytest.fixture(scope="session")
def classifier_keys() -> dict:
    return json.loads((PARITY / "classifier_keys.json").read_text())
