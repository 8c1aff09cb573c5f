"""The checks of the timm model test suite, applied to every CrossFormer."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import mark_large_models
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor
from timm.utils import AttentionExtract
from torch._dynamo.testing import CompileCounter

NAMES = timm.list_models("crossformer_*")
MODELS = mark_large_models(NAMES)
SMALL = [
    "crossformer_nano",
    "crossformer_tiny",
    "crossformer_pp_small",
]  # one model per family, for slow checks


def images(model, size=96, batch=1):
    return torch.randn(batch, model.pretrained_cfg["input_size"][0], size, size)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=42).train()
    outputs = model(images(model, batch=2))
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    outputs.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient for {parameter_name}"
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_and_classifier(name):
    model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert model.output_fmt == "NHWC"
        assert features.shape == (1, *cfg["pool_size"], model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert model.forward_head(features).shape == (1, cfg["num_classes"])
        model.reset_classifier(0)
        assert model.forward(x).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model.forward(x).shape == (1, *cfg["pool_size"], model.num_features)
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7)
    assert isinstance(model.get_classifier(), torch.nn.Linear)
    assert cfg["classifier"] + ".weight" in state
    for conv in cfg["first_conv"]:
        assert state[conv + ".weight"].shape[1] == 3


@pytest.mark.parametrize("name", MODELS)
def test_features_and_intermediates(name):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    classifier = timm.create_model(name).eval()
    classifier.load_state_dict(
        {k.removeprefix("model."): v for k, v in model.state_dict().items()}, strict=False
    )
    x = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        maps = model(x)
        final, intermediates = classifier.forward_intermediates(x)
        torch.testing.assert_close(classifier.forward_features(x), final)
        for channels, reduction, y, z in zip(
            model.feature_info.channels(), model.feature_info.reduction(), maps, intermediates, strict=True
        ):
            assert y.shape == (2, channels, -(-70 // reduction), -(-101 // reduction))
            torch.testing.assert_close(y, z)
        nhwc = classifier.forward_intermediates(
            x, indices=[1, 3], norm=True, output_fmt="NHWC", intermediates_only=True
        )
        torch.testing.assert_close(nhwc[0], maps[1].permute(0, 2, 3, 1))
        torch.testing.assert_close(nhwc[1], final)
        assert classifier.prune_intermediate_layers([1]) == [1]
        assert len(classifier.stages) == 2
        torch.testing.assert_close(classifier(x), maps[1].permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", MODELS)
def test_out_indices(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    assert [f["reduction"] for f in model.feature_info.get_dicts()] == [8, 16]
    assert len(model(torch.randn(1, 3, 64, 64))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("span", ["map", "region"])
def test_traced_models_accept_other_batch_sizes(span):
    model = timm.create_model("crossformer_nano", lda_span=span).eval()
    features = timm.create_model("crossformer_nano", lda_span=span, features_only=True).eval()
    x, example = torch.randn(3, 3, 70, 90), torch.randn(8, 3, 70, 90)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, example)(x), model(x), atol=1e-5, rtol=1e-4)
        for got, wanted in zip(torch.jit.trace(features, example)(x), features(x), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_empty_batch(name):
    model = timm.create_model(name, num_classes=7)
    outputs = model(torch.zeros(0, 3, 64, 70))
    assert outputs.shape == (0, 7)
    outputs.sum().backward()
    maps = timm.create_model(name, features_only=True)(torch.zeros(0, 3, 64, 70))
    assert [len(x) for x in maps] == [0] * 4


@pytest.mark.parametrize("batch", [1, 2])
def test_many_input_channels(batch):
    """Values and gradients match the reference despite the different memory format."""
    embed = timm.create_model("crossformer_nano", in_chans=9).stages[0].embed
    x = torch.randn(batch, 9, 41, 53)
    y = F.pad(x, (0, 3, 0, 3))
    wanted = embed.norm(torch.cat([conv(y).permute(0, 2, 3, 1) for conv in embed.convs], dim=-1))
    got = embed(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(got, wanted)
    weight = embed.convs[-1].weight
    (one,), (other,) = (torch.autograd.grad(out.square().sum(), weight) for out in (got, wanted))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"attention": "shifted_window"}, {"lda_span": "map"}])
def test_attention_maps_can_be_extracted(options):
    """Disabling fused attention exposes the attention maps to timm's `AttentionExtract`."""
    fused = timm.create_model("crossformer_nano", **options).eval()
    set_fused_attn(False)
    try:
        model = timm.create_model("crossformer_nano", **options).eval()
    finally:
        set_fused_attn(True)
    model.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), fused(x), atol=1e-5, rtol=1e-4)
        seen = AttentionExtract(model, method="hook")(x)
    assert len(seen) == 11  # one map per block
    for attention in seen.values():  # (groups, heads, queries, keys)
        assert attention.dim() == 4 and attention.shape[2] == attention.shape[3]
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))


