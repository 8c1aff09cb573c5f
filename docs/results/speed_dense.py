"""Time and memory of backbones' features at 800x1280 on this machine: python docs/results/speed_dense.py

Each round times every model once, so that what else happens on the machine falls on all of them; the ratio
to the first model is taken inside a round, and the median over the rounds is printed. The memory is the
process's largest, less what it had before the image, each model in a process of its own.
"""

import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch

from crossformer_vision.models.backbones import create_backbone, feature_maps

FOURTEENS: dict[str, Any] = {"group_size": (14, 14, 7, 7), "interval": (16, 8, 2, 1)}
SEVENS: dict[str, Any] = {"group_size": (7, 7, 7, 7), "interval": (8, 4, 2, 1)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
    "small, map, 7": ("crossformer_small", {}),
    "small, map, 14/14/7/7": ("crossformer_small", FOURTEENS),
    "small, region, 7": ("crossformer_small", {"lda_span": "region"}),
    "small, region, 14/14/7/7": ("crossformer_small", {"lda_span": "region", **FOURTEENS}),
    "pp_small, map, 7": ("crossformer_pp_small", {"lda_span": "map", **SEVENS}),
    "pp_small, region (its classifier's)": ("crossformer_pp_small", {}),
}
ROUNDS, HEIGHT, WIDTH = 9, 800, 1280


def peak(name: str) -> None:
    model, keywords = MODELS[name]
    body = create_backbone(model, **keywords).eval()
    image = torch.randn(1, 3, HEIGHT, WIDTH)
    with torch.inference_mode():
        feature_maps(body, image[..., :64, :64])  # libraries have their own memory by now
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        feature_maps(body, image)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{name:36}  {(after - before) / 1024:.0f} MiB", flush=True)


def times() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, HEIGHT, WIDTH)
    bodies = {name: create_backbone(model, **keywords).eval() for name, (model, keywords) in MODELS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    with torch.inference_mode():
        for body in bodies.values():
            feature_maps(body, image)
        for _ in range(ROUNDS):
            for name, body in bodies.items():
                began = time.perf_counter()
                feature_maps(body, image)
                seconds[name].append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, 1 image {HEIGHT}x{WIDTH}")
    first = next(iter(MODELS))
    for name in MODELS:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:36}  {middle:.2f} times as fast as {first} (rounds: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    for name in MODELS:
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(name,))
        process.start()
        process.join()
    times()
