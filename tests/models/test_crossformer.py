"""The parts of the network, against their definitions in the paper."""

import pytest
import timm
import torch
import torch.nn.functional as F

from crossformer_vision.models import find_model
from crossformer_vision.models.crossformer import (
    CrossScaleEmbedding,
    DynamicPositionBias,
    LongShortAttention,
    _built,
    cel_widths,
    group,
    ungroup,
)


def test_cel_widths_halve_and_repeat_the_last():
    assert cel_widths(96, 4) == [48, 24, 12, 12]
    assert cel_widths(192, 2) == [96, 96]
    assert sum(cel_widths(100, 3)) == 100


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (61, 128)])
def test_cel_is_its_convolutions_side_by_side(size):
    cel = CrossScaleEmbedding(3, 32, (4, 8, 16, 32), stride=4, norm_first=False)
    x = torch.randn(2, 3, *size)
    y = cel(x.permute(0, 2, 3, 1))
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    expected = torch.cat([conv(padded) for conv in cel.convs], 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, cel.norm(expected))
    assert y.shape[1:3] == (-(-size[0] // 4), -(-size[1] // 4))


def test_groups_are_neighbours_or_strided():
    x = torch.arange(36).view(1, 6, 6, 1)
    near, far = group(x, 3, 3, 1), group(x, 3, 3, 2)
    assert near[0].flatten().tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert far[0].flatten().tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]
    assert far[1].flatten().tolist() == [1, 3, 5, 13, 15, 17, 25, 27, 29]
    for groups, interval in ((near, 1), (far, 2)):
        assert torch.equal(ungroup(groups, 3, 3, interval, 6, 6), x)


@pytest.mark.parametrize(
    "size, interval", [((9, 13), 1), ((9, 13), 2), ((14, 8), 3), ((3, 9), 2), ((12, 12), None)]
)
def test_attention_is_softmax_over_the_members_of_a_group(size, interval):
    """Position by position: every query attends exactly to the real positions that its group holds."""
    torch.manual_seed(0)
    attention = LongShortAttention(32, 2, group_size=4, interval=interval).eval()
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    H, W = size
    x = torch.randn(2, H, W, 32)
    with torch.no_grad():
        y = attention(x)
        q, k, v = attention.qkv(x).view(2, H, W, 3, 2, 16).unbind(3)
        G = 4
        if min(H, W) <= G:
            G, interval = max(H, W), 1
        interval = interval or -(-max(H, W) // G)
        table = attention.position_bias.proj(_offsets(G))
        for layer in attention.position_bias.layers:
            table = layer(table)
        table = table.view(2 * G - 1, 2 * G - 1, 2)

        def key(i):  # region and offset name the group; the rest is the place in it
            region, rest = divmod(i, G * interval)
            return (region, rest % interval), rest // interval

        for a in range(H):
            for b in range(W):
                (ga, pa), (gb, pb) = key(a), key(b)
                members = [(i, j) for i in range(H) for j in range(W) if key(i)[0] == ga and key(j)[0] == gb]
                logits = torch.stack(
                    [
                        (q[:, a, b] * k[:, i, j]).sum(-1) / 4
                        + table[pa - key(i)[1] + G - 1, pb - key(j)[1] + G - 1]
                        for i, j in members
                    ]
                )
                values = torch.stack([v[:, i, j] for i, j in members])
                mixed = (logits.softmax(0)[..., None] * values).sum(0).flatten(1)
                torch.testing.assert_close(y[:, a, b], attention.proj(mixed), atol=1e-5, rtol=1e-4)


def _offsets(G):
    steps = torch.arange(1 - G, G).float()
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(-1, 2)


def test_kept_bias_never_goes_stale():
    bias = DynamicPositionBias(64, 4).eval()
    changes = [
        lambda: bias.proj.weight.mul_(3),
        lambda: bias.load_state_dict({k: v + 1 for k, v in bias.state_dict().items()}),
        lambda: bias.load_state_dict({k: v * 2 for k, v in bias.state_dict().items()}, assign=True),
        lambda: setattr(bias.layers[0][2].weight, "data", torch.randn(4, 4)),
        lambda: bias.half().float(),
    ]
    with torch.no_grad():
        bias(7, 7)
        for change in changes:
            change()
            assert torch.equal(bias(7, 7), bias.compute(7, 7))
        assert bias(7, 7) is bias(7, 7)
        assert bias(3, 5).shape == (1, 4, 15, 15)
    assert bias(7, 7).requires_grad
    assert not [k for k in bias.state_dict() if "kept" in k]


def test_optimizer_steps_reach_the_kept_bias():
    model = timm.create_model("crossformer_nano", num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    with torch.inference_mode():
        before = model(x)
    model.train()
    model(x)[:, 0].sum().backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode():
        after = model(x)
    fresh = timm.create_model("crossformer_nano", num_classes=5).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(after, fresh(x))
    assert not torch.allclose(before, after)


def test_masks_are_built_once_a_size():
    model = timm.create_model("crossformer_pp_small", features_only=True).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 100, 140))
        built = _built.cache_info().misses
        model(torch.randn(2, 3, 100, 140))
        assert _built.cache_info().misses == built


def test_constants_of_inference_serve_training():
    _built.cache_clear()
    model = timm.create_model("crossformer_nano", num_classes=5)
    x = torch.randn(1, 3, 90, 110)
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("name", ["crossformer_nano", "crossformer_small", "crossformer_pp_small"])
def test_any_size_in_turn(name):
    model = timm.create_model(name, num_classes=5).eval()
    sizes = [(32, 32), (224, 224), (33, 95), (480, 64), (37, 500)]
    with torch.no_grad():
        inputs = [torch.randn(1, 3, *size) for size in sizes]
        first = [model(x) for x in inputs]
        for x, y in reversed(list(zip(inputs, first, strict=True))):
            assert y.isfinite().all()
            torch.testing.assert_close(model(x), y)


def test_pieces_of_cpu_inference_compute_the_same():
    model = timm.create_model("crossformer_small", num_classes=5).eval()
    x = torch.randn(3, 3, 200, 264)  # padded groups too
    with torch.no_grad():
        in_pieces = model(x)
    torch.testing.assert_close(in_pieces, model(x).detach(), atol=1e-5, rtol=1e-4)


def test_too_small_an_image_is_refused():
    model = timm.create_model("crossformer_nano")
    with pytest.raises(ValueError, match="31x64 pixels is too small"):
        model(torch.randn(1, 3, 31, 64))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="group_size of stage 1 needs 2 entries"):
        timm.create_model("crossformer_small", group_size=(7, [7, 7, 7], 7, 7))
    with pytest.raises(ValueError, match="interval needs one entry for each"):
        timm.create_model("crossformer_small", interval=(8, 4, 2))
    with pytest.raises(ValueError, match="do not share centres"):
        timm.create_model("crossformer_small", patch_sizes=(4, 7))
    model = timm.create_model("crossformer_small", group_size=([7, 14], 7, 7, 7), interval=([1, 4], 4, 2, 1))
    assert model.stages[0].blocks[1].attn.group_size == 14


def test_unknown_model_gets_close_names():
    with pytest.raises(ValueError, match=r"unknown model 'crossformer_smal'; did you mean crossformer_small"):
        find_model("crossformer_smal")


def test_nano_is_small():
    model = timm.create_model("crossformer_nano")
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
