"""Write classifier files in the published 2021 format of the authors' code."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from conftest import PARITY
from parity.formula import formula_tensor

FILE_2021 = json.loads((PARITY / "classifier_file_2021.json").read_text())


class CfgNode(dict):
    """Stand-in that is pickled under the name of the yacs class."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


def state_dict_of_2021(name: str) -> dict[str, torch.Tensor]:
    """Return all entries of the published file: formula-based weights and index buffers."""
    state = {}
    for key, (shape, dtype) in FILE_2021[name].items():
        if key.endswith(("attn.biases", "attn.relative_position_index")):
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype)) + 7
        else:
            state[key] = formula_tensor(key, tuple(shape))
    return state


def write_file_of_2021(path: Path, name: str, monkeypatch) -> Path:
    """Write a classifier file with optimizer state and configuration, as published."""
    node = CfgNode(MODEL=CfgNode(TYPE="cross-scale", CROS=CfgNode(GROUP_SIZE=[7, 7, 7, 7])), LR=0.001)
    node.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", types.SimpleNamespace(CfgNode=CfgNode))
        torch.save(
            {
                "model": state_dict_of_2021(name),
                "optimizer": {
                    "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
                    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
                },
                "lr_scheduler": {"t_in_epochs": False, "base_values": [0.001]},
                "max_accuracy": np.float64(81.47),
                "epoch": 298,
                "config": node,
            },
            path,
        )
    return path
