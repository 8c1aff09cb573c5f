"""Tests for exported models: dynamic sizes, both LDA spans and file metadata."""

import importlib.util
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import (
    CLASSES,
    classifier_checkpoint,
    detector_checkpoint,
    segmenter_checkpoint,
    write_image,
)

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.export import export
from crossformer_vision.export.detectors import MaskRCNNGraph, suppress_overlaps
from crossformer_vision.export.graphs import Features
from crossformer_vision.export.int8 import record_inputs
from crossformer_vision.export.verification import difference, different_objects
from crossformer_vision.inference.exported import METADATA_KEY

SMALL = {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4)}
TWO_STAGES = {
    "depths": (1, 2),
    "embed_dim": 16,
    "num_heads": (1, 2),
    "group_size": (4, 4),
    "interval": (4, 2),
    "merge_sizes": [[2, 4]],
}


@pytest.mark.slow
@pytest.mark.parametrize("span", ["region", "map"])
def test_onnx_classifier_with_dynamic_size(span, tmp_path):
    file = tmp_path / "deep" / "nano.onnx"
    content = classifier_checkpoint("crossformer_nano", lda_span=span, **TWO_STAGES)
    report = export(content, file)
    assert report.size is None and max(report.differences.values()) < 1e-5
    assert [p.name for p in file.parent.iterdir()] == ["nano.onnx"]
    onnx.checker.check_model(onnx.load(file))
    session = onnxruntime.InferenceSession(str(file))
    (given,) = session.get_inputs()
    assert given.name == "images" and given.shape[1] == 3
    assert all(isinstance(given.shape[n], str) for n in (0, 2, 3))
    net = load_predictor(content).net
    # Feature maps smaller than a group in one, both or no dimension; sizes not divisible by 32.
    for shape in ((1, 3, 32, 32), (2, 3, 33, 500), (1, 3, 800, 61), (1, 3, 480, 515), (5, 3, 129, 128)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = net(x)
        (got,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-4, rtol=1e-3)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert metadata["classes"] == CLASSES and metadata["image"]["mean"] == list(content["image"]["mean"])
    photo = write_image(tmp_path / "photo.png")
    theirs, ours = load_predictor(file)(photo), load_predictor(content)(photo)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    with pytest.raises(UserError, match="exported file already"):
        export(file, tmp_path / "again.onnx")
    assert main(["predict", str(file), str(photo), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.slow
def test_segmenter(tmp_path):
    content = segmenter_checkpoint("crossformer_nano", **{**SMALL, "depths": (1, 1, 1, 1)})
    file = tmp_path / "maps.onnx"
    report = export(content, file)
    assert report.size is None and max(report.differences.values()) < 1e-5
    photo = write_image(tmp_path / "photo.png")
    theirs, ours = load_predictor(file)(photo), load_predictor(content)(photo)
    assert theirs.class_map.shape == (97, 150) and (theirs.class_map == ours.class_map).all()


def same_objects(theirs, ours) -> None:
    assert len(ours.boxes) > 3
    np.testing.assert_allclose(theirs.boxes, ours.boxes, atol=0.5)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-3)
    assert (theirs.labels == ours.labels).all() and theirs.to_coco()[0]["category_id"] in (3, 5, 8)
    if ours.masks is not None:
        assert (theirs.masks != ours.masks).mean() < 1e-4


@pytest.mark.parametrize("kind", [pytest.param("mask_rcnn", marks=pytest.mark.slow), "retinanet"])
def test_detector(kind, tmp_path):
    content = detector_checkpoint(kind, "test_resnet")
    file = tmp_path / "objects.onnx"
    report = export(content, file)
    assert report.size is None and report.objects > 100 and max(report.differences.values()) < 1e-3
    photo = write_image(tmp_path / "photo.png")
    same_objects(
        load_predictor(file, score_threshold=0.05)(photo),
        load_predictor(content, score_threshold=0.05)(photo),
    )
    session = onnxruntime.InferenceSession(str(file))
    named = {o.name: o.shape for o in session.get_outputs()}
    assert list(named) == ["boxes", "labels", "scores", "masks"][: 4 if kind == "mask_rcnn" else 3]
    boxes, labels, scores, *masks = session.run(None, {"images": np.zeros((2, 3, 70, 401), np.float32)})
    assert boxes.shape == (2, 100, 4) and labels.shape == scores.shape == (2, 100)
    assert not masks or masks[0].shape == (2, 100, 28, 28)
    assert boxes[..., ::2].max() <= 401 and boxes[..., 1::2].max() <= 70 and (scores >= 0).all()
    assert (scores[..., :-1] >= scores[..., 1:]).all() and ((labels > 0) == (scores > 0)).all()
    assert (
        main(["predict", str(file), str(photo), "--output", str(tmp_path / "out"), "--tile-size", "64"]) == 0
    )
    with pytest.raises(UserError, match="objects.onnx: was exported for scores of at least 0.05, not 0.01"):
        load_predictor(file, score_threshold=0.01)


@pytest.mark.slow
def test_detector_without_detections(tmp_path):
    content = detector_checkpoint("mask_rcnn", "test_resnet")
    content["state_dict"]["roi_heads.box_predictor.cls_score.bias"][0] += (
        1e4  # classifies everything as background
    )
    report = export(content, tmp_path / "nothing.onnx")
    assert report.objects == 0
    found = load_predictor(tmp_path / "nothing.onnx")(write_image(tmp_path / "photo.png"))
    assert found.boxes.shape == (0, 4) and found.masks.shape == (0, 97, 150)


def test_different_outputs_are_detected(tmp_path):
    """Covers NaN outputs and different masks."""
    net = torch.nn.Conv2d(3, 4, 3)

    def call(images):
        return (net(images).detach() * float("nan"),)

    assert difference(net, call, 3, (64, 64)) == (float("inf"), 0)
    predictor = load_predictor(detector_checkpoint("mask_rcnn", "test_resnet"), score_threshold=0.05)
    graph = MaskRCNNGraph(predictor.net)

    def other_masks(images):
        with torch.no_grad():
            boxes, labels, scores, masks = graph(images)
        return boxes, labels, scores, masks.flip(3)

    share, objects = different_objects(predictor.net, other_masks, 3, (64, 96))
    assert objects > 50 and share > 0.5


def test_nms_with_fewer_candidates_than_objects(tmp_path):
    scores = torch.tensor([[0.9, 0.8, -1.0]])
    boxes = torch.tensor([[[0.0, 0, 5, 5], [0, 0, 5, 5.1], [0, 0, 0, 0]]])
    boxes, labels, scores = suppress_overlaps(boxes, scores, torch.ones(1, 3, dtype=torch.long), 0.5, 5)
    assert scores.tolist() == [[pytest.approx(0.9), 0, 0, 0, 0]] and labels.tolist() == [[1, 0, 0, 0, 0]]
    assert boxes[0, 0].tolist() == [0, 0, 5, 5] and not boxes[0, 1:].any()


def test_features_use_training_image_size():
    """Swin windows depend on the image size; plain ViTs have no feature maps at strides 4 to 32."""
    name, small = (
        "swin_tiny_patch4_window7_224",
        dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 2, 4)),
    )
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, img_size=96, **small).eval()
    maps = Features(net, {"backbone": name, "model_args": small, "image_size": 96})
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = net.forward_intermediates(images, intermediates_only=True)
        for one, other in zip(maps(images), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    vit = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(UserError, match="a classifier of 'test_vit' has no maps at strides 4 to 32"):
        Features(vit, {"backbone": "test_vit", "model_args": None, "image_size": 160})


def test_features(tmp_path):
    content = classifier_checkpoint("test_resnet")
    report = export(content, tmp_path / "maps.onnx", features=True)
    assert report.size is None and report.metadata["task"] == "features"
    session = onnxruntime.InferenceSession(str(tmp_path / "maps.onnx"))
    maps = session.run(["stride_4", "stride_32"], {"images": np.zeros((2, 3, 97, 130), np.float32)})
    assert maps[0].shape[2:] == (25, 33) and maps[1].shape[2:] == (4, 5)
    with pytest.raises(UserError, match="maps.onnx: contains only a backbone"):
        load_predictor(tmp_path / "maps.onnx")


def test_openvino(tmp_path):
    pytest.importorskip("openvino")
    content = segmenter_checkpoint("test_resnet", "upernet")
    file = tmp_path / "deep" / "maps.xml"
    report = export(content, file)
    assert report.size is None and max(report.differences.values()) < 1e-5
    assert {p.name for p in file.parent.iterdir()} == {"maps.xml", "maps.bin"}
    photo = write_image(tmp_path / "photo.png")
    theirs, ours = load_predictor(file)(photo), load_predictor(content)(photo)
    assert (theirs.class_map == ours.class_map).mean() > 0.999 and theirs.classes == CLASSES
    (file.parent / "maps.bin").unlink()
    with pytest.raises(UserError, match="maps.xml: cannot be read as an exported network"):
        load_predictor(file)


def some_pictures(folder):
    folder.mkdir()
    for n in range(4):
        write_image(folder / f"{n}.png")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classifier", "segmenter"])
def test_int8(task, tmp_path, capsys):
    pytest.importorskip("nncf")
    content = (
        classifier_checkpoint("test_resnet")
        if task == "classifier"
        else segmenter_checkpoint("crossformer_nano", **SMALL)
    )
    folder = some_pictures(tmp_path / "photos")
    plain = export(content, tmp_path / "plain.xml")
    report = export(content, tmp_path / "small.xml", int8=folder)
    found = report.int8
    assert not plain.int8 and found["images"] >= 4 and found["agreement"] > 0.9
    assert 0.5 * found["all_layers"] < found["layers"] <= found["all_layers"]
    sizes = [(tmp_path / name).stat().st_size for name in ("plain.bin", "small.bin")]
    assert sizes[1] < 0.5 * sizes[0]
    photo = write_image(tmp_path / "photo.png")
    for file in ("plain.xml", "small.xml"):
        assert load_predictor(tmp_path / file)(photo).classes == CLASSES
    rows = [str(tmp_path / "plain.xml"), str(tmp_path / "small.xml")]
    options = "--size 96 --batch 2 --rounds 3 --device cpu --output".split()
    assert main(["benchmark", *rows, *options, str(tmp_path / "benchmark")]) == 0
    timed = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())["rows"]
    assert all(row["images_per_second"] > 0 for row in timed)
    assert main(["benchmark", rows[0], "--step", "training", *options, str(tmp_path / "benchmark")]) == 1
    assert "infers as it is" in capsys.readouterr().err


