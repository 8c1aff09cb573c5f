"""Checkpoint formats, errors for invalid files, and resumable atomic downloads."""

import gzip
import http.server
import json
import logging
import pickle
import threading
import urllib.parse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import PARITY
from parity.formula import formula_images, formula_state_dict
from published_files import FILE_2021, state_dict_of_2021, write_file_of_2021

from crossformer_vision import UserError, create_detector, create_segmenter, load_checkpoint
from crossformer_vision.cli import main
from crossformer_vision.weights.download import check_connection
from crossformer_vision.weights.published import PUBLISHED, cached_path, fetch_published, how_to_build
from crossformer_vision.weights.reading import read_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def published(classifier_keys):
    return formula_state_dict(classifier_keys["crossformer_tiny"])


@pytest.fixture(scope="module")
def model():
    return timm.create_model("crossformer_tiny").eval()


FORMS = {
    "model": lambda s: {"model": s, "epoch": 3, "max_accuracy": 81.5},
    "state_dict": lambda s: {"state_dict": s, "meta": {"epoch": 12}},
    "bare": lambda s: s,
    "module": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "backbone": lambda s: {
        "state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"neck.x": torch.ones(1)}
    },
    "someone's LightningModule": lambda s: {"state_dict": {f"model.{k}": v for k, v in ours(s).items()}},
    "timm's averaged": lambda s: {"state_dict": {k: v * 2 for k, v in s.items()}, "state_dict_ema": s},
    "ours": lambda s: {"state_dict": {f"net.{k}": v for k, v in ours(s).items()}},
}


def ours(state):
    from crossformer_vision.models.variants import checkpoint_filter_fn

    return checkpoint_filter_fn(state)


@pytest.mark.parametrize("form", FORMS)
def test_every_checkpoint_format_loads_same_weights(form, published, model, tmp_path):
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form](published), path)
    report = load_checkpoint(model, path)
    assert len(report.loaded) == len(published) and not report.missing and not report.dropped
    for name, value in ours(published).items():
        assert torch.equal(model.state_dict()[name], value)


