"""Files of `crossformer export` as networks to predict with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossformer_vision.errors import UserError

KEY = "crossformer_vision"  # of what a file says of itself


class OnnxNetwork(nn.Module):
    """An ONNX file as a network on the CPU, by ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def said(self) -> str | None:
        return self.session.get_modelmeta().custom_metadata_map.get(KEY)

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"images": np.ascontiguousarray(images.cpu().numpy())})
        return torch.from_numpy(logits)


def read_exported(path: Path) -> dict[str, Any]:
    """An exported ONNX file in the form of a run's checkpoint, with its network.

    Raises:
        UserError: a file that is damaged, or not of `export`; a library that is not installed.
    """
    try:
        network = OnnxNetwork(path)
        content = json.loads(network.said() or "{}")
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[export]'") from None
    except Exception as error:  # of other libraries
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as an exported network ({line})") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path}: does not say what it is; predict takes files of crossformer export")
    return {**content, "net": network}
