"""Tests for segmentation data: class map parsing, validation errors, scales and crops."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from crossformer_vision import UserError
from crossformer_vision.data.class_lists import value_table
from crossformer_vision.data.readers.class_maps import ClassMapImages
from crossformer_vision.data.segmentation import SegmentationData

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)  # image color of each class


def maps(root, split="training", images=4, size=(60, 48), seed=0, classes=True):
    """Write images with squares in the color of their class and class maps with an ignored corner."""
    rng = np.random.default_rng((seed, len(split)))
    for kind in ("images", "annotations"):
        (root / kind / split / "city").mkdir(parents=True, exist_ok=True)
    for n in range(images):
        w, h = size[0] + 4 * n, size[1]
        drawn = (
            rng.integers(0, 3, (h // 12 + 1, w // 12 + 1))
            .repeat(12, 0)
            .repeat(12, 1)[:h, :w]
            .astype(np.uint8)
        )
        Image.fromarray(COLOURS[drawn]).save(root / "images" / split / "city" / f"{n}.png")
        drawn[:5, :5] = 255
        Image.fromarray(drawn).save(root / "annotations" / split / "city" / f"{n}.png")
    if classes:
        (root / "classes.json").write_text(json.dumps({"classes": ["a", "b", "c"], "ignore_index": 255}))
    return root


def data(root, **options):
    return SegmentationData(str(root), **{"crop_size": 32, "num_workers": 0, **options})


def colours(pixels, found):
    """Compare normalized pixels, shape (3, H, W), with the color of each class."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.to_input().mean, found.to_input().std))
    return ((pixels * std + mean)[:, None] * 255 - torch.tensor(COLOURS.T)[:, :, None, None]).abs().sum(0)


@pytest.mark.parametrize("train, val", [("training", "validation"), ("train", "val")])
def test_folder_of_images_and_class_maps(train, val, tmp_path):
    maps(tmp_path, train)
    maps(tmp_path, val, images=3)
    found = data(tmp_path)
    assert found.num_classes == 3 and found.classes == ["a", "b", "c"]
    (pixels,), labels = found.images["val"][1]
    assert pixels.shape == (3, 48, 64) and labels.shape == (48, 64) and labels.dtype == torch.int64
    assert (labels[:5, :5] == 255).all() and (labels[5:] < 3).all()
    assert (colours(pixels, found).argmin(0) == labels)[5:].all()
    halved = data(tmp_path, short_side=24)
    assert halved.num_classes
    (pixels,), labels = halved.images["val"][1]  # the class map is not resized
    assert pixels.shape == (3, 24, 32) and labels.shape == (48, 64)
    assert [len(x) for x, _ in found.val_dataloader()] == [1, 1, 1]


def test_validation_sizes_and_scales(tmp_path):
    """Matches the published evaluation: scales from the original image, sides rounded to multiples."""
    for split in ("training", "validation"):
        maps(tmp_path, split)
    found = data(tmp_path, short_side=40, long_side=45, size_divisor=16, test_scales=(0.5, 1.0, 2.0))
    assert found.num_classes
    views, labels = found.images["val"][1]  # 64x48, resized to 45x34
    assert [tuple(view.shape[1:]) for view in views] == [(32, 32), (48, 48), (80, 96)]
    assert labels.shape == (48, 64)
    image, _ = found.images["val"].source.read(1)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    for view in views:  # no antialiasing
        expected = torch.nn.functional.interpolate(pixels, view.shape[1:], mode="bilinear")
        shown = view * torch.tensor(found.to_input().std)[:, None, None]
        shown = (shown + torch.tensor(found.to_input().mean)[:, None, None]) * 255
        assert (shown - expected[0]).abs().max() < 1


def black_and_white(root, ignore=None, values=(0, 255)):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        drawn = np.full((40, 50), values[0], np.uint8)
        drawn[10:20, 10:30] = values[1]
        Image.fromarray(COLOURS[drawn % 2]).save(root / "images" / split / "x.png")
        Image.fromarray(drawn).save(root / "annotations" / split / "x.png")
    listed = {"classes": ["ground", "thing"]} | ({} if ignore is None else {"ignore_index": ignore})
    (root / "classes.json").write_text(json.dumps(listed))
    found = data(root)
    assert found.num_classes == 2
    return found


def test_black_and_white_class_maps(tmp_path, caplog):
    """Maps with only 0 and 255 have two classes and log a notice, unless 255 is the ignore index."""
    found = black_and_white(tmp_path / "a")
    for split in ("train", "val"):
        assert np.unique(found.images[split].source.read(0)[1]).tolist() == [0, 1]
    assert "only the values 0 and 255, so 255 is class 'thing'" in caplog.text
    found = black_and_white(tmp_path / "b", ignore=255)
    assert np.unique(found.images["train"].source.read(0)[1]).tolist() == [0, 255]
    found = black_and_white(tmp_path / "c", values=(1, 255))
    assert np.unique(found.images["train"].source.read(0)[1]).tolist() == [1, 255]


