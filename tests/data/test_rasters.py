"""Tests for images with any number of channels and 8-bit, 16-bit and float values."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from spectral_images import save, spectral_image, write_classification, write_detection

from crossformer_vision import ClassificationData, DetectionData, UserError
from crossformer_vision.data.images import open_upright, to_pixels
from crossformer_vision.data.rasters import PixelFormat, format_of, raster_size

RASTER = np.random.default_rng(0).integers(0, 60000, (20, 30, 5)).astype(np.uint16)


def data(root, **options):
    return ClassificationData(root=str(root), image_size=32, batch_size=4, num_workers=0, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "samples"),
        ({"planarconfig": "separate"}, "planes"),
        ({"compression": "zlib", "predictor": True}, "deflate"),
        ({"compression": "lzw"}, "lzw"),
        ({"bigtiff": True, "tile": (16, 16)}, "tiles"),
    ],
)
def test_tiff_layouts(options, name, tmp_path):
    path = tmp_path / f"{name}.tif"
    values = RASTER.transpose(2, 0, 1) if name == "planes" else RASTER
    save(path, values, **options)
    np.testing.assert_array_equal(open_upright(path), RASTER)
    assert raster_size(path) == (30, 20)
    with path.open("rb") as stream:
        np.testing.assert_array_equal(open_upright(stream), RASTER)


def test_tiff_pages_are_channels_and_overviews_are_skipped(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for channel in range(5):
            writer.write(RASTER[..., channel], contiguous=False)
    np.testing.assert_array_equal(open_upright(tmp_path / "pages.tif"), RASTER)
    with tifffile.TiffWriter(tmp_path / "overview.tif") as writer:
        writer.write(RASTER, photometric="minisblack", planarconfig="contig")
        writer.write(RASTER[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    np.testing.assert_array_equal(open_upright(tmp_path / "overview.tif"), RASTER)
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as writer:
        writer.write(RASTER[..., 0])
        writer.write(RASTER[:10, :, 0])
    with pytest.raises(ValueError, match="pages differ"):
        open_upright(tmp_path / "sizes.tif")


def test_numpy_and_png_of_16_bits(tmp_path):
    np.save(tmp_path / "a.npy", RASTER.astype(np.float32))
    opened = open_upright(tmp_path / "a.npy")
    np.testing.assert_array_equal(opened, RASTER)
    assert format_of(opened) == PixelFormat(5, "float") and raster_size(tmp_path / "a.npy") == (30, 20)
    np.save(tmp_path / "gray.npy", RASTER[..., 0])
    assert open_upright(tmp_path / "gray.npy").shape == (20, 30, 1)
    Image.fromarray(RASTER[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(open_upright(tmp_path / "gray.png"), RASTER[..., :1])
    color = io.BytesIO(imagecodecs.png_encode(np.ascontiguousarray(RASTER[..., :3])))
    np.testing.assert_array_equal(open_upright(color), RASTER[..., :3])


def test_photographs_of_8_bits_stay_photographs(tmp_path):
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        for suffix in ("png", "tif"):
            path = tmp_path / f"{mode}.{suffix}"
            Image.new(mode, (30, 20)).save(path)
            assert isinstance(open_upright(path), Image.Image) and raster_size(path) is None
    np.save(tmp_path / "rgb.npy", np.full((20, 30, 3), 7, np.uint8))
    assert to_pixels(open_upright(tmp_path / "rgb.npy"), PixelFormat(), "x").getpixel((0, 0)) == (7, 7, 7)


def test_no_pickle_is_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        open_upright(tmp_path / "a.npy")


def test_channels_and_normalization_are_measured(tmp_path):
    module = data(write_classification(tmp_path))
    assert module.in_chans == 4 and module.pixel_format == PixelFormat(4, "uint16")
    images = [spectral_image(n, 3000 * k) for k in range(2) for n in range(4)]
    pixels = np.concatenate([image.reshape(-1, 4) for image in images]) / 65535
    np.testing.assert_allclose(module.image_mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.image_std, pixels.std(0), rtol=1e-4)
    batch, _ = next(iter(module.val_dataloader()))
    assert batch.shape == (4, 4, 32, 32) and batch.dtype == torch.float32
    assert module.describe()["pixel_format"] == {"channels": 4, "dtype": "uint16"}
    chosen = data(tmp_path, mean=[0.0] * 4, std=[1.0] * 4)
    assert chosen.in_chans == 4 and chosen.image_mean == [0.0] * 4


def test_gray_photographs_with_one_channel(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (40, 40), 51).save(tmp_path / split / name / "0.png")
    assert data(tmp_path).in_chans == 3
    module = data(tmp_path, channels=1)
    assert module.in_chans == 1 and module.image_mean == pytest.approx([0.2])
    with pytest.raises(UserError, match=r"train/a/0.png: has 1 channel, not --data.channels 4"):
        _ = data(tmp_path, channels=4).in_chans


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RASTER, "has 5 channels of 16 bits, expected 4 channels of 16 bits"),
        (RASTER[..., :4].astype(np.uint8), "has 4 channels of 8 bits, expected 4 channels of 16 bits"),
        (RASTER[..., :4].astype(np.float32), "has 4 channels of another type, expected 4"),
    ],
)
def test_other_channels_or_depths_are_refused(values, message, tmp_path):
    root = write_classification(tmp_path)
    save(root / "val/water/9.tif", values)
    with pytest.raises(UserError, match=f"water/9.tif: {message}"):
        list(data(root).val_dataloader())


def test_values_that_are_not_finite_are_refused(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            np.save(tmp_path / split / name / "0.npy", np.ones((40, 40, 2), np.float32))
    np.save(tmp_path / "val/b/1.npy", np.full((40, 40, 2), np.nan, np.float32))
    with pytest.raises(UserError, match="val/b/1.npy: has values that are not finite"):
        list(data(tmp_path).val_dataloader())


def test_color_augmentation_is_for_photographs_only(tmp_path, caplog):
    root = write_classification(tmp_path)
    next(iter(data(root, auto_augment="rand-m9", color_jitter=0.4, erasing=1.0).train_dataloader()))
    assert "change colors of RGB images only" in caplog.text
    for crop in ("padded", "none"):
        batch, _ = next(iter(data(root, crop=crop).train_dataloader()))
        assert batch.shape == (4, 4, 32, 32)


def test_own_augmentation_gets_all_channels(tmp_path):
    shapes = []

    def record(image):
        shapes.append((tuple(image.shape), float(image.max())))
        return image

    next(iter(data(write_classification(tmp_path), augmentation=record).train_dataloader()))
    assert shapes[0][0] == (4, 40, 48) and shapes[0][1] < 0.1


def test_detection_crops_are_padded_with_the_mean(tmp_path):
    root = write_detection(tmp_path)
    options = {"min_size": 64, "scale_jitter": (0.3, 0.5), "num_workers": 0, "photometric": True}
    module = DetectionData(root=str(root), **options)
    images, _ = next(iter(module.train_dataloader()))
    assert images[0].shape == (4, 64, 64)
    torch.testing.assert_close(images[0][:, -1, -1], torch.tensor(module.image_mean))


@pytest.mark.parametrize("channels", [[0, 1], [0, 1, 4], [-1, 0, 1]])
def test_invalid_display_channels(channels, tmp_path):
    with pytest.raises(UserError, match="must be three channels from 0 to 3"):
        _ = data(write_classification(tmp_path), display_channels=channels).in_chans


def test_big_endian_values_are_scaled():
    assert format_of(RASTER.astype(">u2")) == PixelFormat(5, "uint16")


def test_npy_beside_an_image_is_no_image(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.jpg")
            np.save(tmp_path / split / name / "0.npy", np.zeros((40, 40, 3), np.uint8))
    assert len(data(tmp_path).open("train")) == 2


def test_chosen_normalization_of_rgb_images_is_stored(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    module = data(tmp_path, mean=[0.1] * 3, std=[0.2] * 3)
    assert module.in_chans == 3
    assert module.describe()["mean"] == [0.1] * 3 and module.describe()["image"]["mean"] == (0.1,) * 3
