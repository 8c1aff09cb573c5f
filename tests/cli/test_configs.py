"""Tests for recipes: header comments, parsing and model construction."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from crossformer_vision.cli import main
from crossformer_vision.models.variants import DENSE_G14, published_groups
from crossformer_vision.tools.grid import read_grid
from crossformer_vision.tools.info import PUBLISHED
from crossformer_vision.training.recipes import read_config

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
BASES = [name for name in FILES if name.startswith("bases/")]
GRIDS = [name for name in FILES if name.startswith(("ablations/", "competitors/"))]
RECIPES = [name for name in FILES if name not in (*GRIDS, *BASES)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, classifier_configs, capsys):
    text = (CONFIGS / name).read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("What", "Expect", "Cost", "Command"):
        assert any(line.startswith(f"# {word}: ") for line in head), word
    assert name in " ".join(head) or name == "quickstart/classification.yaml"
    assert main(["train", "--config", name, "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for section, values in read_config(str(CONFIGS / name)).items():  # every value is preserved
        if isinstance(values, dict):
            assert {k: resolved[section][k] for k in values} == values
    model = resolved["model"]["backbone"]
    assert timm.is_model(model)
    head = resolved["model"].get("detector") or resolved["model"].get("segmenter")
    if model in classifier_configs and head:  # groups match `info` and `download`
        groups = DENSE_G14 if name.endswith("_3x.yaml") else published_groups(model, head)
        if name.startswith("default/"):
            return
        assert {
            k: tuple(v) if k != "lda_span" else v for k, v in resolved["model"]["model_args"].items()
        } == groups
        assert resolved["model"]["decay_on"] == ("all_but_norms" if head == "upernet" else "all")
    if model in classifier_configs and not name.startswith("default/"):
        assert resolved["model"]["drop_path_rate"] == classifier_configs[model]["drop_path_rate"]


def test_recipes_override_their_base(tmp_path, capsys):
    """Sections are merged option by option; other values, such as ``model_args``, are replaced."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: bases/coco.yaml\nmodel: {lr: 0.5, milestones: [3]}\n", encoding="utf-8")
    assert main(["train", "--config", str(recipe), "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["task"] == "detection" and resolved["trainer"]["max_epochs"] == 12
    assert resolved["model"]["lr"] == 0.5 and resolved["model"]["milestones"] == [3.0]
    assert main(["train", "--config", str(recipe), "--help"]) == 0
    assert "(type: float, default: 0.5)" in capsys.readouterr().out
    inline = "{base: bases/coco.yaml, model: {lr: 0.25}}"
    assert main(["train", "--config", inline, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["lr"] == 0.25
    assert main(["train", "--config", "/none/configs/default/detection.yaml"]) == 1  # not the bundled one
    assert main(["train", "--config", str(recipe), "--model.lrr", "1"]) == 2
    capsys.readouterr()
    (tmp_path / "base.yaml").write_text("base: bases/coco.yaml\n")
    for base, message in (
        (
            "bases/cocoo.yaml",
            "mine.yaml: base bases/cocoo.yaml: no such configuration file. Did you mean 'bases/coco.yaml'?",
        ),
        ("base.yaml", "base.yaml: cannot be a base"),
    ):
        recipe.write_text(f"base: {base}\n")
        assert main(["train", "--config", str(recipe)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name, capsys):
    """Each row parses and its model can be built."""
    head = [line for line in (CONFIGS / name).read_text().splitlines() if line.startswith("#")]
    assert any(name in line and line.startswith("# Command: ") for line in head)
    grid = read_grid(name)
    for row in grid.rows.values():
        assert main(["train", *grid.arguments(row, 0), "--print_config"]) == 0
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        with torch.device("meta"):
            timm.create_model(model["backbone"], **(model["model_args"] or {}))


def test_every_published_model_has_a_recipe():
    for model, head in PUBLISHED:
        folder = "detection" if head in ("retinanet", "mask_rcnn") else "segmentation"
        assert (f"{folder}/{head}_{model}.yaml" if head else f"classification/{model}.yaml") in RECIPES


def test_every_published_variant_has_a_recipe(classifier_configs):
    assert {f"classification/{name}.yaml" for name in classifier_configs} <= set(RECIPES)
