"""Compare a weather model with the same model as CREDIT writes it: ``python docs/results/wxformer_speed.py``.

The reference computes attention by einsum with full matrices and linear layers as 1x1 convolutions of maps
``(B, C, H, W)``. Both have the same weights. Rounds alternate between the two. Peak memory is measured in a
process of its own for each, beyond what weights, gradients and the input take.
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crossformer_vision.models.wxformer import WeatherCrossFormer
from crossformer_vision.models.wxformer_layers import GroupAttention, Stage

ROUNDS = 3
OPTIONS = {
    "frames": 1,
    "levels": 16,
    "dim": (128, 256, 512, 1024),
    "depth": (2, 2, 8, 2),
    "global_window_size": (10, 5, 2, 1),
    "local_window_size": 10,
    "cross_embed_strides": (2, 2, 2, 2),
    "use_spectral_norm": False,
    "interp": False,
}
SIZE = (160, 320)


def norm(x: Tensor, layer: torch.nn.Module) -> Tensor:
    """Normalization over channels of a map ``(B, C, H, W)``."""
    variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
    mean = torch.mean(x, dim=1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.g + layer.b


def attend(x: Tensor, layer: GroupAttention) -> Tensor:
    """Attention with full matrices for a map ``(B, C, H, W)``."""
    B, _, H, W = x.shape
    g, heads = layer.window, layer.heads
    x = norm(x, layer.norm)
    if layer.is_long:
        x = (
            x.unflatten(3, (g, -1))
            .unflatten(2, (g, -1))
            .permute(0, 3, 5, 1, 2, 4)
            .reshape(-1, x.shape[1], g, g)
        )
    else:
        x = (
            x.unflatten(3, (-1, g))
            .unflatten(2, (-1, g))
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, x.shape[1], g, g)
        )
    qkv = F.conv2d(x, layer.to_qkv.weight).flatten(2).unflatten(1, (3, heads, -1))
    q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1))
    logits = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k) + layer.dpb()
    out = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)
    out = F.conv2d(out.transpose(-1, -2).reshape(len(x), -1, g, g), layer.to_out.weight, layer.to_out.bias)
    rows, columns = H // g, W // g
    out = out.view(B, rows, columns, -1, g, g)
    out = out.permute(0, 3, 4, 1, 5, 2) if layer.is_long else out.permute(0, 3, 1, 4, 2, 5)
    return out.reshape(B, -1, H, W)


def stage_forward(stage: Stage, x: Tensor) -> Tensor:
    """A stage on maps ``(B, C, H, W)``."""
    for short, first, long, second in stage.layers:
        for attention, feed_forward in ((short, first), (long, second)):
            x = x + attend(x, attention)
            hidden = feed_forward.layers[1]
            output = feed_forward.layers[4]
            y = F.conv2d(norm(x, feed_forward.layers[0]), hidden.weight, hidden.bias)
            x = x + F.conv2d(F.gelu(y), output.weight, output.bias)
    return x


def build(kind: str) -> WeatherCrossFormer:
    """The model (``ours``) or the reference."""
    torch.manual_seed(0)
    model = WeatherCrossFormer(**OPTIONS)
    if kind == "reference":
        for module in model.modules():
            if isinstance(module, Stage):
                module.forward = stage_forward.__get__(module)
    return model


def field(model: WeatherCrossFormer) -> Tensor:
    """A random field."""
    return torch.randn(1, model.in_channels, *SIZE, generator=torch.Generator().manual_seed(0))


def encode(model: WeatherCrossFormer, x: Tensor) -> Tensor:
    """The layers of the encoder. Both models have the same decoder."""
    for embedding, stage in model.layers:
        x = stage(embedding(x))
    return x


def step(model: WeatherCrossFormer, x: Tensor, backward: bool) -> float:
    """Seconds of a forward pass, or of a forward and backward pass."""
    start = time.perf_counter()
    if backward:
        model.zero_grad()
        encode(model, x).square().mean().backward()
    else:
        with torch.inference_mode():
            encode(model, x)
    return time.perf_counter() - start


def peak_memory() -> float:
    """Largest memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def peak(kind: str) -> None:
    """Print the peak memory of a forward and backward pass beyond weights, gradients and input, in MB."""
    model = build(kind)
    x = field(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the earlier peak; Linux only
    before = peak_memory()
    encode(model, x).square().mean().backward()
    print(peak_memory() - before)


def main() -> None:
    """Print outputs' difference, times and memory."""
    models = {kind: build(kind) for kind in ("ours", "reference")}
    x = field(models["ours"])
    with torch.inference_mode():
        outputs = {kind: encode(model, x) for kind, model in models.items()}
    difference = (outputs["ours"] - outputs["reference"]).abs().max() / outputs["reference"].abs().max()
    print(f"largest difference relative to the largest output: {float(difference):.1e}")
    for backward in (False, True):
        times: dict[str, list[float]] = {kind: [] for kind in models}
        for _ in range(ROUNDS):
            for kind, model in models.items():
                times[kind].append(step(model, x, backward))
        ours, reference = (statistics.median(times[kind]) for kind in ("ours", "reference"))
        name = "forward and backward" if backward else "forward"
        print(f"{name}: ours {ours:.2f} s, reference {reference:.2f} s, ratio {reference / ours:.2f}")
    for kind in models:
        found = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True)
        print(f"peak memory of {kind}: {float(found.stdout):.0f} MB")


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