@pytest.mark.slow
def test_int8_runs_at_sizes_not_used_for_quantization(tmp_path):
    """Uses a trained model with a depthwise convolution (ACL), at sizes with one and several groups."""
    pytest.importorskip("nncf")
    predictor = load_predictor("crossformer_nano.cifar10", "cpu")
    folder = some_pictures(tmp_path / "photos")
    export(predictor, tmp_path / "small.xml", int8=folder)
    quantized = load_predictor(tmp_path / "small.xml").net
    (images, *_) = record_inputs(predictor, folder)  # calibration inputs
    for size in ((64, 64), (97, 130), (128, 128), (225, 301)):
        resized = F.interpolate(images, size=size, mode="bilinear", antialias=True).repeat(2, 1, 1, 1)
        with torch.no_grad():
            similarity = F.cosine_similarity(quantized(resized), predictor.net(resized))
        # 0.9995 at the calibration size and 0.79 at 97x130: ranges from 64x64 noise are less accurate at other sizes.
        assert similarity.min() > (0.99 if size == (64, 64) else 0.5), size


@pytest.mark.skipif(not importlib.util.find_spec("nncf"), reason="nncf is not installed")
def test_int8_rejects_unsupported_options(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = some_pictures(tmp_path / "photos")
    for args, said in (
        (["--int8", folder, "--output", str(tmp_path / "x.onnx")], "8-bit files are OpenVINO's"),
        (["--int8", folder, "--features", "--output", str(tmp_path / "x.xml")], "classifiers and segmenters"),
        (["--int8", str(tmp_path / "empty"), "--output", str(tmp_path / "x.xml")], "empty: no image"),
    ):
        assert main(["export", "crossformer_nano.cifar10", *args]) == 1
        assert said in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "photos"}


