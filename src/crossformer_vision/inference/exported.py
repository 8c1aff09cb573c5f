"""Files of `crossformer export` as networks to predict with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models.dense.openmmlab import Transform

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

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.session.run(None, {"images": np.ascontiguousarray(images.cpu().numpy())})
        return tuple(map(torch.from_numpy, found))


class OpenVinoNetwork(nn.Module):
    """An OpenVINO file as a network on the CPU.

    It computes in float32: left to itself OpenVINO takes bfloat16 where the CPU has it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import openvino

        core = openvino.Core()
        self.model = core.read_model(path)
        self.compiled = core.compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def said(self) -> str | None:
        return str(self.model.get_rt_info([KEY]).value) if self.model.has_rt_info([KEY]) else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        request = self.compiled.create_infer_request()  # a call of its own, from any thread
        found = request.infer({"images": np.ascontiguousarray(images.cpu().numpy())})
        return tuple(torch.from_numpy(found[output].copy()) for output in self.compiled.outputs)


class OneOutput(nn.Module):
    """An exported classifier or segmenter: (B, 3, H, W) -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.network(images)
        found: Tensor = logits
        return found


class ExportedDetector(nn.Module):
    """An exported detector with the ways of those in torch: images of any size, objects in their pixels."""

    def __init__(self, network: nn.Module, image: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.transform = Transform(image["min_size"], image["max_size"], image["mean"], image["std"])
        self.eval()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        results = []
        for image in images:
            resized, _ = self.transform.resize(self.transform.normalize(image))
            found = dict(
                zip(("boxes", "labels", "scores", "masks"), self.network(resized[None]), strict=False)
            )
            there = found["scores"][0] > 0
            one = {name: value[0][there] for name, value in found.items()}
            if "masks" in one:
                one["masks"] = one["masks"][:, None]
            size = (int(image.shape[1]), int(image.shape[2]))
            of_resized = (int(resized.shape[1]), int(resized.shape[2]))
            results += self.transform.postprocess([one], [of_resized], [size])
        return results


def read_exported(path: Path) -> dict[str, Any]:
    """An exported file in the form of a run's checkpoint, with its network.

    Raises:
        UserError: a file that is damaged, or not of `export`; a library that is not installed.
    """
    try:
        network = OnnxNetwork(path) if path.suffix == ".onnx" else OpenVinoNetwork(path)
        content = json.loads(network.said() or "{}")
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[export]'") from None
    except Exception as error:  # of other libraries
        line = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as an exported network ({line})") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path}: does not say what it is; predict takes files of crossformer export")
    if content["task"] == "features":
        raise UserError(f"{path}: holds the features of a backbone, from which nothing is predicted")
    if content["task"] == "detection":
        return {**content, "net": ExportedDetector(network, content["image"])}
    return {**content, "net": OneOutput(network)}
