"""Report of a data check: a summary in text, and a page with pictures."""

import html
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossformer_vision.errors import counted
from crossformer_vision.files import write_text
from crossformer_vision.plotting import drawing
from crossformer_vision.tools.data_check import DataCheck
from crossformer_vision.tools.image_facts import ImageFacts

MAX_CLASSES = 30  # in tables
TILE = 240  # side of a picture in the contact sheet, in pixels
COLUMNS = 4
HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 1040px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right }
.error { color: #b00020 }
.warning { color: #8a5a00 }
img { max-width: 100% }
code { overflow-wrap: anywhere }
"""


def format_summary(check: DataCheck) -> str:
    """The result in text: data, sizes, classes and findings."""
    labels = f", {check.label_format} labels" if check.label_format else ""
    lines = [f"{check.root}: {check.task} ({check.reason}){labels}"]
    for split, total in check.total.items():
        images = [image for image in check.images if image.split == split]
        sample = f", {check.checked[split]} checked" if check.checked[split] < total else ""
        lines.append(f"  {split:<6} {counted(total, 'image')}{sample}; {describe_sizes(images)}")
    lines += [f"  {row}" for row in _class_rows(check)]
    lines += [str(finding) for finding in check.findings] or ["no problems found"]
    return "\n".join(lines)


def describe_sizes(images: list[ImageFacts]) -> str:
    """Range of sizes, channels and values of images."""
    if not images:
        return "none can be read"
    widths, heights = zip(*(image.size for image in images), strict=True)
    smallest, largest = f"{min(widths)}x{min(heights)}", f"{max(widths)}x{max(heights)}"
    sizes = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"
    kinds = Counter(f"{counted(image.channels, 'channel')} of {image.dtype}" for image in images)
    low, high = min(image.low for image in images), max(image.high for image in images)
    return f"{sizes}; {', '.join(kinds)}; values {low:g} to {high:g}"


def _class_rows(check: DataCheck) -> Iterator[str]:
    """One line per class with its numbers in each split."""
    width = max((len(name) for name in check.classes[:MAX_CLASSES]), default=0)
    for k, name in enumerate(check.classes[:MAX_CLASSES]):
        numbers = "  ".join(f"{split} {counts[k]:>8}" for split, counts in check.counts.items())
        yield f"{name:<{width}}  {numbers}"
    if len(check.classes) > MAX_CLASSES:
        yield f"… and {counted(len(check.classes) - MAX_CLASSES, 'more class', 'more classes')}"


def write_report(check: DataCheck, output: Path) -> Path:
    """Write ``index.html`` and its pictures.

    Args:
        check: Result of ``check_data``.
        output: Folder to write to.

    Returns:
        The page.
    """
    output.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{_escape(check.root)}</h1>", f"<p>{_escape(check.task)}: {_escape(check.reason)}</p>"]
    parts += ["<h2>Findings</h2>", *_list_findings(check), "<h2>Images</h2>", *_table_of_splits(check)]
    parts += ["<h2>Classes</h2>", *_table_of_classes(check)]
    for split, samples in check.samples.items():
        name = f"{split}.png"
        draw_contact_sheet(samples, check.classes).save(output / name)
        parts.append(f'<h2>{_escape(split)}</h2><img src="{name}" alt="Images of {split} with labels">')
    page = f"{HEAD}<title>Data check</title><style>{STYLE}</style>"
    write_text(output / "index.html", page + "\n".join(parts))
    return output / "index.html"


def draw_contact_sheet(samples: list[tuple[Any, Any]], classes: list[str]) -> Image.Image:
    """Draw images with their labels in a grid.

    Args:
        samples: Images as transforms take them, and targets.
        classes: Class names.
    """
    tiles = [_draw_labels(image, target, classes) for image, target in samples]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
    for n, tile in enumerate(tiles):
        tile.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(tile, (n % COLUMNS * TILE, n // COLUMNS * TILE))
    return sheet


def _draw_labels(image: Any, target: Any, classes: list[str]) -> Image.Image:
    """An image with its labels."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray((drawing.stretch(image.numpy()) * 255).round().astype(np.uint8))
    if isinstance(target, dict):
        objects = {name: target[name] for name in ("boxes", "labels", "masks") if name in target}
        return drawing.draw_objects(image, objects, classes)
    if np.ndim(target) == 2:
        return drawing.overlay_class_map(image, target)
    chosen = np.flatnonzero(target) if np.ndim(target) == 1 else [int(target)]
    return drawing.add_caption(image, [classes[k] for k in chosen] or ["no class"])


def _list_findings(check: DataCheck) -> Iterator[str]:
    if not check.findings:
        yield "<p>No problems found.</p>"
        return
    yield "<table><tr><th></th><th>first example</th><th>count</th></tr>"
    for finding in check.findings:
        severity = f'<td class="{finding.severity}">{finding.severity}</td>'
        text = f"<td><code>{_escape(finding.text)}</code></td>"
        yield f'<tr>{severity}{text}<td class="n">{finding.count}</td></tr>'
    yield "</table>"


def _table_of_splits(check: DataCheck) -> Iterator[str]:
    yield "<table>"
    for split, total in check.total.items():
        images = [image for image in check.images if image.split == split]
        yield f'<tr><td>{split}</td><td class="n">{total}</td><td>{_escape(describe_sizes(images))}</td></tr>'
    yield "</table>"


def _table_of_classes(check: DataCheck) -> Iterator[str]:
    splits = "".join(f"<th>{split}</th>" for split in check.counts)
    yield f"<table><tr><th>class</th>{splits}</tr>"
    for k, name in enumerate(check.classes):
        numbers = "".join(f'<td class="n">{counts[k]}</td>' for counts in check.counts.values())
        yield f"<tr><td>{_escape(name)}</td>{numbers}</tr>"
    yield "</table>"


def _escape(text: str) -> str:
    return html.escape(text)
