"""Read weights from disk without running code in the files."""

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from crossformer_vision.compat import codecs_encode, numpy_scalar
from crossformer_vision.errors import UserError
from crossformer_vision.types import Checkpoint

# Signatures of files that are mistaken for checkpoints.
OTHER_FORMATS = {
    b"<!doctype html": "a web page, not a checkpoint. Download the file again",
    b"<html": "a web page, not a checkpoint. Download the file again",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip. Unpack it first",
}
# Types that files may contain besides tensors and plain values. Published classifier files contain their
# training configuration, a yacs node, which is read as a dictionary, and best scores as NumPy scalars.
SAFE_TYPES: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (numpy_scalar(), "numpy.core.multiarray.scalar"),
    (numpy_scalar(), "numpy._core.multiarray.scalar"),
    (codecs_encode(), "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]


def read_checkpoint(source: str | os.PathLike[str] | BinaryIO) -> Checkpoint:
    """Content of a safetensors or ``torch.save`` file.

    Args:
        source: Path or open binary file. An index of shards (``….index.json``) selects all shards.

    Raises:
        UserError: If the file does not exist, is truncated, is no checkpoint, or contains Python objects.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _read(source, Path(str(getattr(source, "name", "checkpoint"))))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        return _read(file, path)


def _read(file: BinaryIO, path: Path) -> Checkpoint:
    """Content of an open file with a path for messages."""
    start = file.read(64)
    file.seek(0)
    for signature, description in OTHER_FORMATS.items():
        if start.lstrip().lower().startswith(signature):
            raise UserError(f"{path}: is {description}")
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[4:8] == bytes(4)):
            # Under any name: eight bytes of length, then JSON.
            return (
                safetensors.torch.load_file(path) if path.is_file() else safetensors.torch.load(file.read())
            )
        with torch.serialization.safe_globals(SAFE_TYPES):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = f" ({match[1]})" if match else ""
        raise UserError(
            f"{path}: not loaded: it contains Python objects besides tensors{name}, which could run code"
        ) from error
    except Exception as error:  # damaged files raise errors of any kind
        raise UserError(f"{path}: truncated or not a checkpoint. Copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains a {type(content).__name__}, not a state dict")
    return content


def _read_shards(index: Path) -> Checkpoint:
    """All shards that an index (``model.safetensors.index.json``) lists, from its own folder."""
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if not names:
        raise UserError(f"{index}: lists no shards")
    content: Checkpoint = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names the shard {name}, which lies outside its folder")
        content |= read_checkpoint(index.parent / name)
    return content


def select_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """State dict in a checkpoint: averaged weights first, as in timm; or the checkpoint itself.

    Adapters (LoRA) of a run are merged into the weights.
    """
    for key in ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return _merge_lora({name: value for name, value in checkpoint.items() if isinstance(value, Tensor)})


def _merge_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the products of adapters to the weights of their layers, see ``tasks.finetuning.add_lora``."""
    merged = {name.replace(".base_layer.", "."): x for name, x in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if ".lora_A." in name:
            layer = name.partition(".lora_A.")[0]
            merged[f"{layer}.weight"] = (
                merged[f"{layer}.weight"] + weights[name.replace("lora_A", "lora_B")] @ down
            )
    return merged
