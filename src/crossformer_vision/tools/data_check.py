"""Check data before training, with the readers that training uses."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import Progress

from crossformer_vision.data.class_lists import IGNORED
from crossformer_vision.data.images import error_summary, to_pixels
from crossformer_vision.data.layout import infer_task
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.data.sampling import ReadImages
from crossformer_vision.devices import count_cores
from crossformer_vision.errors import NoSuchSplit, UserError, collect_label_errors, counted
from crossformer_vision.tools.image_facts import (
    ImageFacts,
    describe_image,
    find_exact_duplicates,
    find_near_duplicates,
)
from crossformer_vision.training.recipes import TASKS

log = logging.getLogger("crossformer_vision")

MIN_OBJECT_SIDE = 4  # pixels; smaller objects are hardly visible to a detector
MAX_IMBALANCE = 20  # ratio of the largest to the smallest class
MIN_CLASS_IMAGES = 5  # training images or objects below which a class can hardly be learned
SMALL_SIDE = 32  # pixels

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """A problem of the data.

    Attributes:
        severity: ``error`` if training would fail, else ``warning``.
        kind: Kind of the problem, by which occurrences are counted.
        text: Message about the first occurrence.
        count: Number of occurrences.
    """

    severity: Severity
    kind: str
    text: str
    count: int = 1

    def __str__(self) -> str:
        more = f" ({self.count} in all)" if self.count > 1 else ""
        return f"{self.severity}: {self.text}{more}"


@dataclass
class DataCheck:
    """Result of ``check_data``.

    Attributes:
        root: The data.
        task: Name of the task.
        reason: Why this task was inferred.
        label_format: Format of the labels.
        classes: Class names.
        images: Facts about the images that could be read.
        counts: Number of images, objects or pixels of each class in the images that were read, by split.
        total: Number of images by split.
        checked: Number of images that were read, by split.
        findings: Findings, errors first.
        samples: Images with targets for the contact sheet, by split.
    """

    root: str
    task: str
    reason: str
    label_format: str = ""
    classes: list[str] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    checked: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    samples: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    @property
    def has_errors(self) -> bool:
        """Whether training would fail."""
        return any(finding.severity == "error" for finding in self.findings)


def check_data(
    root: str, task: str | None = None, format: str | None = None, max_images: int = 20_000, sheet: int = 12
) -> DataCheck:
    """Check the data that a run would see.

    Args:
        root: Folder or file, as ``--data.root`` of a run.
        task: Name of the task. ``None`` to infer it from the layout.
        format: Format of the labels. ``None`` to detect it.
        max_images: Maximum number of images to read per split, spread evenly.
        sheet: Images of each split for the contact sheet.

    Raises:
        UserError: If the folder or the task does not exist.
    """
    if not Path(root).exists():
        raise UserError(f"{root}: no such folder or file")
    inferred, reason = infer_task(Path(root))
    if task is not None and task not in TASKS:
        raise UserError(f"unknown task '{task}'. Choose from {', '.join(TASKS)}")
    result = DataCheck(root, task or inferred, reason if task in (None, inferred) else "--task")
    options: dict[str, Any] = {"root": root, "num_workers": 0}
    if format is not None:
        if result.task == "classification":
            raise UserError(f"--format {format}: only for detection and segmentation")
        options["format"] = format
    findings = _Findings()
    try:
        data = TASKS[result.task].load_data_class()(**options)
    except UserError as error:
        findings.add("error", str(error))
        result.findings = findings.all()
        return result
    missing: dict[str, NoSuchSplit] = {}
    for split in ("train", "val"):
        _check_split(data, split, result, findings, missing, max_images, sheet)
    if list(missing) == ["train"] and "val" in result.total:
        findings.add("warning", f"{root}: can be validated, but not trained on ({missing.pop('train')})")
    for missing_split in missing.values():
        findings.add("error", str(missing_split))
    result.classes, result.label_format = list(data.classes), data.label_format
    _compare_splits(result, findings)
    _compare_images(result.images, findings)
    result.findings = findings.all()
    return result


class _Findings:
    """Findings, of which those of one kind are counted."""

    def __init__(self) -> None:
        self.first: dict[tuple[Severity, str], str] = {}
        self.counts: Counter[tuple[Severity, str]] = Counter()

    def add(self, severity: Severity, text: str, kind: str | None = None, count: int = 1) -> None:
        """Add a finding. Without a kind, messages that differ in names and numbers only are one kind."""
        key = severity, kind or re.sub(r"'[^']*'|\S*[/.\\]\S+|\(.*?\)|-?\d+", "…", text)
        self.first.setdefault(key, text)
        self.counts[key] += count

    def all(self) -> list[Finding]:
        """All findings, errors first."""
        found = [Finding(*key, text, self.counts[key]) for key, text in self.first.items()]
        return sorted(found, key=lambda finding: finding.severity != "error")


@contextmanager
def _collect_warnings(findings: _Findings) -> Iterator[None]:
    """Add warnings of readers to the findings instead of printing them."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            findings.add("warning", record.getMessage())

    handler, handlers, propagate = Collect(logging.WARNING), log.handlers, log.propagate
    log.handlers, log.propagate = [handler], False
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, propagate


