"""Tests for image decoding: EXIF orientation in all tasks, value ranges and decoder errors."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from crossformer_vision import UserError
from crossformer_vision.data.classification import ClassificationData
from crossformer_vision.data.detection import DetectionData
from crossformer_vision.data.images import apply_orientation, load_image, to_rgb
from crossformer_vision.data.segmentation import SegmentationData

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def drawn(width=60, height=40):
    """Return an image with a red object at the top left."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[5:20, 5:25] = (250, 20, 20)
    return Image.fromarray(pixels)


def save(image, path, orientation):
    """Save a rotated image with an EXIF orientation tag, as phones do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.transpose(TURNS[orientation]).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_in_all_tasks(orientation, tmp_path):
    image = drawn()

    def red(pixels):
        return pixels[5:20, 5:25, 0].mean() > 200 and pixels[25:, 30:, 0].mean() < 60

    # classification
    for split in ("train", "val"):
        for name in ("a", "b"):
            save(image, tmp_path / "classes" / split / name / "0.jpg", orientation)
    data = ClassificationData(root=str(tmp_path / "classes"), num_workers=0)
    assert data.num_classes == 2 and red(np.asarray(to_rgb(data.images["train"].source.read(0)[0])))
    # detection: boxes refer to the upright image
    content = dict(
        images=[dict(id=1, file_name="0.jpg", width=60, height=40)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 15], area=300, iscrowd=0)],
        categories=[dict(id=1, name="red")],
    )
    for split in ("train", "val"):
        save(image, tmp_path / "coco/images" / split / "0.jpg", orientation)
        (tmp_path / "coco/annotations").mkdir(exist_ok=True)
        (tmp_path / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))
    found = DetectionData(root=str(tmp_path / "coco"), num_workers=0)
    assert found.num_classes == 1
    picture, target = found.images["train"].source.read(0)
    x1, y1, x2, y2 = target["boxes"][0].astype(int)
    assert np.asarray(to_rgb(picture))[y1:y2, x1:x2, 0].mean() > 200
    # segmentation: the class map refers to the upright image
    for split in ("training", "validation"):
        save(image, tmp_path / "maps/images" / split / "0.jpg", orientation)
        label = (np.asarray(image)[..., 0] > 200).astype(np.uint8)
        (tmp_path / "maps/annotations" / split).mkdir(parents=True)
        Image.fromarray(label).save(tmp_path / "maps/annotations" / split / "0.png")
    (tmp_path / "maps/classes.json").write_text('["ground", "red"]')
    maps = SegmentationData(root=str(tmp_path / "maps"), num_workers=0)
    assert maps.num_classes == 2
    picture, label = maps.images["val"].source.read(0)
    pixels = np.asarray(to_rgb(picture))
    assert pixels[label == 1, 0].mean() > 200 and pixels[label == 0, 0].mean() < 60
    # prediction uses the same reader
    assert red(np.asarray(load_image(tmp_path / "classes/train/a/0.jpg", "x")))


def test_labels_of_the_unrotated_image(tmp_path):
    """Some tools ignore EXIF and label the stored image, which is then not rotated."""
    save(drawn(), tmp_path / "0.jpg", 6)
    image = Image.open(tmp_path / "0.jpg")
    assert image.size == (40, 60)
    assert apply_orientation(image, label_size=(40, 60)).size == (40, 60)
    assert apply_orientation(image, label_size=(60, 40)).size == (60, 40)
    assert apply_orientation(image).size == ImageOps.exif_transpose(image).size == (60, 40)
    square = drawn(40, 40)
    save(square, tmp_path / "1.jpg", 3)
    turned = np.asarray(apply_orientation(Image.open(tmp_path / "1.jpg"), label_size=(40, 40)))
    assert np.abs(turned.astype(int) - np.asarray(square)).mean() < 5


def test_pixel_value_ranges_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = np.round(ramp * 255)
    for values, mode in (
        ((ramp * 65535).astype(np.uint16), "I;16"),
        ((ramp * (2**31 - 1)).astype(np.int32), "I"),
        ((ramp * 255).round().astype(np.int32), "I"),
        (ramp.astype(np.float32), "F"),
        ((ramp * 255).astype(np.float32), "F"),
    ):
        image = Image.fromarray(values)
        assert image.mode == mode
        image.save(tmp_path / "x.tif")
        found = np.asarray(load_image(tmp_path / "x.tif", "x"))
        assert found.shape == (8, 8, 3) and np.abs(found[..., 0] - expected).max() <= 1
    spoilt = ramp.astype(np.float32)
    spoilt[0, 0] = np.nan
    assert np.asarray(to_rgb(Image.fromarray(spoilt)))[0, 0, 0] == 0


def large_text(path):
    """Write a PNG whose compressed text exceeds the Pillow limit and raises a ValueError."""
    drawn().save(path)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    content = path.read_bytes()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (2 << 20)))
    path.write_bytes(content[:33] + text + content[33:])


def cut_tiff(path):
    drawn(200, 200).save(path, format="TIFF")
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("spoil", [large_text, cut_tiff])
def test_decoder_errors_are_reported_or_skipped(spoil, tmp_path):
    name = "0.png"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                drawn().save(tmp_path / split / label / f"{i + 1}.png")
    spoil(tmp_path / "train/a" / name)
    with pytest.raises(UserError, match=f"x/{name}: cannot read this image"):
        load_image(tmp_path / "train/a" / name, f"x/{name}")
    data = ClassificationData(root=str(tmp_path), image_size=32, num_workers=0, crop="none")
    assert data.num_classes == 2
    with pytest.raises(UserError, match=f"{name}: cannot read this image .*skip_corrupt"):
        data.images["train"][0]
    data = ClassificationData(
        root=str(tmp_path), image_size=32, num_workers=0, crop="none", skip_corrupt=True
    )
    assert data.num_classes == 2
    assert data.images["train"][0][0].shape == torch.Size((3, 32, 32)) and data.skipped == 1
