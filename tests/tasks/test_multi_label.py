"""Tests for classification with any number of classes per image."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from small_runs import CLASSIFICATION

from crossformer_vision import Classification, ClassificationData, UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.export import export
from crossformer_vision.tasks.classification_losses import asymmetric_loss
from crossformer_vision.tasks.classification_metrics import MultiLabelMetrics
from crossformer_vision.tasks.thresholds import best_threshold
from crossformer_vision.weights.reading import read_checkpoint

TINY = [o for o in CLASSIFICATION if o not in ("--data.train_images", "--data.val_images", "64", "20")]
COLORS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture
def root(tmp_path):
    """Images whose channels are bright for their classes, some without a class."""
    (tmp_path / "images").mkdir()
    rows = []
    for n in range(24):
        names = [name for name, k in COLORS.items() if n >> k & 1]
        color = tuple(220 * (name in names) + n for name in COLORS)
        Image.new("RGB", (20, 16), color).save(tmp_path / f"images/{n}.png")
        rows.append(f"images/{n}.png,{';'.join(names)},{'val' if n >= 16 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    return tmp_path


def test_labels_and_columns_give_the_same_classes(root):
    data = ClassificationData(root=str(root / "labels.csv"))
    assert data.is_multi_label and data.classes == ["blue", "green", "red"]
    presence = data.open("train").source.presence
    assert presence[5].tolist() == [True, False, True] and not presence[0].any()
    assert data.class_counts().tolist() == [8, 8, 8]
    _, target = data.open("train").source.read(5)
    assert target.tolist() == [1, 0, 1] and target.dtype == np.float32
    rows = [f"images/{n}.png,{n >> 2 & 1},{float(n >> 1 & 1)},{'TRUE' if n & 1 else ''}" for n in range(24)]
    (root / "columns.csv").write_text("\n".join(["path,blue,green,red", *rows]) + "\n")
    columns = ClassificationData(root=str(root / "columns.csv"), val_share=0.25)
    assert columns.num_classes == 3 and len(columns.open("val")) == 6 and columns.is_multi_label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,a,b\nimages/0.png,1,2", "line 2: column b is '2', not 0 or 1"),
        ("path,label\nimages/0.png,a\nimages/1.png,", "line 3 has no label"),
        ("path,label,split\nimages/0.png,a,train\nimages/0.png,a,val", "of line 2, in another split"),
        ("path,split\nimages/0.png,train", "has no column 'label', but path, split"),
    ],
)
def test_invalid_files(text, message, root):
    (root / "bad.csv").write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        _ = ClassificationData(root=str(root / "bad.csv")).num_classes


def test_metrics_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator)
    true = (logits + torch.randn(200, 4, generator=generator) > 1).float()
    true[:, 3] = 0
    metrics = MultiLabelMetrics(4)
    for part in range(0, 200, 64):
        metrics.update(logits[part : part + 64], true[part : part + 64])
    found = metrics.compute()
    scores, truth = logits.sigmoid().numpy(), true.numpy().astype(int)
    expected = average_precision_score(truth[:, :3], scores[:, :3], average="macro")
    assert float(found["map"]) == pytest.approx(expected, abs=1e-6)
    predicted = scores >= np.array(metrics.thresholds, np.float32)
    assert float(found["f1"]) == pytest.approx(
        f1_score(truth[:, :3], predicted[:, :3], average="macro"), abs=1e-6
    )
    for k in range(3):
        candidates = [f1_score(truth[:, k], scores[:, k] >= value) for value in scores[:, k]]
        assert max(candidates) == pytest.approx(metrics.f1[k], abs=1e-9)
    assert metrics.thresholds[3] == 0.5 and np.isnan(metrics.ap[3])
    assert float(found["loss"]) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, true)), abs=1e-6
    )


def test_best_threshold_prefers_the_highest():
    assert best_threshold(np.array([0.9, 0.8, 0.1]), np.array([True, True, False])) == 0.8
    assert best_threshold(np.array([0.9, 0.8]), np.array([False, False])) == 0.5


def test_asymmetric_loss():
    logits, targets = torch.randn(5, 3), torch.tensor([[1.0, 0, 0]] * 5)
    plain = asymmetric_loss(logits, targets, gamma_negative=0, gamma_positive=0, margin=0)
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logits, targets))
    easy = torch.full((5, 3), -4.0, requires_grad=True)
    asymmetric_loss(easy, torch.zeros(5, 3)).backward()
    assert easy.grad.abs().max() == 0  # below the margin
    for loss in ("bce", "asymmetric"):
        task = Classification(num_classes=3, multi_label=True, loss=loss)
        assert task.compute_loss(logits, targets).isfinite()
    with pytest.raises(UserError, match="loss"):
        Classification(num_classes=3, multi_label=True, loss="focal")


def test_run_stores_thresholds_for_validation_prediction_and_export(root, capsys, caplog):
    run = root / "run"
    options = [
        *TINY,
        "--data.batch_size",
        "8",
        "--model.lr",
        "3e-3",
        "--data.hflip",
        "0",
        "--run.dir",
        str(run),
    ]
    more = ["--model.class_weights", "balanced", "--data.sampling", "sqrt", "--model.mixup", "0.2"]
    assert main(["train", str(root / "labels.csv"), *options, *more]) == 0
    assert "mAP" in capsys.readouterr().out and "mixup and cutmix need one class per image" in caplog.text
    content = read_checkpoint(run / "best.ckpt")
    assert len(content["thresholds"]) == 3
    rows = list(csv.DictReader((run / "classes.csv").open()))
    assert [row["class"] for row in rows] == ["blue", "green", "red"] and "threshold" in rows[0]
    assert {"class_ap.png", "predictions.png"} <= {path.name for path in run.iterdir()}
    assert main(["validate", str(run), "--data.num_workers", "0", "--run.dir", str(root / "again")]) == 0
    before, after = (json.loads((path / "results.json").read_text()) for path in (run, root / "again"))
    for name in ("val_map", "val_f1"):
        assert after[name] == pytest.approx(before[name], abs=1e-6)
    predictor = load_predictor(run, "cpu")
    result = predictor(root / "images/7.png")
    expected = result.probabilities >= np.array(content["thresholds"], np.float32)
    assert {name for name, _ in result.labels()} == {n for n, x in zip(predictor.classes, expected) if x}
    assert result.plot().height > 16 and str(result).startswith(str(root))
    export(predictor, root / "net.onnx")
    assert load_predictor(root / "net.onnx")(root / "images/7.png").labels() == [
        (name, pytest.approx(p, abs=1e-4)) for name, p in result.labels()
    ]