def _check_split(
    data: BaseDataModule,
    split: str,
    result: DataCheck,
    findings: _Findings,
    missing: dict[str, NoSuchSplit],
    max_images: int,
    sheet: int,
) -> None:
    """Open a split and read its images."""
    with _collect_warnings(findings), collect_label_errors() as label_errors:
        try:
            images = data.open(split)
        except NoSuchSplit as error:
            missing[split] = error
            return
        except UserError as error:
            findings.add("error", str(error))
            return
        finally:
            for label_error in label_errors:
                findings.add("error", str(label_error))
    result.total[split] = len(images)
    result.counts[split] = np.zeros(len(data.classes), np.int64)
    count = min(len(images), max_images)
    result.checked[split] = count
    chosen = [n * len(images) // count for n in range(count)]
    sheet_every = max(1, count // sheet)
    with Progress(transient=True) as bar, ThreadPoolExecutor(count_cores()) as pool:
        progress = bar.add_task(f"reading {split}", total=count)
        size = 2 * count_cores()  # few images in memory
        for start in range(0, count, size):
            batch = chosen[start : start + size]
            found = pool.map(lambda index: _read(images, index, split), batch)
            for position, outcome in enumerate(found, start=start):
                bar.advance(progress)
                if isinstance(outcome, str):
                    findings.add("error", outcome)
                    continue
                facts, image, target = outcome
                result.images.append(facts)
                _count_classes(result.counts[split], target, data.classes)
                _check_target(facts, target, findings)
                samples = result.samples.setdefault(split, [])
                if position % sheet_every == 0 and len(samples) < sheet:
                    samples.append((image, target))


def _read(images: ReadImages, index: int, split: str) -> tuple[ImageFacts, Any, Any] | str:
    """Facts about an image, the image and its target; or why it cannot be used."""
    name = images.source.name(index)
    try:
        opened, target = images.source.read(index)
        facts = describe_image(opened, split, name)
        return facts, to_pixels(opened, images.pixel_format, name), target
    except UserError as error:
        return str(error)
    except Exception as error:  # decoders raise errors of any kind
        return f"{name}: cannot read this image ({error_summary(error)})"


def _count_classes(counts: np.ndarray, target: Any, classes: Sequence[str]) -> None:
    """Add the classes of an image, its objects or its pixels to the counts."""
    if isinstance(target, dict):
        counts += np.bincount(target["labels"] - 1, minlength=len(classes))
    elif np.ndim(target) == 2:
        counts += np.bincount(target.ravel(), minlength=256)[: len(classes)]
    elif np.ndim(target) == 1:
        counts += np.asarray(target) > 0
    else:
        counts[int(target)] += 1


def _check_target(facts: ImageFacts, target: Any, findings: _Findings) -> None:
    """Warn about properties of an image and its target that training accepts."""
    if facts.is_rotated:
        findings.add("warning", f"{facts.name}: has an EXIF orientation (applied)", "EXIF orientation")
    if facts.is_constant:
        findings.add("warning", f"{facts.name}: all pixels have the value {facts.low:g}", "constant image")
    if min(facts.size) < SMALL_SIDE:
        size = f"{facts.size[0]}x{facts.size[1]}"
        findings.add("warning", f"{facts.name}: has only {size} pixels", "small image")
    if isinstance(target, dict):
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).min(1, initial=np.inf)
        small = int((sides < MIN_OBJECT_SIDE).sum())
        if small:
            text = f"{facts.name}: has objects of less than {MIN_OBJECT_SIDE} pixels"
            findings.add("warning", text, "small objects", small)
        if len(target["boxes"]) > len(
            np.unique(np.column_stack([target["boxes"], target["labels"]]), axis=0)
        ):
            findings.add("warning", f"{facts.name}: has two equal objects", "equal objects")
    elif np.ndim(target) == 2 and (target == IGNORED).all():
        findings.add("warning", f"{facts.name}: all pixels of its class map are ignored", "ignored map")


def _compare_splits(result: DataCheck, findings: _Findings) -> None:
    """Check the numbers of each class."""
    unit = {"classification": "image", "detection": "object", "segmentation": "pixel"}[result.task]
    if (train := result.counts.get("train")) is None or result.checked != result.total:
        return  # counts of a sample say little about rare classes
    for name, count in zip(result.classes, train.tolist(), strict=True):
        if count < MIN_CLASS_IMAGES:
            text = f"class '{name}' has {counted(count, f'training {unit}')}"
            findings.add("warning", text, "rare class")
    if len(train) and train.max() > MAX_IMBALANCE * max(1, train.min()):
        largest, smallest = result.classes[int(train.argmax())], result.classes[int(train.argmin())]
        text = f"class '{largest}' has {train.max()} training {unit}s, '{smallest}' {train.min()}"
        findings.add("warning", f"{text}; see --data.sampling and --model.class_weights", "imbalance")
    if (val := result.counts.get("val")) is not None:
        for name, count in zip(result.classes, val.tolist(), strict=True):
            if not count:
                findings.add("warning", f"class '{name}' does not occur in validation", "not validated")


def _compare_images(images: list[ImageFacts], findings: _Findings) -> None:
    """Find duplicates within and across splits."""
    for group in find_exact_duplicates(images):
        other = next((image for image in group if image.split != group[0].split), group[1])
        findings.add("warning", *_describe_pair(group[0], other, "is equal to"), len(group) - 1)
    for first, second in find_near_duplicates(images):
        findings.add("warning", *_describe_pair(first, second, "looks like"))


def _describe_pair(first: ImageFacts, second: ImageFacts, relation: str) -> tuple[str, str]:
    """Message and kind of a pair of duplicates."""
    place = "within a split" if first.split == second.split else "across splits"
    suffix = "" if first.split == second.split else ", in another split"
    return f"{first.name}: {relation} {second.name}{suffix}", f"{relation} {place}"
