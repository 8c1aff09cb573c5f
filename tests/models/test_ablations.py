"""Ablation variants of the papers: reference implementations, parameter counts and group sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import ShiftedWindowAttention as Published

from crossformer_vision.models.ablations import (
    GROUP_MODES,
    AbsolutePosition,
    ResidualPositionBias,
    ShiftedWindowAttention,
    SpatialReductionAttention,
)
from crossformer_vision.models.crossformer import (
    AmplitudeCooling,
    CrossScaleEmbedding,
    DynamicPositionBias,
)

PARTS = {
    "one scale": dict(patch_sizes=[4], merge_sizes=[[2], [2], [2]]),
    "odd kernels": dict(patch_sizes=[4, 7, 9], merge_sizes=[[2, 3], [2, 4], [3, 5]]),
    "equal widths": dict(embed_split="equal"),
    "shifted windows": dict(attention="shifted_window", position_bias="relative"),
    "shifted windows, DPB": dict(attention="shifted_window"),
    "spatial reduction": dict(attention="spatial_reduction", position_bias="absolute"),
    "residual DPB": dict(position_bias="dynamic_residual"),
    "no positions": dict(position_bias="none"),
    "absolute": dict(position_bias="absolute"),
    "relative": dict(position_bias="relative", lda_span="region"),
    "LDA in the last block": dict(depths=[2, 2, 4, 2], interval=[[0, 4], [0, 2], [0, 0, 0, 2], [0, 1]]),
    "linear groups": dict(depths=[2, 2, 4, 2], group_size="linear", interval=[None] * 4, lda_span="map"),
    "an ACL after each second block": dict(amplitude_cooling=2),
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_each_variant_trains_at_any_size(options):
    model = timm.create_model("crossformer_nano", **options).train()
    for size in ((64, 64), (70, 101)):
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    features = timm.create_model("crossformer_nano", features_only=True, **options)
    assert [x.shape[2:] for x in features(torch.randn(1, 3, 70, 101))] == [(18, 26), (9, 13), (5, 7), (3, 4)]


@pytest.mark.parametrize(
    "position_bias, parameters",
    [
        ("dynamic", 30_657_394),
        ("dynamic_residual", 30_657_394),
        ("relative", 30_656_482),
        ("absolute", 30_934_216),
    ],
)
def test_position_bias_parameter_counts(position_bias, parameters):
    with torch.device("meta"):
        model = timm.create_model("crossformer_small", position_bias=position_bias)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "kernels, millions, gmacs",
    [
        (([4], [2]), 28.29, 4.50),
        (([8], [2]), 28.30, 4.54),
        (([4, 8], [2, 4]), 30.62, 4.78),
        (([4, 8, 16, 32], [2, 4]), 30.66, 4.91),
    ],
)
def test_embedding_parameter_and_mac_counts(kernels, millions, gmacs):
    with torch.device("meta"):
        model = timm.create_model("crossformer_small", patch_sizes=kernels[0], merge_sizes=[kernels[1]] * 3)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    # The first value is 4.494, which the paper reports as 4.50.
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.006)


def test_group_size_modes():
    depths = (2, 2, 18, 2)
    linear = [[4, 7], [5, 6], [4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13], [7, 7]]
    assert GROUP_MODES["linear"](depths) == linear
    assert GROUP_MODES["linear_div"](depths)[2] == [4, 4, 5, 5, 6, 6, *[7] * 8, *[14] * 4]
    assert GROUP_MODES["alter"](depths)[2] == [4, 4, 5, 5, 6, 6, 7, 7, *[7, 14] * 5]
    assert GROUP_MODES["7_14"](depths)[2] == [7] * 4 + [14] * 14
    assert GROUP_MODES["constant"](depths) == [[4] * 2, [4] * 2, [14] * 18, [7] * 2]
    model = timm.create_model("crossformer_pp_small", group_size="linear", interval=(None,) * 4)
    attentions = [m for m in model.modules() if hasattr(m, "group_size") and hasattr(m, "interval")]
    assert [a.group_size for a in attentions] == [size for stage in linear for size in stage]


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (21, 28)])
@pytest.mark.parametrize("shifted", [False, True])
def test_shifted_windows_match_torchvision(size, shifted):
    theirs = Published(32, window_size=[7, 7], shift_size=[3 * shifted] * 2, num_heads=4).eval()
    ours = ShiftedWindowAttention(32, 4, 7, shifted, "relative")
    ours.qkv.load_state_dict(theirs.qkv.state_dict())
    ours.proj.load_state_dict(theirs.proj.state_dict())
    with torch.no_grad():
        theirs.relative_position_bias_table.normal_()
        ours.position_bias.relative_table.copy_(theirs.relative_position_bias_table.t())
    x = torch.randn(2, *size, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(9, 13), (8, 8)])
def test_shifted_windows_ignore_padding(size):
    """Positions outside `size` are padding and do not affect the output, whatever their values."""
    attn = ShiftedWindowAttention(16, 2, 4, True, "dynamic")
    torch.nn.init.constant_(attn.qkv.bias, 5.0)  # keys of padded positions are nonzero
    x = torch.randn(1, *size, 16)
    H, W = size
    y = attn(x)
    # Reference per position: valid positions of its shifted window and region.
    shift, (ph, pw) = 2, (-(-H // 4) * 4, -(-W // 4) * 4)
    q, k, v = (t.view(H, W, 2, 8) for t in attn.qkv(x[0]).chunk(3, -1))
    table = attn.position_bias(4, 4, x).view(2, 7, 7)

    def cell(place, side):
        rolled = (place - shift) % side
        return rolled // 4, (rolled >= side - 4) * 1 + (rolled >= side - shift) * 1, rolled % 4

    for py, px in ((0, 0), (H - 1, W - 1), (5, 3)):
        wy, ay, iy = cell(py, ph)
        wx, ax, ix = cell(px, pw)
        seen = [
            (ky, kx)
            for ky in range(H)
            for kx in range(W)
            if (cell(ky, ph)[:2], cell(kx, pw)[:2]) == ((wy, ay), (wx, ax))
        ]
        logits = torch.stack(
            [
                (q[py, px] * k[ky, kx]).sum(-1) / 8**0.5
                + table[:, iy - cell(ky, ph)[2] + 3, ix - cell(kx, pw)[2] + 3]
                for ky, kx in seen
            ]
        )
        values = torch.stack([v[ky, kx] for ky, kx in seen])
        wanted = attn.proj((logits.softmax(0)[..., None] * values).sum(0).flatten())
        torch.testing.assert_close(y[0, py, px], wanted, atol=1e-5, rtol=1e-4)


def test_single_window_is_global_attention():
    attn = ShiftedWindowAttention(16, 2, 6, True, "none")
    x = torch.randn(2, 6, 6, 16)
    q, k, v = attn.qkv(x.flatten(1, 2)).view(2, 36, 3, 2, 8).permute(2, 0, 3, 1, 4)
    whole = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 6, 16)
    torch.testing.assert_close(attn(x), attn.proj(whole))


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_spatial_reduction_matches_reference(reduction):
    """Parity of a complete PVT is tested in `test_pvt.py`."""
    attn = SpatialReductionAttention(16, 2, reduction)
    x = torch.randn(2, 9, 11, 16)
    keys = attn.norm(attn.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) if reduction > 1 else x
    assert keys.shape[1:3] == (9 // reduction, 11 // reduction)
    k, v = attn.kv(keys.flatten(1, 2)).chunk(2, -1)
    q = attn.q(x.flatten(1, 2))
    heads = [
        torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5, -1) @ v[..., h]
        for h in (slice(0, 8), slice(8, 16))
    ]
    torch.testing.assert_close(attn(x), attn.proj(torch.cat(heads, -1)).view(x.shape))


@pytest.mark.parametrize("size", [(64, 64), (60, 52)])
def test_relative_table_filled_from_dpb_gives_same_logits(size):
    dynamic = timm.create_model("crossformer_nano").eval()
    relative = timm.create_model("crossformer_nano", position_bias="relative").eval()
    state = dynamic.state_dict()
    for name, module in dynamic.named_modules():
        if isinstance(module, DynamicPositionBias):
            state = {k: v for k, v in state.items() if not k.startswith(name)}
            G = dynamic.get_submodule(name.rsplit(".", 1)[0]).group_size
            state[f"{name}.relative_table"] = module(G, G, torch.zeros(()))
    relative.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(relative(images), dynamic(images), atol=1e-5, rtol=1e-4)


def test_relative_table_rejects_other_group_sizes():
    model = timm.create_model("crossformer_small", position_bias="relative")
    with pytest.raises(ValueError, match=r"groups of 7x7 has no bias for groups of 8x8: use position_bias"):
        model(torch.randn(1, 3, 256, 256))
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if n.endswith("relative_table")}


def test_absolute_positions_are_resized():
    position = AbsolutePosition(torch.nn.Identity(), 4)
    x = torch.randn(2, 56, 56, 4)
    torch.testing.assert_close(position(x), x + position.absolute_position.permute(0, 2, 3, 1))
    with torch.no_grad():
        position.absolute_position.copy_(torch.linspace(0, 1, 56)[None, None, :, None].expand(1, 4, 56, 56))
    resized = position(torch.zeros(1, 112, 30, 4))
    assert resized.shape == (1, 112, 30, 4)
    torch.testing.assert_close(
        resized[0, 8:-8, 0, 0], (torch.arange(8, 104) + 0.5 - 1) / 110, atol=2e-3, rtol=0
    )


def test_residual_dpb():
    bias = ResidualPositionBias(64, 2)
    offsets = torch.stack(
        torch.meshgrid(torch.arange(-2.0, 3), torch.arange(-2.0, 3), indexing="ij"), -1
    ).view(-1, 2)
    x = bias.proj(offsets)
    x = x + bias.layers[0](x)
    x = x + bias.layers[1](x)
    torch.testing.assert_close(bias(3, 3, x), bias.layers[2](x).t())


def test_odd_kernel_differences_pad_right_and_bottom():
    cel = CrossScaleEmbedding(3, 8, (4, 7), 4, norm_first=False)
    x = torch.randn(1, 3, 10, 13)
    padded = F.pad(x, (0, 3, 0, 2))
    wanted = [
        cel.convs[0](padded),
        F.conv2d(F.pad(padded, (1, 2, 1, 2)), *cel.convs[1].parameters(), stride=4),
    ]
    torch.testing.assert_close(cel(x.permute(0, 2, 3, 1)), cel.norm(torch.cat(wanted, 1).permute(0, 2, 3, 1)))
    with pytest.raises(ValueError, match="smaller than their stride 4"):
        CrossScaleEmbedding(3, 8, (2, 4), 4, norm_first=False)


@pytest.mark.parametrize("period, cooled", [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])])
def test_amplitude_cooling_period(period, cooled):
    stage = timm.create_model("crossformer_nano", amplitude_cooling=period).stages[2]  # six blocks
    assert [i for i, b in enumerate(stage.blocks) if isinstance(b.acl, AmplitudeCooling)] == cooled


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(attention="windows"),
            "attention must be one of 'long_short', 'shifted_window', 'spatial_reduction'",
        ),
        (
            dict(position_bias="rotary"),
            "position_bias must be one of 'dynamic', 'dynamic_residual', 'relative'",
        ),
        (dict(group_size="quadratic"), "group_size must be one of 'constant', 'linear'"),
        (dict(attention="spatial_reduction"), "'absolute' or 'none' with spatial_reduction, not 'dynamic'"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("crossformer_nano", **options)