def test_sparse_black_and_white_class_maps(tmp_path):
    """The first class maps contain only background."""
    black_and_white(tmp_path)
    for n in range(60):
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/training/0{n:02d}.png")
        Image.new("L", (8, 8), 255 if n == 40 else 0).save(tmp_path / f"annotations/training/0{n:02d}.png")
    data = SegmentationData(str(tmp_path), crop_size=32)
    assert np.unique(data.open("train").source.read(40)[1]).tolist() == [1]


def test_two_images_with_one_class_map(tmp_path):
    black_and_white(tmp_path)
    Image.new("RGB", (50, 40)).save(tmp_path / "images/training/x.jpg")
    with pytest.raises(
        UserError, match=r"x.png: has the name of x.jpg, but a class map belongs to one image"
    ):
        assert data(tmp_path).num_classes


def test_crops_are_aligned_with_class_maps(tmp_path):
    maps(tmp_path, images=6)
    maps(tmp_path, "validation")
    found = data(tmp_path, batch_size=3, scales=(0.5, 2.0), photometric=False, crop_size=40)
    padded = flipped = 0
    for epoch in range(3):
        loader = found.train_dataloader()
        loader.batches.set_epoch(epoch)
        for pixels, labels in loader:
            assert pixels.shape == (3, 3, 40, 40) and labels.shape == (3, 40, 40)
            for image, label in zip(pixels, labels, strict=True):
                distance = colours(image, found)
                sure = (distance.min(0).values < 30) & (label != 255)  # not interpolated at an edge
                assert sure.float().mean() > 0.3
                assert (distance.argmin(0) == label)[sure].float().mean() > 0.99
                bottom = (label[-1] == 255).all()
                padded += int(bottom)
                assert not bottom or (image[:, -1] == 0).all()  # padding is the normalized mean
                flipped += int((label[:2, -2:] == 255).all() and not bottom)
    assert padded and flipped  # the left corner moves to the right


def test_max_share_limits_dominant_class_in_crop(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        drawn = np.zeros((64, 64), np.uint8)
        drawn[:, 60:] = 1
        Image.fromarray(COLOURS[drawn]).save(tmp_path / "images" / split / "x.png")
        Image.fromarray(drawn).save(tmp_path / "annotations" / split / "x.png")
    (tmp_path / "classes.json").write_text('["a", "b"]')

    def both(max_share):
        found = data(tmp_path, crop_size=16, scales=(1.0, 1.0), max_share=max_share)
        assert found.num_classes == 2
        torch.manual_seed(0)
        crops = [found.images["train"][0][1] for _ in range(40)]
        return sum(len(crop.unique()) > 1 for crop in crops)

    assert both(0.99) > 2 * both(1.0)


def test_ade20k_layout_and_class_names(tmp_path):
    for split in ("training", "validation"):
        maps(tmp_path, split, classes=False)
    names = [f"{n}\t0.1\t1\t1\t0\tclass {n}, other name" for n in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names]))
    found = data(tmp_path)
    assert found.num_classes == 150 and found.classes[0] == "class 1"
    plain = np.asarray(Image.open(tmp_path / "annotations/validation/city/0.png"))
    _, labels = found.images["val"][0]
    assert (labels[torch.from_numpy(plain == 0)] == 255).all()  # class 'other' is ignored
    assert (labels[torch.from_numpy(plain == 2)] == 1).all()


def test_cityscapes_layout(tmp_path):
    for split in ("train", "val"):
        for kind, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            folder = tmp_path / kind / split / "bonn"
            folder.mkdir(parents=True)
            drawn = np.full((20, 30), 7, np.uint8)  # road
            drawn[:, 10:] = 26  # car
            drawn[:, 20:] = 4  # static: ignored in evaluation
            Image.fromarray(drawn if kind == "gtFine" else COLOURS[drawn % 3]).save(
                folder / f"bonn_000000_000019_{name}.png"
            )
        for extra in ("instanceIds", "color"):
            Image.fromarray(np.zeros((20, 30), np.uint8)).save(
                tmp_path / "gtFine" / split / "bonn" / f"bonn_000000_000019_gtFine_{extra}.png"
            )
        (tmp_path / "gtFine" / split / "bonn" / "bonn_000000_000019_gtFine_polygons.json").write_text("{}")
    found = data(tmp_path)
    assert found.num_classes == 19 and found.classes[0] == "road" and found.classes[13] == "car"
    assert found.images["val"][0][1][0].unique().tolist() == [0, 13, 255]
    with pytest.raises(UserError, match="Unknown value 'nowhere' for argument split"):
        assert data(tmp_path, val_split="nowhere").num_classes