@pytest.mark.parametrize(
    "stride, reductions", [(8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32])]
)
def test_output_stride(stride, reductions):
    model = timm.create_model(
        "crossformer_nano.cifar10", pretrained=True, features_only=True, output_stride=stride
    ).eval()
    assert model.feature_info.reduction() == reductions
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 75, 130))
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-75 // r), -(-130 // r)) for r in reductions]
    for invalid in (4, 64):
        with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32, not"):
            timm.create_model("crossformer_nano", output_stride=invalid)


@pytest.mark.parametrize("name", MODELS)
def test_fx(name):
    model = timm.create_model(name, num_classes=5).eval()
    extractor = create_feature_extractor(model, return_nodes=["head.fc"])
    x = images(model)
    outputs = extractor(x)["head.fc"]
    torch.testing.assert_close(outputs, model(x), atol=1e-5, rtol=1e-4)
    extractor.train()(x)["head.fc"].mean().backward()
    assert all(p.grad is not None for p in extractor.parameters())


@pytest.mark.slow  # fast tests of `crossformer export` cover dynamic sizes
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bounded", [False, True], ids=["auto", "bounded"])
def test_export_with_dynamic_sizes(name, bounded):
    model = timm.create_model(name, num_classes=5).eval()
    if bounded:
        sizes = {k: torch.export.Dim(k, min=480, max=1024) for k in ("height", "width")}
        dims = {0: torch.export.Dim("batch", min=1, max=64), 2: sizes["height"], 3: sizes["width"]}
    else:
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 512, 640),),
        dynamic_shapes=(dims,),
        prefer_deferred_runtime_asserts_over_guards=bounded,
    )
    for shape in ((1, 3, 481, 515), (3, 3, 640, 512)) + (() if bounded else ((1, 3, 225, 300),)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_state(name):
    model = timm.create_model(name, num_classes=5).eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = timm.create_model(name, num_classes=5).eval()
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            torch.testing.assert_close(other(x), expected)
    assert not [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize("name", SMALL)
def test_options(name):
    model = timm.create_model(
        name, in_chans=1, num_classes=3, global_pool="max", drop_rate=0.1, drop_path_rate=0.2
    )
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    groups = model.group_matcher()
    assert set(groups) == {"stem", "blocks"}
    assert model.no_weight_decay() == set()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_has_same_gradients(name):
    model = timm.create_model(name, num_classes=5).train()
    x = images(model)
    model(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])


@pytest.mark.slow
@pytest.mark.parametrize("span", ["map", "region"])
def test_two_compiled_graphs_cover_all_sizes(span):
    """One graph for square images, which torch specializes, and one for all other images."""
    torch._dynamo.reset()
    counter = CompileCounter()
    stages = dict(depths=(2, 1), num_heads=(2, 4), group_size=(7, 7), interval=(8, 4))
    model = timm.create_model("crossformer_tiny", num_classes=5, lda_span=span, **stages).eval()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    for side in (256, 320, 333, 384):
        for size in ((side, side), (side, 640), (513, side)):
            x = torch.randn(1, 3, *size)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("span", ["map", "region"])
def test_compiled_with_dynamic_sizes(span):
    """Compiled outputs match eager outputs at several sizes, in training and inference."""
    torch._dynamo.reset()
    model = timm.create_model(
        "crossformer_nano", num_classes=5, depths=(1, 2, 1, 1), group_size=(3, 3, 3, 3), lda_span=span
    )
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    sizes = [(128, 160), (224, 224), (145, 200), (320, 256)]
    for mode in (True, False):
        model.train(mode)
        for size in sizes:
            x = torch.randn(2, 3, *size)
            with torch.set_grad_enabled(mode):
                torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_bundled_weights_with_both_lda_spans():
    """Both spans agree at the training size of 64x64 and differ at larger sizes."""
    region, map_ = (
        timm.create_model("crossformer_nano.cifar10", pretrained=True, lda_span=span).eval()
        for span in ("region", "map")
    )
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(region(x), map_(x))
        x = torch.randn(2, 3, 160, 224)
        assert not torch.allclose(region(x), map_(x), atol=1e-2)


def test_bundled_weights():
    model = timm.create_model("crossformer_nano.cifar10", pretrained=True).eval()
    assert model.num_classes == 10
    path = Path(model.pretrained_cfg["file"])
    assert path.stat().st_size <= 8e6
    stored = safetensors.torch.load_file(path)
    assert all(torch.equal(value, stored[name].float()) for name, value in model.state_dict().items())
    other = timm.create_model("crossformer_nano", pretrained=True, num_classes=3, in_chans=1)
    assert torch.equal(other.norm.weight, model.norm.weight) and other(torch.randn(1, 1, 64, 64)).shape == (
        1,
        3,
    )
