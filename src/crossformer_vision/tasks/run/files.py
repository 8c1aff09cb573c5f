"""What is written whole or not at all, and folders that nobody else has."""

import csv
import itertools
import json
import os
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
        from crossformer_vision.checkpoints import read_checkpoint

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


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write it whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
