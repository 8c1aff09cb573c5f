"""Plots: arbitrary class names, label placement, legend colors and bounded image sizes."""

from itertools import combinations

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import Image

from crossformer_vision.plotting import drawing, fonts, visualize

NAMES = ["猫", "_hidden", "a $ and $ b", "ünïcode", "x" * 80]


@pytest.fixture
def cjk(tmp_path):
    """Install a system font with one Chinese glyph, drawn as a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for place in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(place)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": empty, "cat": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "One Cat", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "cat.ttf"
    builder.save(path)
    known = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(str(path))
    fonts._find.cache_clear()
    yield path
    font_manager.fontManager.ttflist = known
    fonts._find.cache_clear()


def test_system_font_with_required_glyphs(cjk, tmp_path, caplog, recwarn):
    assert fonts.load_font(["猫"], 20).getname()[0] == "One Cat"
    assert fonts.load_font(["cat"], 20).getname()[0] != "One Cat"
    matrix = np.eye(2, dtype=np.int64)
    visualize.plot_confusion_matrix(matrix, ["猫", "dog"], tmp_path / "x.png")
    assert not caplog.text and not [w for w in recwarn if "Glyph" in str(w.message)]
    drawn = np.asarray(drawing.add_caption(Image.new("RGB", (400, 300), "white"), ["猫"]))[:20, :40]
    assert (drawn < 100).all(2).sum() > 60  # a filled square, not the missing-glyph box


def test_missing_glyphs_are_reported_once(caplog):
    fonts._find.cache_clear()
    for _ in range(2):
        fonts.load_font(["\U000f0000"], 20)
    assert caplog.text.count("no installed font has all of") == 1


def test_names_are_shortened_in_the_middle():
    assert fonts.shorten("abcdefghij", 10) == "abcdefghij"
    short = fonts.shorten("golden retriever, left side", 15)
    assert len(short) == 15 and short.startswith("golden re") and short.endswith("side")
    letters = fonts.load_font(["x"], 20)
    for width in (40, 60, 200):
        text = fonts.fit_text("x" * 80, letters, width)
        assert letters.getlength(text) <= width and text


def test_all_plots_accept_any_class_name(tmp_path, recwarn):
    n = len(NAMES)
    visualize.plot_confusion_matrix(np.eye(n, dtype=np.int64), NAMES, tmp_path / "a.png")
    image = np.zeros((30, 40, 3), np.float32)
    visualize.plot_predictions([(image, a, b, 0.5) for a, b in zip(NAMES, NAMES[::-1])], tmp_path / "b.png")
    curve = {name: np.linspace(1, 0, 11) for name in NAMES}
    visualize.plot_precision_recall({"box": curve, "mask": curve}, tmp_path / "c.png")
    maps = np.arange(1200).reshape(30, 40) % n
    visualize.plot_segmentations([(image, maps, maps)], NAMES, tmp_path / "d.png")
    visualize.plot_class_bars(NAMES, np.linspace(0, 1, n), "IoU", tmp_path / "e.png")
    objects = {"boxes": np.array([[2, 2, 30, 20]] * n, float), "labels": np.arange(n) + 1}
    visualize.plot_detections(
        [(image, objects, {**objects, "scores": np.ones(n)})], NAMES, tmp_path / "f.png"
    )
    assert len(list(tmp_path.glob("*.png"))) == 6
    said = [str(w.message) for w in recwarn if "findfont" in str(w.message) or "underscore" in str(w.message)]
    assert not said


def test_labels_stay_inside_image():
    image = Image.new("RGB", (300, 200), (90, 90, 90))
    for box in ([280, 5, 299, 60], [290, 190, 299, 199], [0, 0, 5, 5]):
        objects = {"boxes": np.array([box], float), "labels": np.array([1]), "scores": np.array([0.9])}
        for name in ("cell", "a very long name " * 10):
            drawn = drawing.draw_objects(image, objects, [name, "other"])
            text = np.asarray(drawn).reshape(-1, 3)
            assert (text < 60).all(1).sum() > 20  # the text is drawn
    letters = fonts.load_font(["x"], 11)
    label = "cell .90"
    drawn = np.asarray(
        drawing.draw_objects(image, {**objects, "boxes": np.array([[250.0, 50, 299, 90]])}, ["cell", "x"])
    )
    assert (drawn[:, -3:] < 60).all(2).sum() == 0 and letters.getlength(label) < 300  # not cropped at border


@pytest.mark.parametrize("channels", [1, 2, 3, 9])
def test_any_number_of_channels_is_shown(channels):
    image = np.random.default_rng(0).normal(size=(channels, 8, 9)).astype(np.float32)
    shown = drawing.stretch(image, (2, 1, 0) if channels == 9 else None)
    assert shown.shape == (8, 9, 3) and shown.min() >= 0 and shown.max() <= 1
    red = 2 if channels == 9 else 0
    assert np.corrcoef(shown[..., 0].ravel(), image[red].ravel())[0, 1] > 0.8


def test_boxes_do_not_cross_labels():
    """The second box intersects the first label, which must stay fully visible."""
    objects = {
        "boxes": np.array([[10, 60, 90, 90], [20, 30, 150, 140]], np.float32),
        "labels": np.array([1, 2]),
    }
    alone = {name: values[:1] for name, values in objects.items()}
    image = Image.new("RGB", (200, 150))
    both, first = (np.asarray(drawing.draw_objects(image, o, ["first", "second"])) for o in (objects, alone))
    label = (first != 0).any(-1)
    label[58:] = False  # exclude the box below the label
    assert label.sum() > 50 and label[:, 20].any()  # column of the left edge of the second box
    assert (both[label] == first[label]).all()
    assert (both[70:80, 20] == drawing.COLORS[1]).all()


def test_box_with_negative_size_is_drawn():
    """Validation plots draw ground truth boxes as stored in the file."""
    boxes = np.array([[90, 60, 10, 90], [10, 60, 90, 90]], np.float32)
    drawn = [
        np.asarray(
            drawing.draw_objects(
                Image.new("RGB", (99, 99)), {"boxes": boxes[k : k + 1], "labels": np.array([1])}, ["a"]
            )
        )
        for k in (0, 1)
    ]
    assert drawn[0].any() and (drawn[0] == drawn[1]).all()


def test_overlay_colors_match_legend():
    classes = [f"class {k}" for k in range(12)]
    grey = Image.new("RGB", (400, 300), (128, 128, 128))
    class_map = np.full((300, 400), 9, np.uint8)
    drawn = np.asarray(
        drawing.add_legend(drawing.overlay_class_map(grey, class_map), class_map, classes)
    ).astype(int)
    assert np.abs(drawn[100, 100] - drawing.legend_colors(12)[9].astype(int)).max() <= 1
    below = drawn[300:].reshape(-1, 3)
    assert (np.abs(below - drawn[100, 100]).max(1) <= 1).sum() > 50


def test_best_metric_is_marked_and_line_styles_are_unique(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **k: figures.append(self))
    names = ["val_box_ap", *(f"val_box_{k}" for k in range(12)), "val_mask_ap"]
    rows = [
        {
            "epoch": e,
            "lr": 0.1,
            "train_loss": 1.0,
            **{name: (e + 1) * (n + 1) / 100 for n, name in enumerate(names)},
        }
        for e in range(3)
    ]
    rows[1]["val_mask_ap"] = 0.9
    visualize.plot_curves(rows, tmp_path / "x.png", "val_mask_ap")
    axis = figures[0].axes[1]
    looks = [(line.get_color(), line.get_linestyle()) for line in axis.lines[:-1]]
    assert len({(tuple(np.atleast_1d(c)), s) for c, s in looks}) == len(names)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0] == "mask AP" and labels[-1] == "best mask AP: 0.9000"
    assert axis.lines[-1].get_xdata()[0] == 2


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (20, 20), (4000, 3000)])
def test_image_size_is_bounded(size):
    page = drawing.add_caption(Image.new("RGB", size), ["a name 50 %"])
    assert page.width * page.height <= 1.2 * max(size[0] * size[1], 320 * 3200) and page.width >= 320
    class_map = np.zeros(size[::-1], np.uint8)
    page = drawing.add_legend(Image.new("RGB", size), class_map, ["one", "two"])
    assert page.width * page.height <= 1.2 * max(size[0] * size[1], 320 * 3200)


@pytest.mark.slow  # matplotlib draws 4,000 bars
def test_plot_size_is_bounded_with_thousands_of_classes(tmp_path):
    visualize.plot_class_bars(
        [f"class {k}" for k in range(4000)], np.linspace(0, 1, 4000), "IoU", tmp_path / "x.png"
    )
    assert max(Image.open(tmp_path / "x.png").size) < 2**16


def test_point_labels_do_not_overlap(tmp_path):
    figure, axes = visualize.subplots(6, 4)
    axis = axes[0][0]
    points = [
        (1.0, 0.5, "one"),
        (1.0, 0.5, "its double"),
        (1.001, 0.499, "neighbour"),
        (2.0, 0.4, "at the edge " * 3),
    ]
    for x, y, _ in points:
        axis.plot(x, y, "o")
    visualize.label_points(figure, axis, points)
    visualize.save_figure(figure, tmp_path / "names.png")
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # text extent without the leader lines
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    inside = axis.bbox
    for box in boxes:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 + 1
        for x, y in axis.transData.transform([point[:2] for point in points]):
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)
