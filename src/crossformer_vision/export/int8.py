"""Exported networks in 8 bits for CPUs, by NNCF: quantised after training, with ranges that images show."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossformer_vision.errors import UserError
from crossformer_vision.inference.exported import KEY, OpenVinoNetwork
from crossformer_vision.inference.files import find_images
from crossformer_vision.inference.predictor import Predictor

IMAGES = 300  # of which ranges are taken


def recorded(predictor: Predictor, folder: str) -> list[Tensor]:
    """What a network is given of the images of a folder, evenly chosen: (B, 3, H, W) each.

    Raises:
        UserError: no image there, or one that cannot be read.
    """
    found = [str(file) for file, _ in find_images([folder])]
    given: list[Tensor] = []
    hook = predictor.net.register_forward_pre_hook(lambda _, args: given.append(args[0].cpu()))
    try:
        for file in found[:: -(-len(found) // IMAGES)]:
            predictor(file)
    finally:
        hook.remove()
    return given


def quantize(path: Path, predictor: Predictor, inputs: list[Tensor], said: dict[str, Any]) -> dict[str, Any]:
    """Turn an exported OpenVINO network, `path`, into one that computes in 8 bits what gains by it.

    Args:
        inputs: of `recorded`.
        said: what the file says of itself.

    Returns:
        `layers`, how many convolutions and matrix products are in 8 bits, of `all_layers`;
        `images`, how many the ranges come from; `agreement`, the share of them, or of their pixels, whose
        class stays.

    Raises:
        UserError: nothing was quantised.
    """
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # or the file that is written over would be in use
    data = nncf.Dataset(inputs, lambda x: {"images": x.numpy()})
    network = core.read_model(path)
    # Quantized depthwise convolutions, as in ACL, run at one image size only (OpenVINO 2026.4: "Eltwise shape
    # infer input shapes dim index: 1 mismatch").
    depthwise = [
        op.get_friendly_name() for op in network.get_ops() if op.get_type_name() == "GroupConvolution"
    ]
    model = nncf.quantize(
        network,
        data,
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=depthwise, validate=False),
    )
    layers = [
        op for op in model.get_ops() if op.get_type_name() in ("MatMul", "Convolution", "GroupConvolution")
    ]
    quantised = [op for op in layers if op.input_value(0).get_node().get_type_name() == "FakeQuantize"]
    if not quantised:
        raise UserError("no layer of this network was quantised")
    model.set_rt_info(json.dumps(said), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    call = OpenVinoNetwork(path)
    check_sizes(call, inputs[0], path)
    same = total = 0
    for images in inputs:
        with torch.no_grad():
            expected = predictor.net(images)
        one = expected.argmax(1) == call(images)[0].argmax(1)
        same, total = same + int(one.sum()), total + one.numel()
    return {
        "layers": len(quantised),
        "all_layers": len(layers),
        "images": len(inputs),
        "agreement": same / total,
    }


def check_sizes(call: OpenVinoNetwork, images: Tensor, path: Path) -> None:
    """Run a quantized network at several sizes and batch sizes. OpenVINO may fail at all but the first.

    Args:
        call: The quantized network.
        images: Images that it was quantized with, ``(B, 3, H, W)``.
        path: File of the network, for the message.

    Raises:
        UserError: If inference fails at a size, or an output is not finite.
    """
    height, width = images.shape[2:]
    for batch, h, w in ((1, height, width), (2, height + 33, width + 66), (1, 2 * height, 2 * width)):
        try:
            finite = all(bool(torch.isfinite(out).all()) for out in call(torch.rand(batch, 3, h, w)))
            reason = "an output is not finite"
        except RuntimeError as error:
            finite, reason = False, str(error).strip().splitlines()[-1]
        if not finite:
            raise UserError(
                f"{path.name}: the 8-bit network fails on this CPU at {batch}x3x{h}x{w} ({reason}). "
                "Export it without --int8"
            )
