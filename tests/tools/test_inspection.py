"""Tests for model inspection: groups, attention, patches, position bias, amplitudes and class activation."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import classifier_checkpoint, retinanet_checkpoint, segmenter_checkpoint

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.models.attention import pair_biases
from crossformer_vision.models.grouping import lda_map_layout, lda_region_layout, sda_layout
from crossformer_vision.tools import inspection as inspect
from crossformer_vision.tools import inspection_page as page_of

SIZE = (1, 3, 121, 150)  # maps of 31x38, 16x19, 8x10, 4x5


@pytest.fixture(scope="module", params=["map", "region"])
def net(request):
    torch.manual_seed(0)
    return timm.create_model("crossformer_nano", lda_span=request.param, interval=(4, 2, 2, 1)).eval()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_groups_match_paper():
    H, W, y, x = 11, 13, 6, 9
    rows, cols = np.mgrid[:H, :W]
    sda = inspect.group_of(H, W, sda_layout(H, W, 4), y, x)
    assert (sda == ((rows // 4 == y // 4) & (cols // 4 == x // 4))).all()
    over_map = inspect.group_of(H, W, lda_map_layout(H, W, 3), y, x)
    apart = (rows % 3 == y % 3) & (cols % 3 == x % 3)
    assert (over_map == apart).all()
    in_regions = inspect.group_of(H, W, lda_region_layout(H, W, 2, 3), y, x)
    assert (in_regions == (apart & (rows // 6 == y // 6) & (cols // 6 == x // 6))).all()


@torch.no_grad()
def test_recorded_attention_matches_model(net):
    images = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    inputs, outputs, hooks = {}, {}, []
    for place in ((1, 0), (1, 1), (2, 3)):

        def keep(_, args, output, place=place):
            inputs[place], outputs[place] = args[0], output

        hooks.append(net.stages[place[0]].blocks[place[1]].attn.register_forward_hook(keep))
    before = net(images)
    expected = dict(outputs)
    kept = inspect.record(net, images)
    assert torch.equal(net(images), before)  # fused attention is restored
    for hook in hooks:
        hook.remove()
    for s, b in expected:
        attn, block = net.stages[s].blocks[b].attn, kept.blocks[s, b]
        H, W = block.size
        v = attn.qkv(inputs[s, b]).view(H * W, 3, attn.num_heads, -1)[:, 2]  # (HW, h, d)
        found = []
        for y, x in ((0, 0), (H - 1, W - 1), (H // 2, W // 3)):
            heads = [
                torch.from_numpy(block.from_position(y, x, head)).flatten() for head in range(attn.num_heads)
            ]
            mixed = torch.stack([weights @ v[:, head] for head, weights in enumerate(heads)])
            found.append(attn.proj(mixed.flatten()) - expected[s, b][0, y, x])
            assert block.from_position(y, x).sum() == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(
                block.matrix()[y * W + x].reshape(H, W), block.from_position(y, x), atol=1e-6
            )
        assert torch.stack(found).abs().max() < 1e-5


def test_rollout_and_amplitudes(net):
    kept = inspect.record(net, torch.randn(SIZE))
    rolled = kept.rollout(2)
    np.testing.assert_allclose(rolled.sum(1), 1, rtol=1e-4)
    assert (rolled > 0).sum() > (kept.blocks[2, 0].matrix() > 0).sum()  # exceeds one block
    assert sorted(kept.amplitudes) == [(s, b) for s, depth in enumerate((1, 3, 6, 1)) for b in range(depth)]
    assert list(kept.cooled) == [(2, 2)]  # ACL follows every third block, except the last block of a stage


@pytest.mark.parametrize("stage", [0, 2])
def test_patches_match_embedding_receptive_field(net, stage):
    embed = net.stages[stage].embed
    channels = embed.convs[0].in_channels
    x = torch.randn(1, 20, 24, channels, requires_grad=True)
    embed(x)[0, 2, 3].square().sum().backward()
    rows, cols = np.nonzero(x.grad.abs().sum(-1)[0].numpy())
    unit = 1 if stage == 0 else net.feature_info[stage - 1]["reduction"]
    x1, y1, x2, y2 = np.array(inspect.patches(net, stage, 2, 3))[-1] / unit  # the largest kernel
    assert (max(0, x1), max(0, y1), x2, y2) == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)


def test_position_bias_matches_attention(net):
    attn = net.stages[2].blocks[1].attn
    layout = attn.layout(8, 10)
    biases = inspect.position_bias(attn, layout.gh, layout.gw)
    with torch.no_grad():
        pairs = pair_biases(attn.position_bias(layout.gh, layout.gw, torch.zeros(1)), layout)[0]
    query, key = 1, layout.gw + 2  # members (0, 1) and (1, 2)
    np.testing.assert_array_equal(
        biases[:, layout.gh - 1 - 1, layout.gw - 1 - 1], pairs[:, query, key].numpy()
    )


def test_class_activation_depends_on_class():
    net = load_predictor("crossformer_nano.cifar10", "cpu").net
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    first, second = (inspect.class_activation(net, images, label) for label in (0, 5))
    for activation in (first, second):
        assert activation.shape == (64, 96) and activation.min() >= 0 and activation.max() <= 1
    assert np.abs(first - second).max() > 0.1
    convnext = timm.create_model("convnext_atto", num_classes=4).eval()
    assert inspect.class_activation(convnext, images).shape == (64, 96)
    with pytest.raises(UserError, match="has tokens, not a map"):
        inspect.class_activation(timm.create_model("vit_tiny_patch16_224", img_size=(64, 96)).eval(), images)


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda: classifier_checkpoint("crossformer_pp_small"),
        lambda: segmenter_checkpoint("crossformer_nano"),
        retinanet_checkpoint,
    ],
)
def test_inspection_page(checkpoint, photo, tmp_path):
    predictor = load_predictor(checkpoint(), "cpu")
    page = tmp_path / "page.png"
    line = page_of.draw_page(
        predictor, Image.open(photo), page, point=(1, 0), stage=1, size=64, compare_with=("itself", predictor)
    )
    assert "stage 2, map 8x12" in line and "position 0, 11" in line
    drawn = np.asarray(Image.open(page).convert("L"))
    assert min(drawn.shape) > 1000 and drawn.std() > 20


def test_extreme_aspect_ratio_is_limited():
    """Resizing the shorter side of a 12000x8 image to 224 would give 336000x224."""
    predictor = load_predictor("crossformer_nano.cifar10", "cpu")
    images, pixels = page_of.preprocess(predictor, Image.new("RGB", (12000, 8)), 224)
    assert pixels.shape == (32, page_of.MAX_ASPECT * 224, 3) and images.shape[2:] == pixels.shape[:2]


def test_invalid_arguments(photo, tmp_path, capsys):
    def said(*args):
        assert main(["inspect", *args, "--output", str(tmp_path / "x.png")]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    nano = "crossformer_nano.cifar10"
    assert "--stage 5: must be from 1 to 4" in said(nano, str(photo), "--stage", "5")
    assert "--head 5: must be from 1 to 4" in said(nano, str(photo), "--head", "5")
    assert "--block 0: must be from 1 to 6" in said(nano, str(photo), "--block", "0")
    assert "--point 2,0: normalized coordinates" in said(nano, str(photo), "--point", "2,0")
    assert "--point middle" in said(nano, str(photo), "--point", "middle")
    assert "--size 16: must be at least 32" in said(nano, str(photo), "--size", "16")
    assert "no such file" in said(nano, str(tmp_path / "absent.png"))
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(UserError, match="no CrossFormer"):
        inspect.record(timm.create_model("resnet18"), torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="that of an ablation"):
        windows = timm.create_model("crossformer_nano", attention="shifted_window")
        inspect.record(windows, torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="too large. Use a smaller --size"):
        wide = timm.create_model(
            "crossformer_nano", lda_span="map", interval=(1, 1, 1, 1), depths=(2, 2, 2, 2)
        )
        inspect.record(wide, torch.zeros(1, 3, 224, 224))
    assert main(["inspect", nano, str(photo), "--output", str(tmp_path / "nano.png")]) == 0
    assert "class" in capsys.readouterr().out and (tmp_path / "nano.png").exists()
