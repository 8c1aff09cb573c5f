"""Files of every form load, wrong ones are refused with one line, downloads are resumed and never half there."""

import http.server
import logging
import pickle
import sys
import threading
import types
import urllib.parse
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from parity.formula import formula_state_dict

from crossformer_vision import UserError, load_checkpoint
from crossformer_vision.checkpoints import PUBLISHED, cached_path, fetch_published, read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"


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
    "ours": lambda s: {"state_dict": {f"net.{k}": v for k, v in ours(s).items()}},
}


def ours(state):
    from crossformer_vision.models.crossformer import checkpoint_filter_fn

    return checkpoint_filter_fn(state)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_the_same(form, published, model, tmp_path):
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


def test_backbone_alone_into_classifier_and_features(published, model, tmp_path):
    backbone = {f"backbone.{k}": v for k, v in published.items() if not k.startswith(("norm.", "head."))}
    report = load_checkpoint(model, {"state_dict": backbone})
    assert report.missing == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    features = timm.create_model("crossformer_tiny", features_only=True)
    report = load_checkpoint(features, {"model": published})
    assert len(report.loaded) == len(backbone) and len(report.unused) == 4 and not report.missing


def test_classifier_of_another_class_count(published, caplog):
    model = timm.create_model("crossformer_tiny", num_classes=10)
    before = model.head.fc.weight.clone()
    with caplog.at_level(logging.WARNING, "crossformer_vision"):
        report = load_checkpoint(model, {"model": published})
    assert report.dropped == ["head.fc.weight", "head.fc.bias"]
    assert "head.fc.weight" in caplog.text and torch.equal(model.head.fc.weight, before)
    with pytest.raises(UserError, match="has 1000 classes, 10 are wanted"):
        load_checkpoint(model, {"model": published}, adapt_classifier=False)


def test_other_channel_counts_are_adapted(published):
    model = timm.create_model("crossformer_tiny", in_chans=1)
    load_checkpoint(model, {"model": published})
    expected = published["patch_embed.projs.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stages[0].embed.convs[0].weight, expected)


@pytest.mark.parametrize("other", ["crossformer_small", "crossformer_base", "crossformer_pp_small"])
def test_wrong_model_is_refused_and_changes_nothing(other, published, classifier_keys):
    model = timm.create_model(other)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="belongs to another model"):
        load_checkpoint(model, {"model": published})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    base, small = (timm.create_model(f"crossformer_{size}") for size in ("base", "small"))
    for a, b in ((base, small), (small, base)):  # one's names are a part of the other's
        with pytest.raises(UserError, match="belongs to another model"):
            load_checkpoint(a, b.state_dict())


def test_nothing_matching_is_refused(model):
    with pytest.raises(UserError, match="none of its weights fits"):
        load_checkpoint(model, timm.create_model("resnet18").state_dict())
    with pytest.raises(UserError, match="none of its weights fits"):
        load_checkpoint(model, {"epoch": 3})


def test_published_configuration_is_read_over(published, model, tmp_path, monkeypatch):
    class CfgNode(dict):
        """As yacs pickles its own."""

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    node = CfgNode(MODEL=CfgNode(TYPE="cross-scale"), LR=0.001)
    node.__dict__["__immutable__"] = True
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", types.SimpleNamespace(CfgNode=CfgNode))
    torch.save({"model": published, "config": node}, tmp_path / "crossformer-t.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert len(load_checkpoint(model, tmp_path / "crossformer-t.pth").loaded) == len(published)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_bad_files_are_named(tmp_path, published, monkeypatch):
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
    with pytest.raises(UserError, match="page.pth: is a web page"):
        read_checkpoint("page.pth")
    torch.save({"model": Evil()}, "evil.pth")
    Path("old.pth").write_bytes(pickle.dumps({"model": Evil()}))
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(UserError, match=f"{name}: (not loaded|truncated)"):
            read_checkpoint(name)
    assert not Path("pwned").exists()


# ---------------------------------------------------------------------------------------------------------------
# Downloads, from a server that behaves as Google Drive does
# ---------------------------------------------------------------------------------------------------------------


class Drive(http.server.BaseHTTPRequestHandler):
    """Redirects, then shows the "too large to scan" page, then sends the file, with ranges and on demand cut off."""

    body = b""
    mode = "whole"
    ranges: list[str] = []

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


def test_truncated_download_is_said_and_resumed(drive):
    handler, url = drive
    handler.mode = "truncated"
    with pytest.raises(UserError, match="truncated|IncompleteRead"):
        fetch_published("crossformer_tiny", url)
    part = cached_path("crossformer_tiny").with_name("crossformer-t.pth.part")
    assert not cached_path("crossformer_tiny").exists() and part.stat().st_size > 0
    handler.mode = "whole"
    assert fetch_published("crossformer_tiny", url).read_bytes() == handler.body
    assert handler.ranges[-1].startswith("bytes=") and not part.exists()


def test_pages_and_rubbish_are_not_kept(drive):
    handler, url = drive
    handler.mode = "quota"
    with pytest.raises(UserError, match="answered with a web page"):
        fetch_published("crossformer_tiny", url)
    handler.mode, handler.body = "whole", b"rubbish" * 1000
    with pytest.raises(UserError, match="what came is not a checkpoint"):
        fetch_published("crossformer_tiny", url)
    assert list(cached_path("crossformer_tiny").parent.iterdir()) == []


def test_no_connection_and_what_only_a_person_can_fetch(drive):
    with pytest.raises(UserError, match="try again"):
        fetch_published("crossformer_tiny", "http://127.0.0.1:9/none")
    with pytest.raises(UserError, match=r"pan\.baidu\.com.*save the file as .*crossformer-pp-s\.pth"):
        timm.create_model("crossformer_pp_small", pretrained=True)
    with pytest.raises(UserError, match="no published weights of 'resnet18'"):
        fetch_published("resnet18")
    backbones = {m.split(".")[0] for m in timm.list_models("crossformer*.in1k", pretrained=True)}
    assert {name for name in PUBLISHED if name.startswith("crossformer")} == backbones
    dense = {name for name in PUBLISHED if name not in backbones}  # each has a recipe of its name
    assert len(dense) == 10 and dense < {path.stem for path in CONFIGS.rglob("*.yaml")}
    assert len({published.filename for published in PUBLISHED.values()}) == len(PUBLISHED)


def test_names_of_other_models_are_not_taken_for_published_ones():
    """Swin's begin with `layers.`, as the published CrossFormers' do."""
    args = dict(img_size=64, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4, num_classes=3)
    source, model = (timm.create_model("swin_tiny_patch4_window7_224", **args) for _ in range(2))
    report = load_checkpoint(model, {"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}})
    assert not report.missing and not report.unused
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
