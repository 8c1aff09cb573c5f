"""Tests for prediction on files: glob patterns, batches, videos, tiles, JSON output and memory use."""

import json
import os
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import classifier_checkpoint, retinanet_checkpoint
from torch import nn
from torchvision.ops import box_iou

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.inference.tiling import detect_in_tiles
from crossformer_vision.inference.video import frames, mp4_writer

CROSSFORMER = str(Path(sys.executable).with_name("crossformer"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "best.ckpt"
    torch.save(classifier_checkpoint("crossformer_nano"), path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Write images of several sizes, including a panorama, and an invalid file."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for n, (width, height) in enumerate([(70, 90), (64, 50), (200, 60), (33, 40)] * 5):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{n:02d}.png")
    (tmp_path / "photos/07.png").write_bytes(b"no image")
    (tmp_path / "photos/notes.txt").write_text("no image either")
    return tmp_path / "photos"


def test_batched_predictions_match_single_predictions(checkpoint, photos, tmp_path, capsys):
    predictor = load_predictor(checkpoint, "cpu")
    paths = sorted(p for p in photos.glob("*.png") if p.name != "07.png")
    for path, result in zip(paths, predictor(paths), strict=True):
        np.testing.assert_allclose(result.probabilities, predictor(path).probabilities, atol=1e-5)
        assert result.name == str(path)
    assert main(["predict", str(checkpoint), str(photos), "--output", str(tmp_path / "out")]) == 1
    assert "1 of 20 images was skipped" in capsys.readouterr().err
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["image"] for entry in written] == [str(path) for path in paths]
    assert len(list((tmp_path / "out").glob("*.png"))) == 19


def test_glob_patterns_json_and_saved_files(checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = ["predict", str(checkpoint), "photos/0[0-3].*"]
    assert main([*what, "--json", "--save", "none"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [f"photos/0{n}.png" for n in range(4)]
    assert not (tmp_path / "predictions").exists()
    assert main([*what, "--save", "results"]) == 0
    assert [p.name for p in (tmp_path / "predictions").iterdir() if not p.name.startswith(".")] == [
        "predictions.json"
    ]
    assert main(["predict", str(checkpoint), "photos/**/x*.jpg"]) == 1
    assert "photos/**/x*.jpg: matches no image or video" in capsys.readouterr().err
    (tmp_path / "photos/[1].png").write_bytes((tmp_path / "photos/00.png").read_bytes())
    assert main(["predict", str(checkpoint), "photos/[1].png"]) == 0  # an existing file name is not a pattern


@pytest.mark.parametrize("make", [lambda: classifier_checkpoint("crossformer_nano"), retinanet_checkpoint])
def test_video(make, tmp_path, capsys):
    av = pytest.importorskip("av")
    torch.save(make(), tmp_path / "best.ckpt")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for n in range(7):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 30 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    out = tmp_path / "out"
    assert (
        main(["predict", str(tmp_path / "best.ckpt"), str(tmp_path / "clip.mp4"), "--output", str(out)]) == 0
    )
    written = json.loads((out / "predictions.json").read_text())
    entries = written["images"] if isinstance(written, dict) else written
    names = [entry.get("file_name") or entry["image"].rpartition("/")[2] for entry in entries]
    assert names == [f"clip.mp4#{n}" for n in range(7)]
    with av.open(str(out / "clip.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 7
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    assert (
        main(["predict", str(tmp_path / "best.ckpt"), str(tmp_path / "broken.mp4"), "--output", str(out)])
        == 1
    )
    assert "broken.mp4: cannot read this video" in capsys.readouterr().err


def write_video(path, pictures, times=None):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", 5
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[n] * 1000), Fraction(1, 1000)
                stream.codec_context.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_video_continues_after_damaged_packet(tmp_path, caplog):
    rng = np.random.default_rng(0)
    path = tmp_path / "clip.mp4"
    write_video(path, [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(30)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2500] = rng.bytes(2500)
    path.write_bytes(content)
    read = [time for time, _ in frames(path)]
    assert 15 <= len(read) < 30 and read[-1] == pytest.approx(2.9)  # includes the last frames
    assert re.search(r"clip\.mp4: \d+ damaged packets? skipped", caplog.text)
    path.write_bytes(content[:2000])
    with pytest.raises(UserError, match=r"clip\.mp4: (cannot read|none of its frames)"):
        list(frames(path))


def test_written_videos_preserve_timestamps_and_size(tmp_path):
    """The frame rate varies; frames of different heights are cropped or padded."""
    av = pytest.importorskip("av")
    times = [0, 0.1, 0.5, 0.5, 2.3]
    with mp4_writer(tmp_path / "clip.mp4", fps=10) as append:
        for time, height in zip(times, (80, 120, 60, 80, 80), strict=True):
            pixels = np.zeros((height, 64, 3), np.uint8)
            pixels[40:50] = 255
            append(Image.fromarray(pixels), time)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = list(container.decode(video=0))
    np.testing.assert_allclose([float(frame.time) for frame in decoded], times, atol=0.001)
    for frame in decoded:
        rows = frame.to_ndarray(format="gray").mean(1)
        assert (frame.width, frame.height) == (64, 80)
        assert 40 <= np.flatnonzero(rows > 128)[0] <= 41 and (rows > 128)[40:50].sum() >= 9


@pytest.mark.parametrize("name", ["pages.tif", "moving.gif"])
def test_skipped_pages_are_reported(name, checkpoint, tmp_path, caplog):
    pages = [Image.fromarray(np.full((50, 60, 3), 60 * n, np.uint8)) for n in range(3)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    assert main(["predict", str(checkpoint), str(tmp_path / name), "--save", "none"]) == 0
    assert f"{name}: has 3 pages or frames; the first one is predicted" in caplog.text


@pytest.mark.parametrize("degrees", [90, 270])
def test_video_rotation_metadata_is_applied(degrees, tmp_path):
    """The display matrix in the track header defines the rotation."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32] = 255  # on the left
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    sine = {90: 1 << 16, 270: -1 << 16}[degrees]  # clockwise
    content[at : at + 36] = struct.pack(">9i", 0, sine, 0, -sine, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    ((_, picture),) = frames(path)
    assert picture.size == (64, 128)
    top, bottom = (np.asarray(picture)[rows].mean() > 128 for rows in (slice(0, 16), slice(-16, None)))
    assert (top, bottom) == ((True, False) if degrees == 90 else (False, True))


class FindsRed(nn.Module):
    """Detector without weights that returns separate red rectangles on a coarse grid."""

    def forward(self, images):
        red = (images[0][0] > 0.9) & (images[0][1] < 0.1)
        boxes = []
        while red.any():
            y, x = red.nonzero()[0].tolist()
            width = int((~red[y, x:]).float().argmax()) if not red[y, x:].all() else red.shape[1] - x
            height = int((~red[y:, x]).float().argmax()) if not red[y:, x].all() else red.shape[0] - y
            boxes.append([x, y, x + width, y + height])
            red[y : y + height, x : x + width] = False
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        masks = torch.zeros(len(boxes), 1, *images[0].shape[1:])
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[0, y1:y2, x1:x2] = 1
        size = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return [
            {
                "boxes": boxes,
                "labels": torch.ones(len(boxes)).long(),
                "scores": 1 - 1 / (2 + size),
                "masks": masks,
            }
        ]


@pytest.mark.parametrize("seed", range(5))
def test_tiled_detection_finds_each_object_once(seed):
    """Covers small objects at tile borders and an object larger than a tile."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((430, 610, 3), np.uint8)
    expected = []
    for y in range(0, 430 - 40, 40):
        for x in range(0, 610 - 40, 40):
            if (x < 360 and y < 240) or rng.random() < 0.4:
                continue
            w, h = rng.integers(4, 20, 2).tolist()
            left, top = x + int(rng.integers(0, 40 - w - 2)), y + int(rng.integers(0, 40 - h - 2))
            expected.append([left, top, left + w, top + h])
    expected.append([10, 14, 330, 220])
    for x1, y1, x2, y2 in expected:
        pixels[y1:y2, x1:x2, 0] = 255
    found = detect_in_tiles(FindsRed(), Image.fromarray(pixels), 128, 0.1, CPU)
    overlap = box_iou(found["boxes"], torch.tensor(expected, dtype=torch.float32))
    assert len(found["boxes"]) == len(expected)
    assert (overlap.max(0).values[:-1] == 1).all()  # small objects match exactly
    assert overlap.max(0).values[-1] > 0.9  # the large object is detected in the downscaled image
    masks = found["masks"].any(0).numpy()
    assert (masks == (pixels[..., 0] > 0)).mean() > 0.97
    assert masks[:, 370:][pixels[:, 370:, 0] > 0].all()


class FindsBright(torch.nn.Module):
    """Detector that returns the bounding box of bright pixels if both sides have at least ``least`` pixels."""

    def __init__(self, least=1):
        super().__init__()
        self.least = least

    def forward(self, images):
        y, x = torch.where(images[0][0] > 0.5)
        seen = len(x) and min(x.max() - x.min(), y.max() - y.min()) + 1 >= self.least
        boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1]] if seen else []
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        masks = (images[0][:1] > 0.5).float()[None].expand(len(boxes), -1, -1, -1)
        return [
            dict(
                boxes=boxes,
                labels=torch.ones(len(boxes)).long(),
                scores=torch.full((len(boxes),), 0.9),
                masks=masks,
            )
        ]


@pytest.mark.parametrize("size, box", [((90, 4000), (10, 1000, 80, 1900)), ((3000, 70), (700, 5, 2100, 60))])
def test_boxes_of_long_images_are_scaled_per_axis(size, box):
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    found = detect_in_tiles(FindsBright(), Image.fromarray(pixels), 200, 0.5, CPU)
    assert len(found["boxes"]) == 1 and (found["boxes"][0] - torch.tensor(box)).abs().max() <= 20


@pytest.mark.parametrize("corner", [(500, 500), (505, 130), (40, 520), (610, 610)])
def test_objects_across_tile_borders_are_merged(corner):
    """The object is too small to be detected in the whole image and is cut by each tile."""
    x, y = corner
    pixels = np.zeros((3200, 3200, 3), np.uint8)
    pixels[y : y + 155, x : x + 155] = 255
    found = detect_in_tiles(FindsBright(least=20), Image.fromarray(pixels), 640, 0.5, CPU)
    assert len(found["boxes"]) == 1
    assert (found["boxes"][0] - torch.tensor([x, y, x + 155, y + 155])).abs().max() <= 3
    assert abs(int(found["masks"].sum()) - 155**2) < 155 * 8


def test_tiled_detection_with_real_detector(tmp_path, capsys):
    torch.save(retinanet_checkpoint(), tmp_path / "best.ckpt")
    pixels = np.random.default_rng(0).integers(0, 255, (150, 260, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    what = [
        "predict",
        str(tmp_path / "best.ckpt"),
        str(tmp_path / "large.png"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*what, "--tile-size", "96", "--score-threshold", "0.005"]) == 0
    annotations = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    whole = load_predictor(tmp_path / "best.ckpt", "cpu", 0.005)(tmp_path / "large.png")
    assert annotations and len(annotations) != len(whole.boxes)
    for found in annotations:
        x, y, w, h = found["bbox"]
        assert x >= -1 and x + w <= 261 and y >= -1 and y + h <= 151
    capsys.readouterr()
    assert main([*what, "--tile-size", "5"]) == 1
    assert "tile" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_number_of_images(checkpoint, tmp_path):
    """Keeping or queueing 200 images of 3 MB each would take 600 MB."""
    for count in (20, 200):
        (tmp_path / str(count)).mkdir()
        for n in range(count):
            target = tmp_path / f"{count}/{n}.png"
            if n == 0:
                Image.new("RGB", (1000, 1000), (n % 255, 80, 80)).save(target)
            else:
                target.hardlink_to(tmp_path / f"{count}/0.png")
    code = f"""
import resource
from crossformer_vision import UserError, load_predictor
from crossformer_vision.inference.files import predict_files
from pathlib import Path
predictor = load_predictor({str(checkpoint)!r}, "cpu")
def peak(folder):
    predict_files(predictor, [folder], Path({str(tmp_path)!r}) / "out", as_json=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
few = peak({str(tmp_path / "20")!r})
print("grew by", peak({str(tmp_path / "200")!r}) - few)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.rsplit("grew by", 1)[1]) < 80


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "environment, options",
    [
        ({"PYTHONIOENCODING": "ascii"}, ["--json"]),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, []),
    ],
    ids=["ASCII, JSON", "C locale, text"],
)
def test_non_utf8_file_names(environment, options, tmp_path):
    """File names that are not UTF-8 or not printable do not stop prediction."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / os.fsdecode(b"caf\xe9.png"))
    Image.new("RGB", (64, 64)).save(folder / "日本.png")
    command = [CROSSFORMER, "predict", "crossformer_nano.cifar10", "photos", *options]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr.decode()
    assert rb"caf\udce9.png" in done.stdout
    names = [entry["image"] for entry in json.loads((tmp_path / "predictions/predictions.json").read_text())]
    assert sorted(map(os.fsencode, names)) == [b"photos/caf\xe9.png", "photos/日本.png".encode()]


def test_nan_weights_are_rejected(tmp_path, capsys):
    content = classifier_checkpoint("crossformer_nano")
    content["state_dict"] = {name: value.clone() for name, value in content["state_dict"].items()}
    next(iter(content["state_dict"].values())).view(-1)[0] = float("nan")
    torch.save(content, tmp_path / "best.ckpt")
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    arguments = [
        "predict",
        str(tmp_path / "best.ckpt"),
        str(tmp_path / "x.png"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 1
    assert "best.ckpt: its weights are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out/predictions.json").exists()


def test_overflowing_outputs_are_rejected(checkpoint, tmp_path):
    predictor = load_predictor(checkpoint, "cpu")
    predictor.net.register_forward_hook(lambda net, inputs, output: output * float("inf"))
    with pytest.raises(UserError, match="the network's output is NaN in torch.float32"):
        predictor(Image.new("RGB", (40, 40)))
