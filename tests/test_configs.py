"""Every recipe says what it is, parses, and names a model that can be built as it says."""

from pathlib import Path

import pytest
import timm
import yaml

from crossformer_vision.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, classifier_configs, capsys):
    text = (CONFIGS / name).read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("What", "Expect", "Cost", "Command"):
        assert any(line.startswith(f"# {word}: ") for line in head), word
    assert name in " ".join(head) or name == "quickstart/classification.yaml"
    assert main(["train", "--config", name, "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for section, values in yaml.safe_load(text).items():  # all that it says is understood as it says it
        if isinstance(values, dict):
            assert {k: resolved[section][k] for k in values} == values
    model = resolved["model"]["model"]
    assert timm.is_model(model)
    if model in classifier_configs:
        assert resolved["model"]["drop_path_rate"] == classifier_configs[model]["drop_path_rate"]


def test_every_published_variant_has_a_recipe(classifier_configs):
    assert {f"classification/{name}.yaml" for name in classifier_configs} <= set(RECIPES)
