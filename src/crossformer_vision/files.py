"""What is written whole or not at all, and folders that nobody else has."""

import csv
import io
import itertools
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from crossformer_vision.errors import UserError


def new_folder(base: Path) -> Path:
    """Makes a folder of this name, or with `-2`, … behind it: no two processes make the same."""
    for n in itertools.count(1):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); --run.folder names another"
            ) from None
        return folder
    raise AssertionError


def make_folder(folder: Path) -> None:
    """Make a folder for output, before the work whose results go there.

    Raises:
        UserError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another --out") from None


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints under their name only when whole: a full disk or a kill leaves the one before untouched."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
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
                f"{path}: cannot save the checkpoint ({_reason(error)}); the one before is untouched. "
                f"Make room for it, and go on with --resume {path.parent}"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        from crossformer_vision.weights.checkpoints import read_checkpoint

        return read_checkpoint(path)


def _reason(error: BaseException) -> str:
    """What the system said: torch hides an OSError behind its own."""
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """The numbers of a run's `metrics.csv`, or of Lightning's `CSVLogger`: one row an epoch."""
    rows: dict[int, dict[str, Any]] = {}
    with Path(path).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {k: int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
            rows.setdefault(int(values["epoch"]), {}).update(values)
    return list(rows.values())


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write it whole or not at all.

    Args:
        path: File to write.
        text: Content, written as UTF-8.
        errors: Python's error handler for characters that UTF-8 cannot encode, as in undecodable file names.

    Raises:
        UserError: it cannot be written; what was there before is untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", errors=errors, newline="")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was there is untouched. Make room for it, "
            f"and go on with --resume {path.parent}"
        ) from None


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Write it whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
