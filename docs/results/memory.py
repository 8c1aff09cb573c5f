"""Memory of a process that extracts features of images of many sizes.

Usage: python docs/results/memory.py [MODEL]

Extracts features of 300 images with sides from 320 to 800 pixels, with both LDA spans and with a plain timm
model, and prints the memory after every 50 images. With glibc, free memory is returned to the system before
each measurement, because it grows by hundreds of MiB with any network.
"""

import ctypes
import random
import resource
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import crossformer_vision  # noqa: F401  (registers the models)


def resident_memory() -> float:
    """Resident memory in MiB, without free memory of the allocator."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


model_name = sys.argv[1] if len(sys.argv) > 1 else "crossformer_nano"
rows: list[tuple[str, dict[str, Any]]] = [
    (model_name, {"lda_span": "map"}),
    (model_name, {"lda_span": "region"}),
]
for name, keywords in [*rows, ("pvt_v2_b0", {})]:
    rng = random.Random(0)
    model = timm.create_model(name, features_only=True, **keywords).eval()
    line = []
    with torch.inference_mode():
        model(torch.zeros(1, 3, 800, 800))
        for n in range(1, 301):
            model(torch.randn(1, 3, rng.randint(320, 800), rng.randint(320, 800)))
            if n % 50 == 0:
                line.append(f"{resident_memory():.0f}")
    label = " ".join([name, *keywords.values()])
    print(f"{label:24}  after 50, 100, … sizes: {', '.join(line)} MiB", flush=True)
