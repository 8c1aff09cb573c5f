"""Plot time by image size, batch size and depth.

Usage: python docs/results/scaling.py RUNS

RUNS contains the folders `size`, `batch` and `depth`, which the commands in scaling.md write.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAMES = {
    "features:crossformer_small": "S, LDA over the map",
    "features:crossformer_small,lda_span=region": "S, LDA in regions",
    "features:swin_tiny_patch4_window7_224": "Swin-T",
}


def rows(kind: str) -> list[dict[str, Any]]:
    """Rows of a benchmark."""
    return json.loads((Path(sys.argv[1]) / kind / "benchmark.json").read_text(encoding="utf-8"))["rows"]


figure = Figure(figsize=(12, 7.5), layout="constrained")
(by_size, by_macs), (by_batch, by_depth) = figure.subplots(2, 2)

sizes = rows("size")
for what, name in NAMES.items():
    own = [row for row in sizes if row["model"] == what]
    sides = [row["size"][0] for row in own]
    by_size.plot(sides, [row["ms_median"] for row in own], "o-", label=name)
    by_macs.plot(sides, [row["macs"] / 1e9 for row in own], "o-", label=name)
first = next(row for row in sizes if row["model"] == "features:crossformer_small")
for axis, start in ((by_size, first["ms_median"]), (by_macs, first["macs"] / 1e9)):
    axis.plot(sides, [start * (s / sides[0]) ** 2 for s in sides], "k:", label="S², from the first point")
    axis.set(xscale="log", yscale="log", xlabel="image side S (pixels)", xticks=sides)
    axis.set_xticklabels(sides)
    axis.minorticks_off()
    axis.legend(fontsize=8)
by_size.set(ylabel="ms per image", title="Time by image size")
by_macs.set(ylabel="GMACs", title="Operations by image size")

batches = rows("batch")
by_batch.plot([row["batch"] for row in batches], [row["images_per_second"] for row in batches], "o-")
by_batch.set(xscale="log", xlabel="batch size", ylabel="images/s", title="Batch size, at 224x224", ylim=0)
by_batch.set_xticks([row["batch"] for row in batches], [row["batch"] for row in batches])
by_batch.minorticks_off()

depths = rows("depth")
blocks = [int(row["model"].split("(2,2,")[1].split(",")[0]) for row in depths]
by_depth.plot(blocks, [row["ms_median"] / row["batch"] for row in depths], "o-", label="time")
base = depths[0]["ms_median"] / depths[0]["batch"] / depths[0]["macs"]
by_depth.plot(
    blocks,
    [base * row["macs"] for row in depths],
    "k:",
    label="proportional to operations, from the first point",
)
by_depth.set(xlabel="blocks in the third stage", ylabel="ms per image", title="Depth, at 224x224", ylim=0)
by_depth.set_xticks(blocks)
by_depth.legend(fontsize=8)

for axis in figure.axes:
    axis.grid(alpha=0.3)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