def test_torch_export(tmp_path):
    content = classifier_checkpoint("test_resnet")
    report = export(content, tmp_path / "graph.pt2")
    assert report.size is None
    about = {"crossformer_vision": ""}
    program = torch.export.load(tmp_path / "graph.pt2", extra_files=about).module(check_guards=False)
    assert json.loads(about["crossformer_vision"])["classes"] == CLASSES
    images = torch.randn(5, 3, 33, 500)
    torch.testing.assert_close(program(images), load_predictor(content).net(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
@pytest.mark.parametrize("span", ["region", "map"])
@pytest.mark.parametrize("head", ["classifier", "features", "upernet", "retinanet", "mask_rcnn"])
def test_all_tasks_and_formats(head, span, suffix, tmp_path):
    keywords = {**SMALL, "lda_span": span}
    if head in ("classifier", "features"):
        content = classifier_checkpoint("crossformer_nano", **keywords)
    elif head == "upernet":
        content = segmenter_checkpoint("crossformer_nano", head, **keywords)
    else:
        content = detector_checkpoint(head, "crossformer_nano", **keywords)
    report = export(content, tmp_path / f"graph{suffix}", features=head == "features")
    assert report.size is None and max(report.differences.values()) < 1e-3
    assert report.objects > 100 or head not in ("retinanet", "mask_rcnn")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classifier", "segmenter"])
@pytest.mark.parametrize("model", ["crossformer_tiny", "crossformer_pp_small", "resnet18"])
def test_other_backbones(model, head, tmp_path):
    content = (classifier_checkpoint if head == "classifier" else segmenter_checkpoint)(model)
    report = export(content, tmp_path / "graph.onnx")
    assert report.size is None and max(report.differences.values()) < 1e-3


def test_fixed_size_network(tmp_path):
    file = tmp_path / "vit.onnx"
    report = export(classifier_checkpoint("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=1), file)
    assert report.size == (224, 224) and list(report.differences) == ["224x224"]
    photo = write_image(tmp_path / "photo.png")
    assert load_predictor(file)(photo).probabilities.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_fixed_size_segmenter_predicts_in_windows(tmp_path):
    """A graph for one size is used in windows of this size, with small images padded."""
    content = segmenter_checkpoint("maxvit_pico_rw_256", img_size=96)
    content["image"]["short_side"], content["hyper_parameters"]["window"] = None, 96
    file = tmp_path / "maxvit.onnx"
    assert export(content, file).size == (96, 96)
    photo, exported = Image.open(write_image(tmp_path / "photo.png")), load_predictor(file)
    for size in ((96, 96), (150, 220), (70, 90)):
        expected = load_predictor(content)(photo.resize(size)).class_map
        assert np.mean(expected == exported(photo.resize(size)).class_map) > 0.99


def test_invalid_arguments_and_files_are_rejected(tmp_path, capsys):
    for args, said in (
        (
            ["crossformer_nano.cifar10", "--output", str(tmp_path / "x.tflite")],
            "exported files end in .onnx, .xml, .pt2",
        ),
        ([str(tmp_path / "none"), "--output", str(tmp_path / "x.onnx")], "none"),
        (
            ["crossformer_nano.cifar10", "--format", "openvino", "--output", str(tmp_path / "x.onnx")],
            "a file of format openvino ends in .xml",
        ),
    ):
        assert main(["export", *args]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x07nothing")
    assert main(["predict", str(tmp_path / "damaged.onnx"), str(write_image(tmp_path / "p.png"))]) == 1
    err = capsys.readouterr().err
    assert "damaged.onnx: cannot be read as an exported network" in err and err.count("\n") == 1
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])],
        "other",
        [onnx.helper.make_tensor_value_info("a", 1, [1])],
        [onnx.helper.make_tensor_value_info("b", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=9), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="has no metadata of crossformer export"):
        load_predictor(tmp_path / "other.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"damaged.onnx", "other.onnx", "p.png"}
