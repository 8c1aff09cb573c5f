"""Training, validation, prediction and export on four-channel TIFFs of 16 bits, for each task."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import detector_checkpoint
from small_runs import read_weights
from spectral_images import WRITERS, spectral_image

from crossformer_vision import load_predictor
from crossformer_vision.cli import main
from crossformer_vision.export import export

COMMON = """--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.precision 32 --data.num_workers 0
  --model.model_args {"depths":[1,1,1,1]} --data.display_channels [3,2,1] --data.batch_size 4
  --model.pretrained false""".split()
OPTIONS = {
    "classification": ["--data.image_size", "32"],
    "detection": "--model.min_size 64 --model.max_size 96 --model.width 16".split(),
    "segmentation": "--data.crop_size 48 --model.width 16".split(),
}
IMAGES = {
    "classification": "val/water/1.tif",
    "detection": "images/val/1.tif",
    "segmentation": "images/validation/1.tif",
}


@pytest.mark.parametrize("task", WRITERS)
def test_train_validate_predict_and_export(task, tmp_path, capsys):
    root, run = WRITERS[task](tmp_path / "data"), tmp_path / "run"
    main(["train", str(root), "--run.dir", str(run), *COMMON, *OPTIONS[task]])
    assert "images have 4 channels of 16 bits" in capsys.readouterr().out
    weights = read_weights(run / "best.ckpt")
    assert any(weight.ndim == 4 and weight.shape[1] == 4 for weight in weights.values())
    main(["validate", str(run), "--data.num_workers", "0", "--run.dir", str(tmp_path / "again")])
    before, after = (json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "again"))
    metric = before["metric"]
    assert after[metric] == pytest.approx(before[metric], abs=1e-6)
    assert Image.open(run / "predictions.png").size[0] > 100
    predictor = load_predictor(run, "cpu", score_threshold=0.01)
    path = root / IMAGES[task]
    result = predictor(path)
    assert result.image.mode == "RGB" and result.plot().width >= 48
    array = spectral_image(1, 3000) if task == "classification" else None
    if array is not None:
        assert predictor(array).probabilities == pytest.approx(result.probabilities)
        assert predictor(torch.from_numpy(array).permute(2, 0, 1)).top(1) == result.top(1)
    if task == "detection":  # exports of detectors take long; see tests/export
        return
    export(predictor, tmp_path / "net.onnx")
    exported = load_predictor(tmp_path / "net.onnx")(path)
    if task == "classification":
        np.testing.assert_allclose(exported.probabilities, result.probabilities, atol=1e-4)
    else:
        assert (exported.class_map == result.class_map).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_detector_export(detector, tmp_path):
    """A detector whose scores differ clearly, because nearly equal scores are ordered by rounding."""
    checkpoint = detector_checkpoint(detector, "crossformer_nano", in_chans=4, depths=(1, 1, 1, 1))
    checkpoint["pixel_format"] = {"channels": 4, "dtype": "uint16"}
    checkpoint["hyper_parameters"] |= {"image_mean": [0.03] * 4, "image_std": [0.01] * 4}
    predictor = load_predictor(checkpoint, "cpu", score_threshold=0.05)
    report = export(predictor, tmp_path / "net.onnx")
    assert report.objects > 1000 and max(report.differences.values()) < 1e-3
    image = spectral_image(1, 3000)
    expected, found = predictor(image), load_predictor(tmp_path / "net.onnx", score_threshold=0.05)(image)
    assert len(expected.labels) > 50
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.1)
