"""Networks reproduce the outputs of the published code with the same weights."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import PARITY, mark_large_models
from parity.formula import formula_images, formula_state_dict
from torch.utils.flop_counter import FlopCounterMode

from crossformer_vision import load_checkpoint

NAMES = list(json.loads((PARITY / "classifier_configs.json").read_text()))
SPANS = {"dense_features": "region", "dense_features_2021": "map"}  # outputs of the 2023 and the 2021 code
CASES = [
    {**case, "record": record}
    for record in SPANS
    for case in json.loads((PARITY / f"{record}.json").read_text())
]
MAX_GMACS = dict(zip(NAMES, (2.858, 4.907, 9.160, 16.108, 4.429, 9.592, 16.722, 22.001), strict=True))


@pytest.fixture(scope="module")
def published(classifier_keys):
    """Build a model by name with the formula weights, loaded from a published-format checkpoint."""

    def build(name: str, **kwargs) -> torch.nn.Module:
        model = timm.create_model(name, **kwargs).eval()
        load_checkpoint(model, {"model": formula_state_dict(classifier_keys[name])})
        return model

    return build


@pytest.mark.parametrize("name", mark_large_models(NAMES))
def test_classifier(name, published, classifier_configs):
    model = published(name)
    assert sum(p.numel() for p in model.parameters()) == classifier_configs[name]["params"]
    images = formula_images(2, 224, 224)
    expected = np.load(PARITY / "classifier_logits.npz")[name]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            logits = model(images)
        alone = model(images[1:])
    assert np.abs(logits.numpy() - expected).max() < 1e-4
    torch.testing.assert_close(alone, logits[1:], atol=1e-5, rtol=1e-5)
    assert counter.get_total_flops() / 2 / 2 / 1e9 <= MAX_GMACS[name]  # two images, two operations per MAC
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(images).float()
    assert (low - logits).abs().max() <= 2e-2 * logits.abs().max()


def dense(case, published):
    interval = [None] * 4 if case.get("adaptive_interval") else case["interval"]
    return published(
        case["model"],
        features_only=True,
        group_size=case["group_size"],
        interval=interval,
        lda_span=SPANS[case["record"]],
    )


def label(case):
    return f"{SPANS[case['record']]}-{case['model']}-{case['height']}x{case['width']}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_dense(case, published):
    record = np.load(PARITY / f"{case['record']}.npz")
    model = dense(case, published)
    images = formula_images(1, case["height"], case["width"])
    with torch.no_grad():
        model(torch.randn(2, 3, 33, 65))  # earlier image sizes must not affect the outputs
        maps = model(images)
        batched = model(torch.cat([torch.randn_like(images), images]))
    for level, (values, both) in enumerate(zip(maps, batched, strict=True)):
        expected = record[f"case{case['case']}_level{level}"]
        assert list(values.shape) == record[f"case{case['case']}_shape{level}"].tolist()
        assert np.abs(values.flatten()[::17].numpy() - expected).max() < 1e-4 * np.abs(expected).max()
        torch.testing.assert_close(both[1:], values, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_classifier(name, published):
    compiled = torch.compile(published(name))
    expected = np.load(PARITY / "classifier_logits.npz")[name]
    with torch.no_grad():
        logits = compiled(formula_images(2, 224, 224))
    assert np.abs(logits.numpy() - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiled_dense(case, published):
    record = np.load(PARITY / f"{case['record']}.npz")
    with torch.no_grad():
        maps = torch.compile(dense(case, published))(formula_images(1, case["height"], case["width"]))
    for level, values in enumerate(maps):
        expected = record[f"case{case['case']}_level{level}"]
        assert np.abs(values.flatten()[::17].numpy() - expected).max() < 1e-4 * np.abs(expected).max()
