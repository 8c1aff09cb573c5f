"""Network modules match their definitions in the paper."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crossformer_vision
from crossformer_vision.models import attention as attention_module
from crossformer_vision.models import crossformer, find_model, grouping, index_cache
from crossformer_vision.models.crossformer import CrossScaleEmbedding, LongShortAttention, cel_widths
from crossformer_vision.models.freezing import freeze_position_bias
from crossformer_vision.models.grouping import (
    Layout,
    group,
    lda_map_layout,
    lda_region_layout,
    sda_layout,
    ungroup,
)


def test_cel_widths_halve_and_repeat_the_last():
    assert cel_widths(96, 4) == [48, 24, 12, 12]
    assert cel_widths(192, 2) == [96, 96]
    assert sum(cel_widths(100, 3)) == 100


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (61, 128)])
def test_cel_concatenates_its_convolutions(size):
    cel = CrossScaleEmbedding(3, 32, (4, 8, 16, 32), stride=4, norm_first=False)
    x = torch.randn(2, 3, *size)
    y = cel(x.permute(0, 2, 3, 1))
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    expected = torch.cat([conv(padded) for conv in cel.convs], 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, cel.norm(expected))
    assert y.shape[1:3] == (-(-size[0] // 4), -(-size[1] // 4))


def test_groups_are_adjacent_or_strided():
    x = torch.arange(36).view(1, 6, 6, 1)
    near, far = sda_layout(6, 6, 3), lda_region_layout(6, 6, 3, 2)
    assert group(x, near)[0].flatten().tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert group(x, far)[0].flatten().tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]
    assert group(x, far)[1].flatten().tolist() == [1, 3, 5, 13, 15, 17, 25, 27, 29]
    assert far == lda_map_layout(6, 6, 2)  # published classifiers: G * I is the side of the feature map
    for layout in (near, far):
        assert torch.equal(ungroup(group(x, layout), layout, len(x), 6, 6), x)
    oblong = lda_map_layout(6, 10, 2)
    x = torch.arange(60).view(1, 6, 10, 1)
    assert group(x, oblong)[1].flatten().tolist() == [1, 3, 5, 7, 9, 21, 23, 25, 27, 29, 41, 43, 45, 47, 49]
    assert torch.equal(ungroup(group(x, oblong), oblong, len(x), 6, 10), x)


def test_docstring_example():
    x = torch.arange(8).view(1, 1, 8, 1) + 1  # 0 is padding
    for layout, letters in (
        (Layout(1, 2, 1, 4, 1, 1), "aaaabbbb"),  # SDA
        (Layout(1, 1, 1, 4, 1, 2), "abababab"),  # LDA over the map
        (Layout(1, 2, 1, 2, 1, 2), "ababcdcd"),  # LDA in regions
        (Layout(1, 1, 1, 2, 1, 4), "abcdabcd"),  # LDA by count
    ):
        groups = [g[g > 0].tolist() for g in group(x, layout)]
        drawn = [""] * 8
        for letter, members in zip("abcd", filter(None, groups), strict=False):
            for position in members:
                drawn[position - 1] = letter
        assert "".join(drawn) == letters
        assert letters in " ".join(grouping.__doc__.split()).replace(" ", "")


def members_of(span, size, G, interval):
    """Reference grouping: a function from position to group id, and the largest group for DPB."""
    H, W = size
    if min(H, W) <= G:
        if span == "region":
            return lambda i, j: 0
        G, interval = min(H, W), 0
    if interval is None:
        interval = -(-max(H, W) // G)
    if interval == 0 or (interval == 1 and span == "region"):
        return lambda i, j: (i // G, j // G)
    if span == "map":
        return lambda i, j: (i % interval, j % interval)
    side = G * interval
    return lambda i, j: (i // side, j // side, i % interval, j % interval)


@pytest.mark.parametrize("span", ["map", "region"])
@pytest.mark.parametrize(
    "size, interval",
    [
        ((9, 13), 0),
        ((9, 13), 1),
        ((9, 13), 2),
        ((14, 8), 3),
        ((3, 9), 2),
        ((9, 3), 0),
        ((12, 10), None),
        ((5, 6), 8),
    ],
)
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_attention_is_softmax_within_groups(span, size, interval, blocks, monkeypatch):
    """Every query attends exactly to the valid positions of its group."""
    torch.manual_seed(0)
    if blocks:  # forces the code path of very large groups
        monkeypatch.setattr(crossformer, "use_blocked_attention", lambda layout: True)
        monkeypatch.setattr(attention_module, "BLOCK_BIASES", 100)
    attention = LongShortAttention(32, 2, group_size=4, interval=interval, lda_span=span).eval()
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    H, W = size
    x = torch.randn(2, H, W, 32)
    group_of = members_of(span, size, 4, interval)
    step = interval or 1
    if interval is None:
        step = -(-max(H, W) // 4)
    if min(H, W) <= 4:
        step = 1
    with torch.no_grad():
        y = attention(x)
        q, k, v = attention.qkv(x).view(2, H, W, 3, 2, 16).unbind(3)

        def bias(dy, dx):
            offset = torch.tensor([[dy / step, dx / step]])
            hidden = attention.position_bias.proj(offset)
            for layer in attention.position_bias.layers:
                hidden = layer(hidden)
            return hidden[0]

        for a in range(H):
            for b in range(W):
                members = [(i, j) for i in range(H) for j in range(W) if group_of(i, j) == group_of(a, b)]
                logits = torch.stack(
                    [(q[:, a, b] * k[:, i, j]).sum(-1) / 4 + bias(a - i, b - j) for i, j in members]
                )
                values = torch.stack([v[:, i, j] for i, j in members])
                mixed = (logits.softmax(0)[..., None] * values).sum(0).flatten(1)
                torch.testing.assert_close(y[:, a, b], attention.proj(mixed), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("span", ["map", "region"])
def test_blocked_attention_has_same_gradients(span, monkeypatch):
    torch.manual_seed(0)
    attention = LongShortAttention(32, 2, group_size=4, interval=2, lda_span=span).double()
    x = torch.randn(2, 9, 13, 32, dtype=torch.float64, requires_grad=True)

    def gradients():
        y = attention(x)
        return torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])

    whole = gradients()
    monkeypatch.setattr(crossformer, "use_blocked_attention", lambda layout: True)
    monkeypatch.setattr(attention_module, "BLOCK_BIASES", 100)
    for one, other in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_outputs_follow_in_place_weight_changes():
    """Weight changes that do not increase the version counter; see also `test_state.py`."""
    torch.manual_seed(0)
    model = timm.create_model("crossformer_nano", num_classes=5).double().eval()
    x = torch.randn(2, 3, 72, 90, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        for change in (
            lambda p: p.data.mul_(1.5),
            lambda p: p.numpy().__imul__(1.5),
            lambda p: setattr(p, "data", p.data * 0.5),
        ):
            for p in model.parameters():
                change(p)
            fresh = timm.create_model("crossformer_nano", num_classes=5).double().eval()
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(x), fresh(x))


@pytest.mark.parametrize("name", ["crossformer_nano", "crossformer_tiny"])
def test_freeze_position_bias(name):
    """Frozen biases serve all image sizes, ignore weight changes and are reset by training mode."""
    model = timm.create_model(name, num_classes=5).eval()
    for key, p in model.named_parameters():
        if "position_bias" in key:
            torch.nn.init.normal_(p)
    images = [torch.randn(1, 3, *size) for size in ((64, 64), (96, 160), (160, 96), (224, 224), (288, 320))]
    with torch.no_grad():
        expected = [model(x) for x in images]
        names = set(model.state_dict())
        assert crossformer_vision.freeze_position_bias(model, 224, 224) is model
        frozen = [m.frozen for m in model.modules() if hasattr(m, "frozen")]
        assert all(table is not None for table in frozen) and set(model.state_dict()) == names
        for x, y in zip(images, expected, strict=True):
            torch.testing.assert_close(model(x), y)
        bias = model.stages[0].blocks[0].attn.position_bias
        for key, p in model.named_parameters():
            if key.endswith("position_bias.layers.2.2.weight"):
                p.mul_(-3)
        torch.testing.assert_close(model(images[0]), expected[0])
        assert model.train().eval() is model and bias.frozen is None
        assert not torch.allclose(model(images[0]), expected[0])
    detector = crossformer_vision.create_detector("retinanet", name, 3, width=16)
    crossformer_vision.freeze_position_bias(detector, 128, 160)
    assert detector.body.model.stages[3].blocks[0].attn.position_bias.frozen is not None


def test_freeze_leaves_model_without_dpb_unchanged():
    model = timm.create_model("crossformer_nano", position_bias="absolute")
    assert crossformer_vision.freeze_position_bias(model) is model


def test_index_tensors_are_built_once_per_size():
    model = timm.create_model("crossformer_pp_small", features_only=True).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 100, 140))
        before = {key: id(value) for key, value in index_cache._cache.items()}
        model(torch.randn(2, 3, 100, 140))
        assert {key: id(value) for key, value in index_cache._cache.items()} == before


def test_index_cache_size_is_bounded(monkeypatch):
    monkeypatch.setattr(index_cache, "MAX_BYTES", 1 << 20)
    model = timm.create_model("crossformer_nano", features_only=True).eval()
    with torch.no_grad():
        for side in range(64, 320, 8):
            model(torch.randn(1, 3, side, 400 - side))
            assert sum(map(index_cache._num_bytes, index_cache._cache.values())) <= 1 << 20
    index_cache._cache.clear()
    build = grouping.offset_indices
    args = (40, 40, 40, torch.device("cpu"))  # 20 MB exceeds the cache limit
    assert torch.equal(index_cache.cached(build, *args), build(*args)) and not index_cache._cache


def test_indices_cached_in_inference_work_in_training():
    index_cache._cache.clear()
    model = timm.create_model("crossformer_nano", num_classes=5)
    x = torch.randn(1, 3, 90, 110)
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()


def test_large_groups_never_build_full_bias(monkeypatch):
    """Groups above 2,048 members build no pairwise bias or index, in inference and in training."""
    attention = LongShortAttention(32, 2, group_size=4, interval=1)
    x = torch.randn(1, 48, 50, 32)  # 2,400 members
    whole = 48 * 50 * 48 * 50
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    with Sizes(), torch.no_grad():
        y = attention(x)
    assert max(largest) < whole  # a quarter of the float32 bias of one head
    monkeypatch.setattr(crossformer, "use_blocked_attention", lambda layout: False)
    torch.testing.assert_close(y, attention(x).detach(), atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.nbytes) or t, lambda t: t):
        largest.clear()
        attention(x).sum().backward()
    assert max(largest) < whole


@pytest.mark.parametrize("span", ["map", "region"])
def test_initial_weights_match_published_code(span):
    model = timm.create_model("crossformer_small", lda_span=span)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() > 30_000]
    assert all(0.0195 < m.weight.std() < 0.0205 and m.weight.abs().max() < 0.2 for m in linear)
    assert not any(m.bias.any() for m in linear)
    narrow = timm.create_model("crossformer_nano").stages[0].blocks[0].mlp.fc1.weight
    assert 0.1 < narrow.std() < 0.13  # Xavier: (2 / (32 + 128)) ** 0.5


@pytest.mark.parametrize("span", ["map", "region"])
@pytest.mark.parametrize("name", ["crossformer_nano", "crossformer_small", "crossformer_pp_small"])
def test_image_sizes_can_alternate(name, span):
    model = timm.create_model(name, num_classes=5, lda_span=span).eval()
    sizes = [(32, 32), (224, 224), (33, 95), (480, 64), (37, 500)]
    with torch.no_grad():
        inputs = [torch.randn(1, 3, *size) for size in sizes]
        first = [model(x) for x in inputs]
        for x, y in reversed(list(zip(inputs, first, strict=True))):
            assert y.isfinite().all()
            torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("span", ["map", "region"])
def test_chunked_cpu_inference_matches_unchunked(span):
    model = timm.create_model("crossformer_small", num_classes=5, lda_span=span).eval()
    x = torch.randn(3, 3, 200, 264)  # includes padded groups
    with torch.no_grad():
        chunked_apply = model(x)
    torch.testing.assert_close(chunked_apply, model(x).detach(), atol=1e-5, rtol=1e-4)


def test_too_small_image_raises():
    model = timm.create_model("crossformer_nano")
    with pytest.raises(ValueError, match="31x64 pixels is too small"):
        model(torch.randn(1, 3, 31, 64))


def test_incompatible_options_raise():
    with pytest.raises(ValueError, match="group_size of stage 1 needs 2 entries"):
        timm.create_model("crossformer_small", group_size=(7, [7, 7, 7], 7, 7))
    with pytest.raises(ValueError, match="interval needs one entry for each"):
        timm.create_model("crossformer_small", interval=(8, 4, 2))
    with pytest.raises(ValueError, match="lda_span must be one of 'map', 'region', 'count', not 'regions'"):
        timm.create_model("crossformer_small", lda_span="regions")
    with pytest.raises(ValueError, match="are smaller than their stride 4"):
        timm.create_model("crossformer_small", patch_sizes=(2, 8))
    model = timm.create_model("crossformer_small", group_size=([7, 14], 7, 7, 7), interval=([1, 4], 4, 2, 1))
    assert model.stages[0].blocks[1].attn.group_size == 14


def test_unknown_model_error_suggests_names():
    with pytest.raises(
        ValueError, match=r"unknown model 'crossformer_smal'. Did you mean 'crossformer_small'"
    ):
        find_model("crossformer_smal")


def test_nano_is_small():
    model = timm.create_model("crossformer_nano")
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("size", [(12, 20), (7, 25), (3, 18), (2, 2)])
def test_lda_by_count(size):
    """``G x G`` members at intervals of ``H / G`` and ``W / G``, compared with attention of each group."""
    torch.manual_seed(0)
    H, W = size
    attention = LongShortAttention(32, 2, 4, 8, "count").double()
    x = torch.randn(1, H, W, 32, dtype=torch.float64)
    output = attention(x)
    gh, gw = min(4, H), min(4, W)
    steps = -(-H // gh), -(-W // gw)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 16)).unbind(-3)
    table = attention.position_bias(gh, gw, x).view(2, 2 * gh - 1, 2 * gw - 1)
    expected = torch.zeros_like(x)
    for i in range(H):
        for j in range(W):
            rows, columns = range(i % steps[0], H, steps[0]), range(j % steps[1], W, steps[1])
            members = [(r, c) for r in rows for c in columns]
            keys = torch.stack([k[0, r, c] for r, c in members], 1)
            values = torch.stack([v[0, r, c] for r, c in members], 1)
            dy = torch.tensor([i // steps[0] - r // steps[0] + gh - 1 for r, _ in members])
            dx = torch.tensor([j // steps[1] - c // steps[1] + gw - 1 for _, c in members])
            logits = (keys @ q[0, i, j][:, :, None])[:, :, 0] / 4 + table[:, dy, dx]
            expected[0, i, j] = attention.proj((logits.softmax(1)[:, None] @ values).flatten())
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("strides", [(2, 2, 2, 2), (1, 2, 1, 2), (4, 2, 2, 1)])
def test_strides(strides):
    options = {"strides": strides, "lda_span": "count", "depths": (2, 2, 2, 2)}
    model = timm.create_model("crossformer_nano", features_only=True, **options).eval()
    reductions = [math.prod(strides[: n + 1]) for n in range(4)]
    assert model.feature_info.reduction() == reductions
    maps = model(torch.randn(1, 3, 70, 101))
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-70 // r), -(-101 // r)) for r in reductions]
    classifier = timm.create_model("crossformer_nano", num_classes=3, **options)
    classifier(torch.randn(2, 3, 33, 47)).sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_width_and_heads_of_position_bias():
    model = timm.create_model("crossformer_nano", position_bias_width=24, position_bias_heads="shared").eval()
    bias = model.stages[2].blocks[0].attn.position_bias
    assert bias.proj.out_features == 24 and bias.layers[-1][-1].out_features == 1
    table = bias(5, 7, torch.zeros(1))
    assert table.shape == (model.stages[2].blocks[0].attn.num_heads, 9 * 13)
    assert torch.equal(table[0], table[-1])
    images = torch.randn(1, 3, 64, 80)
    plain = model(images)
    freeze_position_bias(model)
    torch.testing.assert_close(model(images), plain)
    for options, message in (
        ({"strides": (4, 2)}, "strides needs a value of at least 1 for each of 4 stages"),
        ({"strides": (4, 2, 0, 2)}, "strides needs a value of at least 1"),
        ({"position_bias_width": 0}, "position_bias_width must be at least 1"),
        ({"position_bias_heads": "one"}, "position_bias_heads must be one of"),
        ({"position_bias": "relative", "position_bias_width": 8}, "are for DPB, not 'relative'"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("crossformer_nano", **options)


def test_fewer_stages_use_the_first_strides():
    model = timm.create_model("crossformer_nano", depths=(1, 1), group_size=(7, 7), interval=(8, 4))
    assert [info["reduction"] for info in model.feature_info] == [4, 8]
    assert model(torch.randn(1, 3, 40, 50)).shape == (1, 10)
