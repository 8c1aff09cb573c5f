"""Memory over many image sizes in turn: python docs/results/memory.py

Features of crossformer_tiny on 300 images whose sides lie between 320 and 800 pixels, in both forms of LDA:
what the process holds after each fifty, and its peak. What is kept of a size is bounded, so it stays flat.
"""

import random
import resource
from pathlib import Path

import timm
import torch

import crossformer_vision  # noqa: F401  (registers the models)


def held() -> float:
    """MiB of the process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


for span in ("map", "region"):
    draw = random.Random(0)
    model = timm.create_model("crossformer_tiny", features_only=True, lda_span=span).eval()
    line = []
    with torch.inference_mode():
        model(torch.zeros(1, 3, 800, 800))
        for n in range(1, 301):
            model(torch.randn(1, 3, draw.randint(320, 800), draw.randint(320, 800)))
            if n % 50 == 0:
                line.append(f"{held():.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{span:6}  after 50, 100, … sizes: {', '.join(line)} MiB; peak {peak:.0f} MiB", flush=True)
