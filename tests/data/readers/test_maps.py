"""Tests for class maps in colors, and class maps rendered from objects."""

import json

import numpy as np
import pytest
from label_formats import NAMES, write_coco, write_yolo
from PIL import Image
from small_runs import SEGMENTATION

from crossformer_vision import SegmentationData, UserError, load_predictor
from crossformer_vision.cli import main

COLORS = [[128, 64, 0], [0, 0, 200], [10, 20, 30]]


def write_maps(root, mode, classes=("sky", "road", "void"), ignore_index=2, **more):
    """Write two images with class maps in colors, as RGB or palette files with other indices."""
    rng = np.random.default_rng(0)
    indices = {}
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        indices[split] = rng.integers(0, 3, (40, 50))
        rgb = Image.fromarray(np.array(COLORS, np.uint8)[indices[split]])
        rgb.save(root / f"images/{split}/0.png")
        class_map = rgb if mode == "RGB" else rgb.quantize(8, dither=Image.Dither.NONE)
        class_map.save(root / f"annotations/{split}/0.png")
    content = {"classes": list(classes), "colors": COLORS, "ignore_index": ignore_index, **more}
    (root / "classes.json").write_text(json.dumps(content))
    return indices


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_class_maps_in_colors(mode, tmp_path):
    indices = write_maps(tmp_path, mode)
    data = SegmentationData(str(tmp_path), num_workers=0)
    assert data.num_classes == 2 and data.classes == ["sky", "road"]
    expected = np.where(indices["validation"] == 2, 255, indices["validation"])
    np.testing.assert_array_equal(data.open("val")[0][1], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colors": COLORS[:2]}, "colors must list one .* for each of the 3 classes"),
        ({"colors": [*COLORS[:2], COLORS[0]]}, "two classes have the same color"),
        ({"colors": [*COLORS[:2], [0, 0, 256]]}, r"the color \[0, 0, 256\] is not \[r, g, b\]"),
        ({"colors": [*COLORS[:2], [9, 9, 9]]}, r"0.png: has the color \(10, 20, 30\) at x \d+, y \d+"),
    ],
)
def test_invalid_colors(change, message, tmp_path):
    write_maps(tmp_path, "RGB", **change)
    with pytest.raises(UserError, match=message):
        SegmentationData(str(tmp_path)).open("train").source.read(0)


def test_colors_are_needed_for_rgb_maps(tmp_path):
    write_maps(tmp_path, "RGB")
    (tmp_path / "classes.json").write_text('["sky", "road", "void"]')
    with pytest.raises(UserError, match=r"not RGB\. For classes in colors, list colors in classes\.json"):
        SegmentationData(str(tmp_path)).open("train").source.read(0)


def test_rendered_objects(tmp_path):
    maps = {}
    for name, write, options in (("coco", write_coco, {}), ("yolo", write_yolo, {"polygons": True})):
        (tmp_path / name).mkdir()
        write(tmp_path / name, **options)
        data = SegmentationData(str(tmp_path / name), num_workers=0)
        assert data.num_classes == 11 and data.classes == ["background", *NAMES]
        maps[name] = [np.asarray(data.open("val")[n][1]) for n in range(len(data.open("val")))]
    np.testing.assert_array_equal(maps["coco"], maps["yolo"])
    source = SegmentationData(str(tmp_path / "coco")).open("val").source
    for n, class_map in enumerate(maps["coco"]):
        objects = source.objects.read(n)[1]
        smallest = int(objects["masks"].sum((1, 2)).argmin())
        assert (class_map[objects["masks"][smallest] > 0] == objects["labels"][smallest]).all()
        assert ((class_map == 0) == ~objects["masks"].any(0)).all()


def test_crowds_are_ignored_and_classes_reordered(tmp_path):
    (tmp_path / "coco").mkdir()
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    classes = [*reversed(NAMES), "background"]
    data = SegmentationData(str(tmp_path / "coco"), classes=classes, num_workers=0)
    assert set(np.unique(data.open("val")[0][1])) == {10, 255}


def test_run_on_objects(tmp_path, capsys):
    (tmp_path / "yolo").mkdir()
    write_yolo(tmp_path / "yolo", polygons=True)
    run = tmp_path / "run"
    options = [*SEGMENTATION, "--trainer.max_epochs", "1", "--run.dir", str(run)]
    assert main(["train", *options, "--data.root", str(tmp_path / "yolo")]) == 0
    assert "of 11 classes (YOLO labels)" in capsys.readouterr().out
    result = load_predictor(run)(tmp_path / "yolo/images/val/000.png")
    assert result.class_map.shape == (64, 64) and result.to_png().mode == "P"


def test_too_many_categories(tmp_path):
    (tmp_path / "coco").mkdir()
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["categories"] += [{"id": k, "name": f"class {k}"} for k in range(100, 344)]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 254 categories, but class maps at most 253"):
        SegmentationData(str(tmp_path / "coco")).open("train")


def test_classes_of_the_run_must_match(tmp_path):
    write_maps(tmp_path, "RGB")
    for classes, message in (
        (["sky", "road", "car"], "lacks class 'car'"),
        (["sky"], "class 'road' is not among"),
    ):
        with pytest.raises(UserError, match=message):
            SegmentationData(str(tmp_path), classes=classes).open("train")


def test_box_rows_have_no_mask(tmp_path):
    (tmp_path / "yolo").mkdir()
    write_yolo(tmp_path / "yolo")
    with pytest.raises(UserError, match="000.txt: row 1 is a box"):
        SegmentationData(str(tmp_path / "yolo")).open("train")