def test_voc_layout(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    Image.fromarray(COLOURS[np.zeros((20, 30), int)]).save(base / "JPEGImages/x.jpg")
    drawn = Image.fromarray(np.full((20, 30), 20, np.uint8)).convert("P")
    drawn.putpalette(list(range(256)) * 3)
    drawn.save(base / "SegmentationClass/x.png")
    for split in ("train", "val"):
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("x\n")
    found = data(tmp_path)
    assert found.num_classes == 21 and found.classes[20] == "tvmonitor"
    assert (found.images["val"][0][1] == 20).all()


def test_digits_are_deterministic():
    first, second = (
        next(iter(SegmentationData(None, crop_size=64, num_workers=0).train_dataloader())) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[1].max() <= 255 and SegmentationData(None).num_classes == 11


@pytest.mark.parametrize(
    "kind, draw",
    [("gray", lambda im: im.convert("L")), ("rgba", lambda im: im.convert("RGBA"))],
)
def test_non_rgb_images(kind, draw, tmp_path):
    maps(tmp_path)
    maps(tmp_path, "validation")
    file = tmp_path / "images/validation/city/0.png"
    draw(Image.open(file)).save(file)
    found = data(tmp_path)
    assert found.num_classes and found.images["val"][0][0][0].shape == (3, 48, 60)


def redraw(change):
    def edit(root):
        file = root / "annotations/validation/city/1.png"
        Image.fromarray(change(np.asarray(Image.open(file)).copy())).save(file)

    return edit


def value(number):
    def change(drawn):
        drawn[20, 20] = number
        return drawn

    return redraw(change)


BROKEN = {
    "no map": (
        lambda root: (root / "annotations/validation/city/1.png").unlink(),
        r"images/validation/city/1\.png: has no class map in .*annotations/validation$",
    ),
    "no images for maps": (
        lambda root: [(root / f"images/validation/city/{n}.png").unlink() for n in (1, 2)],
        r"annotations/validation/city/1\.png: has no image in .*images/validation, nor do 1 others",
    ),
    "no folder of maps": (
        lambda root: (root / "annotations/validation").rename(root / "elsewhere"),
        r"annotations/validation: no such folder, for the class maps",
    ),
    "no folder": (lambda root: (root / "images/validation").rename(root / "x"), r"Name the split with --data\.val_split"),
    "no classes": (lambda root: (root / "classes.json").unlink(), r"classes\.json: no such file; it lists the classes"),
    "classes no json": (lambda root: (root / "classes.json").write_text("a b"), r"classes\.json: not a list of classes"),
    "one class": (lambda root: (root / "classes.json").write_text('["a"]'), r"classes\.json: lists 1 class"),
    "other size": (redraw(lambda x: x[:-3]), r"1\.png: has 64x45 pixels, its image .*1\.png 64x48"),
    "value": (value(3), r"annotations/validation/city/1\.png: has the value 3, which is none of the 3 classes"),
    "large value": (redraw(lambda x: x.astype(np.uint16) + 300), r"1\.png: has the value \d{3}, which is none of"),
    "rgb": (redraw(lambda x: COLOURS[x % 3]), r"1\.png: a class map has one class index per pixel .* not RGB"),
    "rubbish map": (
        lambda root: (root / "annotations/validation/city/1.png").write_bytes(b"rubbish"),
        r"annotations/validation/city/1\.png: cannot read this class map",
    ),
    "rubbish image": (
        lambda root: (root / "images/validation/city/1.png").write_bytes(b"rubbish"),
        r"images/validation/city/1\.png: cannot read this image .* --data\.skip_corrupt true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_data_is_named_in_error(name, tmp_path):
    maps(tmp_path)
    maps(tmp_path, "validation")
    edit, message = BROKEN[name]
    edit(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        found = data(tmp_path)
        assert found.num_classes
        for sample in range(4):
            found.images["val"][sample]
    assert "\n" not in str(error.value)


def test_missing_root():
    with pytest.raises(
        UserError, match=r"nowhere: no such folder. --data.root needs images/ and annotations/"
    ):
        assert data("nowhere").num_classes


def test_class_maps_with_unknown_values(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "x.png")
    for values in ([[0, 1, 0.5, 1]], [[0, 1, np.nan, 1]], [[0, 1, -1, 1]]):
        Image.fromarray(np.array(values * 2, np.float32)).save(tmp_path / "map.tif")
        with pytest.raises(UserError, match=r"map.tif: has the value"):
            ClassMapImages([(tmp_path / "x.png", tmp_path / "map.tif")], ["a", "b"], value_table(2)).read(0)
    Image.fromarray(np.array([[0, 1, 1, 0]] * 2, np.float32)).save(tmp_path / "map.tif")
    read = ClassMapImages([(tmp_path / "x.png", tmp_path / "map.tif")], ["a", "b"], value_table(2)).read(0)[1]
    assert read.tolist() == [[0, 1, 1, 0]] * 2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_low_bit_grayscale_class_maps(tmp_path, bits):
    """PIL rescales the values to 0 to 255."""
    values = np.arange(4, dtype=np.uint8)[None].repeat(2, 0) % 2**bits
    rows = [0] + np.packbits(np.unpackbits(values[0][:, None], axis=1)[:, 8 - bits :].ravel()).tolist()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(rows * 2)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "map.png").write_bytes(png)
    Image.new("RGB", (4, 2)).save(tmp_path / "x.png")
    source = ClassMapImages([(tmp_path / "x.png", tmp_path / "map.png")], list("abcd"), value_table(4))
    assert source.read(0)[1].tolist() == values.tolist()
