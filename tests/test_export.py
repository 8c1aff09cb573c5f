"""Graphs for other programs: any size, both forms of LDA, and what the files say of themselves."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from crossformer_vision import UserError, create_segmenter, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.export import export
from crossformer_vision.predict.exported import KEY

SMALL = {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4)}
NAMES = ["cat", "dog", "猫"]


def classifier(model: str, **keywords) -> dict:
    """What a run's checkpoint holds of a classifier."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=3, **keywords)
    hyper = {"model": model, "num_classes": 3, "model_args": keywords}
    content = {"task": "classification", "classes": NAMES, "image": resolve_model_data_config(net)}
    return {**content, "hyper_parameters": hyper, "lda_span": None, "state_dict": net.state_dict()}


def segmenter(model: str, **keywords) -> dict:
    torch.manual_seed(0)
    net = create_segmenter("semantic_fpn", model, 3, width=16, backbone_args=keywords)
    hyper = {
        "segmenter": "semantic_fpn",
        "model": model,
        "num_classes": 3,
        "width": 16,
        "model_args": keywords,
    }
    image = {"short_side": 64, "long_side": None, "size_divisor": 1, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    content = {"task": "segmentation", "classes": NAMES, "image": image, "hyper_parameters": hyper}
    return {**content, "lda_span": None, "state_dict": net.state_dict()}


def picture(path, width=150, height=97):
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return path


@pytest.mark.parametrize("span", ["region", pytest.param("map", marks=pytest.mark.slow)])
def test_onnx_of_any_size(span, tmp_path):
    file = tmp_path / "deep" / "nano.onnx"
    content = classifier("crossformer_nano", lda_span=span, **SMALL)
    said = export(content, file)
    assert said["size"] is None and max(said["differences"].values()) < 1e-5
    assert [p.name for p in file.parent.iterdir()] == ["nano.onnx"]
    onnx.checker.check_model(onnx.load(file))
    session = onnxruntime.InferenceSession(str(file))
    (given,) = session.get_inputs()
    assert given.name == "images" and given.shape[1] == 3
    assert all(isinstance(given.shape[n], str) for n in (0, 2, 3))
    net = load_predictor(content).net
    # Maps smaller than a group in one direction, in both, in no stage; sizes that 32 does not divide.
    for shape in ((1, 3, 32, 32), (2, 3, 33, 500), (1, 3, 800, 61), (1, 3, 480, 515), (5, 3, 129, 128)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = net(x)
        (got,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-4, rtol=1e-3)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert metadata["classes"] == NAMES and metadata["image"]["mean"] == list(content["image"]["mean"])
    photo = picture(tmp_path / "photo.png")
    theirs, ours = load_predictor(file)(photo), load_predictor(content)(photo)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    with pytest.raises(UserError, match="exported file already"):
        export(file, tmp_path / "again.onnx")
    assert main(["predict", str(file), str(photo), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.slow
def test_a_segmenter(tmp_path):
    content = segmenter("crossformer_nano", **{**SMALL, "depths": (1, 1, 1, 1)})
    file = tmp_path / "maps.onnx"
    said = export(content, file)
    assert said["size"] is None and max(said["differences"].values()) < 1e-5
    photo = picture(tmp_path / "photo.png")
    theirs, ours = load_predictor(file)(photo), load_predictor(content)(photo)
    assert theirs.class_map.shape == (97, 150) and (theirs.class_map == ours.class_map).all()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classifier", "segmenter"])
@pytest.mark.parametrize("model", ["crossformer_tiny", "crossformer_pp_small", "resnet18"])
def test_others(model, head, tmp_path):
    content = (classifier if head == "classifier" else segmenter)(model)
    said = export(content, tmp_path / "graph.onnx")
    assert said["size"] is None and max(said["differences"].values()) < 1e-3


def test_a_network_of_one_size_says_so(tmp_path):
    file = tmp_path / "vit.onnx"
    said = export(classifier("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=1), file)
    assert said["size"] == [224, 224] and list(said["differences"]) == ["224x224"]
    photo = picture(tmp_path / "photo.png")
    assert load_predictor(file)(photo).probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_what_cannot_be(tmp_path, capsys):
    for args, said in (
        (
            ["crossformer_nano.cifar10", "--out", str(tmp_path / "x.tflite")],
            "exported files are ONNX and end in .onnx",
        ),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "x.onnx")], "none"),
    ):
        assert main(["export", *args]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x07nothing")
    assert main(["predict", str(tmp_path / "damaged.onnx"), str(picture(tmp_path / "p.png"))]) == 1
    err = capsys.readouterr().err
    assert "damaged.onnx: cannot be read as an exported network" in err and err.count("\n") == 1
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])],
        "other",
        [onnx.helper.make_tensor_value_info("a", 1, [1])],
        [onnx.helper.make_tensor_value_info("b", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=9), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="does not say what it is"):
        load_predictor(tmp_path / "other.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"damaged.onnx", "other.onnx", "p.png"}
