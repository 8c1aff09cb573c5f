"""Post-training quantization of exported networks to 8 bits for CPUs, by NNCF."""

import json
from pathlib import Path

import torch
from torch import Tensor

from crossformer_vision.data.images import EXTENSIONS
from crossformer_vision.errors import UserError
from crossformer_vision.inference.exported import METADATA_KEY, OpenVinoRuntime
from crossformer_vision.inference.files import find_images
from crossformer_vision.inference.predictor import Predictor
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.types import JsonObject

MAX_IMAGES = 300  # maximum number of calibration images


def record_inputs(predictor: Predictor, folder: str) -> list[Tensor]:
    """Inputs that the network gets for images of a folder, evenly spread over it.

    Args:
        predictor: Predictor of the network.
        folder: Folder of images.

    Returns:
        Normalized images, shape ``(B, C, H, W)`` each.

    Raises:
        UserError: If there is no image, or one cannot be read.
    """
    files = [str(file) for file, _ in find_images([folder]) if file.suffix.lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{folder}: no images in this folder")
    inputs: list[Tensor] = []
    hook = predictor.net.register_forward_pre_hook(lambda _, args: inputs.append(args[0].cpu()))
    try:
        for file in files[:: ceil_div(len(files), MAX_IMAGES)]:
            predictor(file)
    finally:
        hook.remove()
    return inputs


def quantize(path: Path, predictor: Predictor, inputs: list[Tensor], metadata: JsonObject) -> JsonObject:
    """Quantize an OpenVINO file to 8 bits in place.

    Args:
        path: The ``.xml`` file.
        predictor: Predictor of the PyTorch model.
        inputs: Calibration data from ``record_inputs``.
        metadata: Metadata that is stored in the file.

    Returns:
        ``layers``: convolutions and matrix products in 8 bits, of ``all_layers``; ``images``: number of
        inputs; ``agreement``: share of them, or of their pixels, whose class stays the same.

    Raises:
        UserError: If no layer was quantized, or the network does not run on this CPU.
    """
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is overwritten while the network is open
    network = core.read_model(path)
    # Quantized depthwise convolutions, as in ACL, run at one image size only (OpenVINO 2026.4: "Eltwise shape
    # infer input shapes dim index: 1 mismatch").
    depthwise = [
        op.get_friendly_name() for op in network.get_ops() if op.get_type_name() == "GroupConvolution"
    ]
    model = nncf.quantize(
        network,
        nncf.Dataset(inputs, lambda x: {"images": x.numpy()}),
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=depthwise, validate=False),
    )
    kinds = ("MatMul", "Convolution", "GroupConvolution")
    layers = [op for op in model.get_ops() if op.get_type_name() in kinds]
    quantized = [op for op in layers if op.input_value(0).get_node().get_type_name() == "FakeQuantize"]
    if not quantized:
        raise UserError("no layer of this network was quantized")
    model.set_rt_info(json.dumps(metadata), [METADATA_KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    runtime = OpenVinoRuntime(path)
    check_sizes(runtime, inputs[0], path)
    return {
        "layers": len(quantized),
        "all_layers": len(layers),
        "images": len(inputs),
        "agreement": measure_agreement(runtime, predictor, inputs),
    }


def measure_agreement(runtime: OpenVinoRuntime, predictor: Predictor, inputs: list[Tensor]) -> float:
    """Share of images, or of their pixels, that get the same class from both networks.

    Args:
        runtime: Quantized network.
        predictor: Predictor of the original network.
        inputs: Normalized images.
    """
    same = total = 0
    for images in inputs:
        with torch.no_grad():
            expected = predictor.net(images.to(predictor.device)).cpu()
        is_same = expected.argmax(1) == runtime(images)[0].argmax(1)
        same, total = same + int(is_same.sum()), total + is_same.numel()
    return same / total


def check_sizes(runtime: OpenVinoRuntime, images: Tensor, path: Path) -> None:
    """Run a quantized network at several sizes and batch sizes.

    OpenVINO may fail at sizes other than the first.

    Args:
        runtime: The quantized network.
        images: Images that it was quantized with, shape ``(B, C, H, W)``.
        path: File of the network, for the message.

    Raises:
        UserError: If inference fails at a size, or an output is not finite.
    """
    height, width = images.shape[2:]
    for batch, h, w in ((1, height, width), (2, height + 33, width + 66), (1, 2 * height, 2 * width)):
        try:
            outputs = runtime(torch.rand(batch, images.shape[1], h, w))
            is_finite, reason = all(bool(torch.isfinite(x).all()) for x in outputs), "an output is not finite"
        except RuntimeError as error:
            is_finite, reason = False, str(error).strip().splitlines()[-1]
        if not is_finite:
            raise UserError(
                f"{path.name}: the 8-bit network fails on this CPU at {batch}x3x{h}x{w} ({reason}). "
                "Export it without --int8"
            )