def test_safetensors(published, model, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(published, path)
    assert len(load_checkpoint(model, path).loaded) == len(published)


def test_renamed_and_sharded_safetensors(published, model, tmp_path):
    safetensors.torch.save_file(published, tmp_path / "weights.bin")
    assert len(load_checkpoint(model, tmp_path / "weights.bin").loaded) == len(published)
    names = list(published)
    half = len(names) // 2
    where = {}
    for file, part in (("a.safetensors", names[:half]), ("b.safetensors", names[half:])):
        safetensors.torch.save_file({name: published[name] for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert len(load_checkpoint(model, index).loaded) == len(published)
    for weight_map, message in (
        ({"x": "../a.safetensors"}, "lies outside its folder"),
        ({"x": "c.safetensors"}, "c.safetensors: no such checkpoint file"),
        ({}, "lists no shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            read_checkpoint(index)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index.json: truncated or not a checkpoint"):
        read_checkpoint(index)


def test_backbone_weights_into_classifier_and_features(published, model, tmp_path):
    backbone = {f"backbone.{k}": v for k, v in published.items() if not k.startswith(("norm.", "head."))}
    report = load_checkpoint(model, {"state_dict": backbone})
    assert report.missing == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    features = timm.create_model("crossformer_tiny", features_only=True)
    report = load_checkpoint(features, {"model": published})
    assert len(report.loaded) == len(backbone) and len(report.unused) == 4 and not report.missing


def test_other_class_count(published, caplog):
    model = timm.create_model("crossformer_tiny", num_classes=10)
    before = model.head.fc.weight.clone()
    with caplog.at_level(logging.WARNING, "crossformer_vision"):
        report = load_checkpoint(model, {"model": published})
    assert report.dropped == ["head.fc.weight", "head.fc.bias"]
    assert "head.fc.weight" in caplog.text and torch.equal(model.head.fc.weight, before)
    with pytest.raises(UserError, match="has 1000 classes, 10 are needed"):
        load_checkpoint(model, {"model": published}, adapt_classifier=False)


def test_other_channel_counts_are_adapted(published):
    model = timm.create_model("crossformer_tiny", in_chans=1)
    load_checkpoint(model, {"model": published})
    expected = published["patch_embed.projs.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stages[0].embed.convs[0].weight, expected)


@pytest.mark.parametrize("other", ["crossformer_small", "crossformer_base", "crossformer_pp_small"])
def test_wrong_model_raises_and_keeps_weights(other, published, classifier_keys):
    model = timm.create_model(other)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="belongs to another model"):
        load_checkpoint(model, {"model": published})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    base, small = (timm.create_model(f"crossformer_{size}") for size in ("base", "small"))
    for a, b in ((base, small), (small, base)):  # parameter names of one are a subset of the other
        with pytest.raises(UserError, match="belongs to another model"):
            load_checkpoint(a, b.state_dict())


def test_checkpoint_without_matching_weights_raises(model):
    with pytest.raises(UserError, match="none of its weights fits"):
        load_checkpoint(model, timm.create_model("resnet18").state_dict())
    with pytest.raises(UserError, match="none of its weights fits"):
        load_checkpoint(model, {"epoch": 3})


# ---------------------------------------------------------------------------------------------------------------
# Complete published classification checkpoints
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_2021(tmp_path, monkeypatch):
    """Write the CrossFormer-T checkpoint to the cache path used by `pretrained`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    path = cached_path("crossformer_tiny")
    path.parent.mkdir(parents=True)
    return write_file_of_2021(path, "crossformer_tiny", monkeypatch)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
@pytest.mark.parametrize("name", FILE_2021)
def test_2021_checkpoint_keys_are_weights_and_buffers(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = load_checkpoint(model, {"model": state_dict_of_2021(name)})
    assert not report.missing and not report.unused and not report.dropped
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert len(report.buffers) == 2 * blocks and len(report.loaded) + len(report.buffers) == len(
        FILE_2021[name]
    )
    assert f"{2 * blocks} index buffers in the file ignored" in str(report)


def test_2021_checkpoint_loads_into_every_classifier(file_2021):
    images = formula_images(2, 224, 224)
    expected = torch.from_numpy(np.load(PARITY / "classifier_logits.npz")["crossformer_tiny"])
    by_hand = timm.create_model("crossformer_tiny")
    load_checkpoint(by_hand, file_2021)
    overlay = dict(file=str(file_2021))
    for model in (
        by_hand,
        timm.create_model("crossformer_tiny", pretrained=True),
        timm.create_model("crossformer_tiny.in1k", pretrained=True),
        timm.create_model("crossformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images), expected, atol=1e-4, rtol=0)
        assert not model.pretrained_cfg.get("state_dict")
    other = timm.create_model("crossformer_tiny", pretrained=True, num_classes=7, in_chans=1)
    assert torch.equal(other.norm.weight, by_hand.norm.weight)
    conv = by_hand.stages[0].embed.convs[1].weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.stages[0].embed.convs[1].weight, conv)


def test_2021_checkpoint_loads_into_every_backbone(file_2021):
    images = torch.randn(1, 3, 96, 160)
    plain = timm.create_model("crossformer_tiny", pretrained=True).eval()
    by_hand = timm.create_model("crossformer_tiny", features_only=True)
    load_checkpoint(by_hand, file_2021)
    dense = []
    for create, name in ((create_detector, "retinanet"), (create_detector, "mask_rcnn")):
        dense.append(create(name, "crossformer_tiny", 3, width=16, pretrained=True))
        dense.append(create(name, "crossformer_tiny", 3, width=16))
        load_checkpoint(dense[-1], file_2021)
    for name in ("semantic_fpn", "upernet"):
        dense.append(create_segmenter(name, "crossformer_tiny", 3, width=16, pretrained=True))
        dense.append(create_segmenter(name, "crossformer_tiny", 3, width=16))
        load_checkpoint(dense[-1], file_2021)
    features = timm.create_model("crossformer_tiny", features_only=True, pretrained=True)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, intermediates_only=True)
        for body in (features, by_hand, *(net.body for net in dense)):
            for ours, theirs in zip(body.eval()(images), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_recipes_start_from_2021_checkpoint(file_2021, tmp_path):
    """Train with `pretrained: true` on the command line."""
    tiny = "--model.backbone crossformer_tiny --data.train_images 8 --data.val_images 4 --data.batch_size 4"
    tiny += " --data.num_workers 0 --trainer.max_epochs 1 --trainer.accelerator cpu --model.lr 0"
    weights = read_checkpoint(file_2021)["model"]
    for task in ("detection", "segmentation"):
        folder = tmp_path / task
        options = f"--task {task} --model.pretrained true --model.width 16 --run.dir {folder}"
        assert main(["train", *tiny.split(), *options.split()]) == 0
        state = read_checkpoint(folder / "last.ckpt")["state_dict"]
        (name,) = (key for key in state if key.endswith("stages.2.blocks.0.attn.qkv.weight"))
        assert torch.equal(state[name], weights["layers.2.blocks.0.attn.qkv.weight"])


def test_numpy_scalars_are_loaded(tmp_path, published, model):
    """NumPy scalars, such as best scores of OpenMMLab, pickled by NumPy 1 and NumPy 2."""
    scores = {kind: np.dtype(kind).type(1) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}
    torch.save({"state_dict": published, "meta": {"best": scores}}, tmp_path / "two.pth")
    with zipfile.ZipFile(tmp_path / "two.pth") as two, zipfile.ZipFile(tmp_path / "one.pth", "w") as one:
        for item in two.infolist():
            content = two.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray\n" in content
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
            one.writestr(item, content)
    for name in ("two.pth", "one.pth"):
        assert read_checkpoint(tmp_path / name)["meta"]["best"] == scores
        assert len(load_checkpoint(model, tmp_path / name).loaded) == len(published)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_invalid_file_errors_name_the_file(tmp_path, published, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gone.pth: no such checkpoint file"):
        read_checkpoint("gone.pth")
    torch.save({"model": published}, "whole.pth")
    data = Path("whole.pth").read_bytes()
    Path("cut.pth").write_bytes(data[: len(data) // 2])
    Path("cut.safetensors").write_bytes(data[:100])
    Path("empty.pth").write_bytes(b"")
    for name in ("cut.pth", "cut.safetensors", "empty.pth"):
        with pytest.raises(UserError, match=f"{name}: truncated or not a checkpoint"):
            read_checkpoint(name)
    Path("page.pth").write_text("<!DOCTYPE html><html>quota exceeded</html>")
    Path("lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a0b\nsize 10485760\n")
    Path("packed.pth").write_bytes(gzip.compress(data))
    for name, message in (
        ("page.pth", "is a web page"),
        ("lfs.pth", "is a Git LFS pointer"),
        ("packed.pth", "is compressed with gzip"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_checkpoint(name)
    torch.save({"model": Evil()}, "evil.pth")
    Path("old.pth").write_bytes(pickle.dumps({"model": Evil()}))
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(UserError, match=f"{name}: (not loaded|truncated)"):
            read_checkpoint(name)
    assert not Path("pwned").exists()


# ---------------------------------------------------------------------------------------------------------------
# Downloads from a server that mimics Google Drive
# ---------------------------------------------------------------------------------------------------------------


class Drive(http.server.BaseHTTPRequestHandler):
    """Redirect, show the "too large to scan" page, then send the file; supports ranges and truncation."""

    body = b""
    mode = "whole"
    ranges: list[str] = []
    sent = 0  # sent bytes

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/uc":
            self.send_response(303)
            self.send_header("Location", f"/download?{url.query}")
            self.end_headers()
        elif self.mode == "quota" or "confirm" not in query:
            form = '<form action="/download" method="get"><input type="hidden" name="confirm" value="t">'
            form += f'<input type="hidden" name="id" value="{query["id"]}"></form>'
            page = (
                "<html>Quota exceeded</html>" if self.mode == "quota" else f"<html>cannot scan{form}</html>"
            )
            self.reply(200, page.encode(), "text/html; charset=utf-8")
        else:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.ranges.append(asked or "")
            if start >= len(self.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.body)}")
                self.end_headers()
                return
            type(self).sent += len(self.body) - start
            self.reply(206 if asked else 200, self.body[start:], "application/octet-stream")

    def reply(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.mode == "truncated" and kind.endswith("stream")
        self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def drive(tmp_path, monkeypatch, published):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.save({"model": published}, tmp_path / "file.pth")
    handler = type("Handler", (Drive,), dict(body=(tmp_path / "file.pth").read_bytes(), ranges=[]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/uc"
    server.shutdown()


def test_pretrained_model_stores_weights_once():
    plain, pretrained = (
        timm.create_model("crossformer_nano", pretrained=p, num_classes=10) for p in (False, True)
    )
    assert len(pickle.dumps(pretrained)) < 1.01 * len(pickle.dumps(plain))


def test_download_through_redirect_and_warning_page(drive):
    handler, url = drive
    path = fetch_published("crossformer_tiny", url)
    assert path == cached_path("crossformer_tiny") and path.read_bytes() == handler.body
    model = timm.create_model("crossformer_tiny", pretrained=True, num_classes=7)  # from the cache
    expected = read_checkpoint(path)["model"]["norm.weight"]
    assert torch.equal(model.norm.weight, expected)
    features = timm.create_model("crossformer_tiny.in1k", pretrained=True, features_only=True)
    assert torch.equal(
        features.model.stages[0].embed.norm.bias, read_checkpoint(path)["model"]["patch_embed.norm.bias"]
    )


def test_concurrent_requests_share_one_download(drive):
    handler, url = drive
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_published("crossformer_tiny", url), range(4)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == handler.body
    assert not list(paths[0].parent.glob("*.part"))


def test_truncated_download_raises_and_resumes(drive):
    handler, url = drive
    handler.mode = "truncated"
    with pytest.raises(UserError, match="truncated|IncompleteRead") as caught:
        fetch_published("crossformer_tiny", url)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None  # one error without a cause
    part = cached_path("crossformer_tiny").with_name("crossformer-t.pth.part")
    assert not cached_path("crossformer_tiny").exists() and part.stat().st_size > 0
    handler.mode = "whole"
    assert fetch_published("crossformer_tiny", url).read_bytes() == handler.body
    assert handler.ranges[-1].startswith("bytes=") and not part.exists()


def test_invalid_downloads_are_removed(drive):
    handler, url = drive
    handler.mode = "quota"
    with pytest.raises(UserError, match="answered with a web page"):
        fetch_published("crossformer_tiny", url)
    handler.mode, handler.body = "whole", b"rubbish" * 1000
    with pytest.raises(UserError, match="not the weights of crossformer_tiny .*The file was removed"):
        fetch_published("crossformer_tiny", url)
    (left,) = cached_path("crossformer_tiny").parent.iterdir()  # lock file for concurrent processes
    assert left.suffix == ".lock" and not left.read_bytes()


def test_download_of_wrong_model_is_removed(drive, tmp_path):
    """Weights of another model leave neither a complete nor a partial file in the cache."""
    handler, url = drive
    torch.save({"model": {"fc.weight": torch.zeros(10, 4)}}, tmp_path / "other.pth")
    handler.body = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(UserError, match="not the weights of crossformer_tiny .*The file was removed"):
        fetch_published("crossformer_tiny", url)
    assert not cached_path("crossformer_tiny").exists()
    assert not list(cached_path("crossformer_tiny").parent.glob("*.part"))


def test_complete_partial_file_is_not_downloaded_again(drive):
    """Covers a process killed between the last byte and the rename."""
    handler, url = drive
    cached_path("crossformer_tiny").parent.mkdir(parents=True)
    cached_path("crossformer_tiny").with_name("crossformer-t.pth.part").write_bytes(handler.body)
    assert fetch_published("crossformer_tiny", url).read_bytes() == handler.body
    assert handler.sent == 0


def test_connection_check_uses_port_and_proxy(drive, monkeypatch):
    _, url = drive
    check_connection(url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError, match=r"no connection to 127\.0\.0\.1"):
        check_connection(url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    check_connection(url)


def test_errors_give_manual_download_instructions(drive):
    by_hand = r"Try again.*; or get it in a browser from https://pan\.baidu\.com/s/1M45YXZgVvp6Ew9DO8UhdlA .code nkju."
    with pytest.raises(UserError, match=by_hand + r" and save it as .*crossformer-t\.pth"):
        fetch_published("crossformer_tiny", "http://127.0.0.1:9/none")
    with pytest.raises(UserError, match=r"pan\.baidu\.com.*save it as .*crossformer-pp-s\.pth"):
        timm.create_model("crossformer_pp_small", pretrained=True)
    with pytest.raises(UserError, match="no published weights of 'resnet18'"):
        fetch_published("resnet18")
    backbones = {m.split(".")[0] for m in timm.list_models("crossformer*.in1k", pretrained=True)}
    assert {name for name in PUBLISHED if name.startswith("crossformer")} == backbones
    dense = {name for name in PUBLISHED if name not in backbones}  # each has a recipe of its name
    assert len(dense) == 10 and dense < {path.stem for path in CONFIGS.rglob("*.yaml")}
    assert len({published.filename for published in PUBLISHED.values()}) == len(PUBLISHED)


def test_how_to_build_published_models(tmp_path):
    """The printed code runs and builds the groups of the published configuration."""
    for name, groups in (
        ("semantic_fpn_crossformer_small", (14, 8)),
        ("upernet_crossformer_base", (7, 4)),
        ("retinanet_crossformer_small", (7, 4)),
    ):
        path = tmp_path / "file.pth"
        *create, load = how_to_build(name, path).splitlines()
        found = {}
        with torch.device("meta"):
            exec("\n".join(create), found)
        block = found["model"].body.model.stages[1].blocks[1].attn
        assert (block.group_size, block.interval, block.lda_span) == (*groups, "map") and str(path) in load
    assert 'model = timm.create_model("crossformer_tiny")' in how_to_build("crossformer_tiny", path)


def test_swin_keys_are_not_treated_as_published_crossformer():
    """Swin keys start with `layers.`, like those of the published CrossFormer."""
    args = dict(img_size=64, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4, num_classes=3)
    source, model = (timm.create_model("swin_tiny_patch4_window7_224", **args) for _ in range(2))
    report = load_checkpoint(model, {"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}})
    assert not report.missing and not report.unused
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_full_weights_load_into_first_stages(tmp_path):
    whole = timm.create_model("crossformer_nano.cifar10", pretrained=True).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    first = timm.create_model("crossformer_nano", features_only=True, out_indices=(0, 1)).eval()
    load_checkpoint(first, tmp_path / "whole.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, intermediates_only=True)[1]
        assert torch.allclose(first(images)[1], expected, atol=1e-5)
    first.set_grad_checkpointing(True)
    assert all(stage.grad_checkpointing for stage in first.model.stages)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "pvt_v2_b0",
        "convnext_atto",
        "twins_svt_small",
        "deit_tiny_patch16_224",
    ],
)
def test_classifier_of_any_family_initializes_dense_model(name: str):
    # timm names backbone stages differently from classifier stages in some families.
    classifier = timm.create_model(name, num_classes=3)
    dense = create_segmenter("semantic_fpn", name, 2, width=16)
    report = load_checkpoint(dense, classifier.state_dict())
    body = {n for n, _ in dense.backbone.body.named_parameters() if not n.startswith("scales.")}
    assert {f"backbone.body.{n}" for n in body} <= set(report.loaded)
    values = {float(p.double().sum()) for p in classifier.parameters()}
    assert {float(p.double().sum()) for n, p in dense.backbone.body.named_parameters() if n in body} <= values


def test_small_image_swin_initializes_dense_model():
    """The bias table of the clipped 2x2 window is resized to the full window of the dense model."""
    tiny = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
    classifier = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3, **tiny)
    name = "layers.3.blocks.0.attn.relative_position_bias_table"
    table = classifier.state_dict()[name]
    table.copy_(torch.arange(9.0)[:, None])
    dense = create_segmenter("semantic_fpn", "swin_tiny_patch4_window7_224", 2, width=16, backbone_args=tiny)
    load_checkpoint(dense, classifier.state_dict())
    resized = dense.backbone.body.state_dict()[name.replace("layers.3", "layers_3")]
    assert table.shape == (9, 1) and resized.shape == (49, 1)
    assert resized.view(7, 7)[3, 3] == pytest.approx(4, abs=1e-4)  # zero offset keeps its value
    assert (resized.view(7, 7).diff(dim=0) > 0).all() and (resized.view(7, 7).diff(dim=1) > 0).all()
