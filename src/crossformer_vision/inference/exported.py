"""Run files of ``crossformer export`` with ONNX Runtime or OpenVINO."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.data.rasters import PixelFormat
from crossformer_vision.errors import UserError, error_line, missing_extra
from crossformer_vision.inference.predictor import ModelInfo
from crossformer_vision.models.dense.transform import DetectorTransform
from crossformer_vision.types import Kwargs

METADATA_KEY = "crossformer_vision"  # key of the metadata in an exported file


class OnnxRuntime(nn.Module):
    """An ONNX file, executed by ONNX Runtime on the CPU.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def metadata(self) -> str | None:
        """JSON that ``crossformer export`` has stored in the file, if any."""
        return self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.session.run(None, {"images": np.ascontiguousarray(images.cpu().numpy())})
        return tuple(map(torch.from_numpy, outputs))


class OpenVinoRuntime(nn.Module):
    """An OpenVINO file, executed on the CPU.

    It computes in float32: by default OpenVINO uses bfloat16 if the CPU has it.

    Args:
        path: The ``.xml`` file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import openvino

        core = openvino.Core()
        self.model = core.read_model(path)
        self.compiled = core.compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def metadata(self) -> str | None:
        """JSON that ``crossformer export`` has stored in the file, if any."""
        has_metadata = self.model.has_rt_info([METADATA_KEY])
        return str(self.model.get_rt_info([METADATA_KEY]).value) if has_metadata else None

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        request = self.compiled.create_infer_request()  # one per call, so that threads can share the network
        outputs = request.infer({"images": np.ascontiguousarray(images.cpu().numpy())})
        return tuple(torch.from_numpy(outputs[output].copy()) for output in self.compiled.outputs)


Runtime = OnnxRuntime | OpenVinoRuntime


class ExportedNetwork(nn.Module):
    """An exported classifier or segmenter.

    Args:
        runtime: Runtime of the graph.
        has_fixed_size: Whether the graph accepts only one height and width.
    """

    def __init__(self, runtime: Runtime, has_fixed_size: bool = False) -> None:
        super().__init__()
        self.runtime, self.has_fixed_size = runtime, has_fixed_size

    @override
    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.runtime(images)
        return logits


class ExportedDetector(nn.Module):
    """An exported detector with torchvision's interface: a list of images of any size to boxes in pixels.

    Args:
        runtime: Runtime of the graph.
        image: Resizing and normalization of images.
    """

    def __init__(self, runtime: Runtime, image: Kwargs) -> None:
        super().__init__()
        self.runtime = runtime
        self.transform = DetectorTransform(image["min_size"], image["max_size"], image["mean"], image["std"])
        self.eval()

    @override
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        results = []
        for image in images:
            resized, _ = self.transform.resize(self.transform.normalize(image))
            outputs = dict(zip(("boxes", "labels", "scores", "masks"), self.runtime(resized[None])))
            is_object = outputs["scores"][0] > 0
            objects = {name: value[0][is_object] for name, value in outputs.items()}
            if "masks" in objects:
                objects["masks"] = objects["masks"][:, None]
            size = (int(image.shape[1]), int(image.shape[2]))
            resized_size = (int(resized.shape[1]), int(resized.shape[2]))
            results += self.transform.postprocess([objects], [resized_size], [size])
        return results


def load_exported(path: Path) -> tuple[nn.Module, ModelInfo]:
    """Load an exported file.

    Args:
        path: ``.onnx`` file or OpenVINO's ``.xml``.

    Returns:
        The network, and its description from the metadata of the file.

    Raises:
        UserError: If the file is damaged or not from ``crossformer export``, or its runtime is not installed.
    """
    try:
        runtime: Runtime = OnnxRuntime(path) if path.suffix == ".onnx" else OpenVinoRuntime(path)
        content = json.loads(runtime.metadata() or "{}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, "export") from None
    except Exception as error:  # runtimes raise errors of any kind
        raise UserError(f"{path}: cannot be read as an exported network ({error_line(error)})") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path}: has no metadata of crossformer export, and so cannot be used to predict")
    if content["task"] == "features":
        raise UserError(f"{path}: contains only a backbone (--features) and cannot predict")
    info = ModelInfo(
        task=content["task"],
        classes=content["classes"],
        source=str(path),
        image=content.get("image") or {},
        category_ids=content.get("category_ids") or None,
        values=content.get("values") or None,
        test=content.get("test") or {},
        test_scales=tuple(content.get("test_scales") or (1.0,)),
        min_score=content.get("min_score") or 0.0,
        pixel_format=PixelFormat(**content.get("pixel_format") or {}),
        display_channels=content.get("display_channels"),
        thresholds=content.get("thresholds"),
    )
    size = content.get("size")
    if info.task == "detection":
        if size:
            raise UserError(
                f"{path}: accepts only images of {size[0]}x{size[1]}, but a detector needs any size"
            )
        return ExportedDetector(runtime, info.image), info
    if info.task == "segmentation" and size:
        info.test = {**info.test, "window": size[0], "stride": None}
    return ExportedNetwork(runtime, bool(size)), info
