"""Atomic writes, CSV files and output directories."""

import csv
import io
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from crossformer_vision.errors import UserError
from crossformer_vision.types import Checkpoint


def create_run_dir(base: Path) -> Path:
    """Create a directory, with a suffix ``-2``, ``-3``, … if it exists. Safe with concurrent processes.

    Args:
        base: Path without a suffix.

    Raises:
        UserError: If it cannot be created.
    """
    for n in itertools.count(1):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be created ({error.strerror}). Choose another --run.dir"
            ) from None
        return folder
    raise AssertionError


def create_output_dir(folder: Path) -> None:
    """Create an output directory before long work, so that errors come early.

    Args:
        folder: Directory, which may exist.

    Raises:
        UserError: If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another --output") from None


class AtomicCheckpoints(TorchCheckpointIO):
    """Atomic checkpoints: a full disk or a killed process leaves the previous file untouched."""

    @override
    def save_checkpoint(
        self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot save the checkpoint ({_find_reason(error)}). The previous file is unchanged."
                f" Free disk space and continue with --resume {path.parent}"
            ) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> Checkpoint:
        from crossformer_vision.weights.reading import read_checkpoint

        return read_checkpoint(path)


def _find_reason(error: BaseException) -> str:
    """Message of the OSError that caused a torch error."""
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_csv(path: str | Path) -> list[dict[str, float]]:
    """Read the ``metrics.csv`` of a run or of Lightning's ``CSVLogger``: one dictionary per epoch."""
    rows: dict[int, dict[str, float]] = {}
    with Path(path).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {k: int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
            rows.setdefault(int(values["epoch"]), {}).update(values)
    return list(rows.values())


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file atomically.

    Args:
        path: File to write.
        text: Content, written as UTF-8.
        errors: Python's error handler for characters that UTF-8 cannot encode, as in undecodable file names.

    Raises:
        UserError: If it cannot be written. A previous file is unchanged.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", errors=errors, newline="")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). The previous file is unchanged. Free disk space "
            "and try again"
        ) from None


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows to a CSV file atomically. The columns are the union of their keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
