"""Grids of runs: rows of options and seeds over one recipe, read from YAML."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from crossformer_vision.errors import UserError
from crossformer_vision.training.recipes import find_config, read_config
from crossformer_vision.types import JsonObject

KEYS = ("recipe", "rows", "vary", "options", "seeds", "search")


@dataclass
class Grid:
    """A grid of runs.

    Attributes:
        recipe: Configuration files that all runs start from.
        rows: Options of each row, such as ``{"PVTv2": {"model.backbone": "pvt_v2_b0"}}``.
        seeds: Seeds of each row.
        options: Options of all runs.
        search: Ranges of options for ``--search``: ``{low, high, log}`` or ``{choices}``.
    """

    recipe: list[str]
    rows: dict[str, JsonObject]
    seeds: list[int]
    options: JsonObject = field(default_factory=dict)
    search: dict[str, JsonObject] = field(default_factory=dict)

    def check_data(self) -> None:
        """Check that the folders of images exist, once for all cells.

        Raises:
            UserError: If a ``data.root`` is missing.
        """
        contents = [read_config(recipe).get("data") for recipe in self.recipe]
        recipes = [data["root"] for data in contents if isinstance(data, dict) and data.get("root")]
        for row in self.rows.values():
            root = {**self.options, **row}.get("data.root", recipes[-1] if recipes else None)
            if root is not None and not Path(root).exists():
                raise UserError(
                    f"{root}: no such folder of images, which the grid names as data.root. Put the data set "
                    "there, or change data.root in the grid"
                )

    def arguments(self, options: JsonObject, seed: int) -> list[str]:
        """Command-line arguments of a run.

        Args:
            options: Options in addition to those of all runs.
            seed: Seed of the run.
        """
        arguments = [part for recipe in self.recipe for part in ("--config", recipe)]
        for name, value in {**self.options, **options, "seed_everything": seed}.items():
            arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return arguments

    def digest(self, row: str, seed: int) -> str:
        """Digest of everything that determines a score: options and contents of the recipes."""
        recipes = [json.dumps(read_config(recipe), sort_keys=True) for recipe in self.recipe]
        options = self.arguments(self.rows[row], seed)[2 * len(recipes) :]
        return hashlib.sha256("\0".join([*options, *recipes]).encode()).hexdigest()[:16]


def folder_name(row: str) -> str:
    """Folder name of a row: without separators, never ``..``, and at most 120 bytes long."""
    folder = re.sub(r"[^\w.+-]+", "_", row).strip("_.") or "row"
    if len(folder.encode()) <= 120:
        return folder
    digest = hashlib.sha256(row.encode()).hexdigest()[:10]
    return f"{folder.encode()[:100].decode(errors='ignore')}-{digest}"


def read_grid(path: str) -> Grid:
    """Read a grid, see ``docs/experiments.md``.

    Args:
        path: YAML file, or name of a bundled one.

    Raises:
        UserError: If the file is missing or not a grid.
    """
    path = find_config(path)
    content = _read_content(path)
    rows = content.get("rows", {"recipe": {}})
    if isinstance(rows, list):  # names of models
        rows = {str(model): {"model.backbone": model} for model in rows}
    vary = content.get("vary", {})
    options, search = content.get("options", {}), content.get("search", {})
    if not all(isinstance(part, dict) for part in (rows, vary, options, search)) or not all(
        isinstance(row, dict) for row in rows.values()
    ):
        raise UserError(f"{path}: rows, vary, options and search must be mappings: {{name: value}}")
    if not rows:
        raise UserError(f"{path}: rows is empty. Name a row, or leave rows out to run the recipe alone")
    if not all(isinstance(values, list) and values for values in vary.values()):
        raise UserError(f"{path}: vary needs a list of values for each option")
    for name, values in search.items():
        _check_search(path, name, values)
    rows = _vary_rows(rows, vary)
    _check_folder_names(path, rows)
    seeds = content.get("seeds", 1)
    seeds = list(range(seeds)) if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{path}: seeds must be a number of seeds, or a list of whole numbers")
    recipe = content["recipe"] if isinstance(content["recipe"], list) else [content["recipe"]]
    return Grid([find_config(str(name)) for name in recipe], rows, seeds, options, search)


def _check_search(path: str, name: str, values: object) -> None:
    """Check the range or the choices of an option that a search varies."""
    try:
        if isinstance(values, dict) and (
            values.get("choices") or float(values["low"]) <= float(values["high"])
        ):
            return
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{path}: search: {name}: must be {{low: 1.0e-4, high: 1.0e-2, log: true}} or "
        f"{{choices: [a, b]}}, not {values}"
    )


def _read_content(path: str) -> JsonObject:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a grid ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not set(content) <= set(KEYS) or "recipe" not in content:
        raise UserError(f"{path}: not a grid. It needs a recipe and may have {', '.join(KEYS[1:])}")
    return content


def _vary_rows(rows: dict[str, JsonObject], vary: dict[str, list[object]]) -> dict[str, JsonObject]:
    """One row for each row and combination of varied values."""
    product = {}
    for (name, row), values in itertools.product(rows.items(), itertools.product(*vary.values())):
        labels = [f"{option.rsplit('.', 1)[-1]} {value}" for option, value in zip(vary, values, strict=True)]
        product[", ".join([name, *labels])] = {**row, **dict(zip(vary, values, strict=True))}
    return product


def _check_folder_names(path: str, rows: dict[str, JsonObject]) -> None:
    folders: dict[str, str] = {}
    for name in rows:
        if (other := folders.setdefault(folder_name(name), name)) != name:
            raise UserError(
                f"{path}: rows '{other}' and '{name}' would share the folder {folder_name(name)}. Rename one"
            )
