"""Images a second of several timm models on this machine's CPU, interleaved: python docs/results/speed.py

Each round times every model once, so that what else happens on the machine falls on all of them; the ratio
to the first model is taken inside a round, and the median over the rounds is printed.
"""

import statistics
import time

import timm
import torch

import crossformer_vision  # noqa: F401  (registers the models)

NAMES = ("swin_tiny_patch4_window7_224", "crossformer_small", "crossformer_tiny", "crossformer_pp_small")
ROUNDS, BATCH, SIZE = 15, 8, 224

torch.manual_seed(0)
images = torch.randn(BATCH, 3, SIZE, SIZE)
models = {name: timm.create_model(name).eval() for name in NAMES}
rates: dict[str, list[float]] = {name: [] for name in NAMES}
with torch.inference_mode():
    for model in models.values():
        model(images)
    for _ in range(ROUNDS):
        for name, model in models.items():
            began = time.perf_counter()
            model(images)
            rates[name].append(BATCH / (time.perf_counter() - began))
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, batch {BATCH}, {SIZE}x{SIZE}")
for name in NAMES:
    ratios = [a / b for a, b in zip(rates[name], rates[NAMES[0]], strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{name:32}  {middle:.2f} times {NAMES[0]} (rounds: {low:.2f} to {high:.2f})")
