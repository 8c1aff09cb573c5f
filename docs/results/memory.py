"""Memory over many image sizes in turn: python docs/results/memory.py [MODEL]

Features of 300 images whose sides lie between 320 and 800 pixels, in both forms of LDA and of a plain timm
model: what the process holds after each fifty. Under glibc its free lists are given back first: of images of
ever new sizes they grow by hundreds of MiB, whatever the network.
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


def held() -> float:
    """MiB of the process now, without what its allocator keeps free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


ours = sys.argv[1] if len(sys.argv) > 1 else "crossformer_nano"
rows: list[tuple[str, dict[str, Any]]] = [(ours, {"lda_span": "map"}), (ours, {"lda_span": "region"})]
for name, keywords in [*rows, ("pvt_v2_b0", {})]:
    draw = random.Random(0)
    model = timm.create_model(name, features_only=True, **keywords).eval()
    line = []
    with torch.inference_mode():
        model(torch.zeros(1, 3, 800, 800))
        for n in range(1, 301):
            model(torch.randn(1, 3, draw.randint(320, 800), draw.randint(320, 800)))
            if n % 50 == 0:
                line.append(f"{held():.0f}")
    label = " ".join([name, *keywords.values()])
    print(f"{label:24}  after 50, 100, … sizes: {', '.join(line)} MiB", flush=True)
