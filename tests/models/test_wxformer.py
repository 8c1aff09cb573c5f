"""Tests for the weather models: records of CREDIT's code, other sizes, training and export."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.formula import formula_tensor

from crossformer_vision import UserError, load_checkpoint
from crossformer_vision.models.wxformer import CAMulator, WeatherCrossFormer, WXFormer

PARITY = Path(__file__).parents[1] / "parity"
RECORDS = json.loads((PARITY / "wxformer.json").read_text())
KINDS = {"wxformer": WXFormer, "crossformer": WeatherCrossFormer, "camulator": CAMulator}
SMALL = {
    "channels": 2,
    "levels": 1,
    "surface_channels": 1,
    "input_only_channels": 1,
    "dim": (32, 32, 32, 32),
    "depth": (1, 1, 1, 1),
    "global_window_size": (4, 4, 2, 1),
    "local_window_size": 4,
    "cross_embed_strides": (2, 2, 2, 2),
    "frames": 1,
    "interp": False,
}


def record_weights(model, keys):
    """Weights by the formula; singular vectors of spectral norm from a decomposition."""
    state = {}
    for key, shape in keys.items():
        if key.endswith(("weight_u", "weight_v")):
            continue
        state[key] = formula_tensor(key.removesuffix("_orig"), tuple(shape)) + key.endswith(".g")
    for key in [key for key in state if key.endswith("weight_orig")]:
        layer = model.get_submodule(key.removesuffix(".weight_orig"))
        weight = state[key].transpose(0, 1) if isinstance(layer, torch.nn.ConvTranspose2d) else state[key]
        u, _, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        base = key.removesuffix("_orig")
        state[f"{base}_u"], state[f"{base}_v"] = u[:, 0].float(), v[0].float()
    return state


def field(B, C, T, H, W):
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"field-{B}-{C}-{T}-{H}-{W}".encode())))
    return torch.from_numpy(rng.standard_normal((B, C, T, H, W)).astype(np.float32))


@pytest.mark.parametrize("record", RECORDS, ids=[f"{r['case']}-{r['type']}" for r in RECORDS])
def test_record(record):
    model = KINDS[record["type"]](**record["arguments"]).eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == record["keys"]
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    model.load_state_dict(record_weights(model, record["keys"]))
    with torch.no_grad():
        output = model(field(*record["input"]))
    assert list(output.shape) == record["output"]
    with np.load(PARITY / "wxformer.npz") as values:
        expected = values[f"case{record['case']}"]
    np.testing.assert_allclose(output.flatten()[::7], expected, atol=1e-4 * np.abs(expected).max())


def test_keys_of_old_checkpoints(tmp_path):
    record = RECORDS[1]  # without spectral norm
    model = WXFormer(**record["arguments"])
    new = record_weights(model, record["keys"])
    old = {key.replace(".1.weight", ".weight").replace(".1.bias", ".bias") if ".convs." in key else key: value
           for key, value in new.items()}  # fmt: skip
    assert old.keys() != new.keys()
    model.load_state_dict(old)
    torch.save({"model_state_dict": new}, tmp_path / "checkpoint.pt")
    report = load_checkpoint(model, tmp_path / "checkpoint.pt")
    assert len(report.loaded) == len(new) and not report.missing
    other = WeatherCrossFormer(**record["arguments"])
    with pytest.raises(UserError, match="belongs to another model"):
        load_checkpoint(other, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("kind", [WXFormer, WeatherCrossFormer, CAMulator])
@pytest.mark.parametrize("size", [(37, 75), (16, 32), (45, 90)])
def test_any_grid(kind, size):
    model = kind(**SMALL, use_spectral_norm=False).eval()
    x = torch.randn(1, 4, 1, *size)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (1, 3, 1, *size) and y.isfinite().all()
        bottom = torch.cat([x[..., :-1, :], x[..., -1:, :] + 1], -2)
        assert not torch.allclose(model(bottom), y)  # the last row has an effect
    coarse = kind(**{**SMALL, "cross_embed_strides": (4, 2, 2, 2)}, use_spectral_norm=False).eval()
    with torch.no_grad():
        assert coarse(x).shape[-2:] == (size if size[0] % 32 else (size[0] // 2, size[1] // 2))


def test_padding_of_odd_grids():
    padding = {"activate": True, "mode": "earth", "pad_lat": [8, 8], "pad_lon": [8, 8]}
    model = WXFormer(**SMALL, use_spectral_norm=False, padding_conf=padding).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 4, 1, 37, 75)).shape == (1, 3, 1, 37, 75)


def test_padded_positions_do_not_influence_attention():
    attention = WXFormer(**SMALL, use_spectral_norm=False).layers[0][1].layers[0][2].double()
    x = torch.randn(2, 7, 10, 32, dtype=torch.float64)
    output = attention(x)
    qkv = attention.to_qkv(attention.norm(x))
    q, k, v = qkv.unflatten(-1, (3, 1, 32))[..., 0, :].unbind(-2)
    bias = attention.dpb()
    rows, columns = [1, 3, 5], [2, 5, 8]  # the group of position (1, 2): intervals 2 and 3, without padding
    members = [(n, m) for n in range(3) for m in range(3)]
    chosen = [4 * n + m for n, m in members]
    keys = torch.stack([k[0, rows[n], columns[m]] for n, m in members])
    values = torch.stack([v[0, rows[n], columns[m]] for n, m in members])
    weights = (q[0, 1, 2] @ keys.T * 32**-0.5 + bias[0, chosen]).softmax(0)
    torch.testing.assert_close(output[0, 1, 2], attention.to_out(weights @ values))


def test_training_checkpointing_and_export(tmp_path):
    torch.manual_seed(0)
    model = WXFormer(**SMALL)
    x = torch.randn(1, 4, 1, 32, 64)
    for _ in range(5):  # iterations that find the singular vectors
        model(x)
    model.eval()
    plain = model(x)
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    for gradient, p in zip(gradients, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(gradient, p.grad)
    model.remove_spectral_norm()
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    graph = torch.export.export(model, (x,))
    torch.testing.assert_close(graph.module()(x), plain, rtol=1e-4, atol=1e-5)


def test_frames_of_camulator_are_averaged():
    model = CAMulator(**{**SMALL, "frames": 2}, use_spectral_norm=False).eval()
    x = torch.randn(1, 4, 2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.flip(2)))


def test_invalid_arguments(caplog):
    WXFormer(**SMALL, frame_patch_size=1)
    assert "arguments without effect: frame_patch_size" in caplog.text
    for options, message in (
        ({"dim": (32, 32)}, "four stages"),
        (
            {"padding_conf": {"activate": True, "mode": "x", "pad_lat": [1, 1], "pad_lon": [1, 1]}},
            "unknown mode 'x'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            WXFormer(**{**SMALL, **options})
    with pytest.raises(ValueError, match="has 3 channels and frames, expected 4"):
        WXFormer(**SMALL)(torch.zeros(1, 3, 1, 32, 32))
    big = {"activate": True, "mode": "earth", "pad_lat": [40, 40], "pad_lon": [0, 0]}
    with pytest.raises(ValueError, match="needs maps larger"):
        WXFormer(**SMALL, padding_conf=big)(torch.zeros(1, 4, 1, 32, 64))
