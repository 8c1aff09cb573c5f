"""Tests for the confusion matrix and the best score thresholds of detectors."""

import json

import numpy as np
import pytest
from small_runs import DETECTION

from crossformer_vision import load_predictor
from crossformer_vision.cli import main
from crossformer_vision.tasks.detection_matching import best_score_thresholds, confusion_matrix, match_boxes
from crossformer_vision.weights.reading import read_checkpoint


def image(boxes, labels, scores=None, iscrowd=None):
    content = {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels, int)}
    if scores is not None:
        return {**content, "scores": np.array(scores, float)}
    return {**content, "iscrowd": np.array(iscrowd or [0] * len(labels))}


A, B, FAR = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]


def test_each_object_is_found_once_and_by_the_highest_score():
    found = image([A, [0, 0, 10, 9], FAR], [1, 1, 1], [0.5, 0.9, 0.8])
    assert match_boxes(found, image([A], [1])).tolist() == [-1, 0, -1]
    assert match_boxes(found, image([], [])).tolist() == [-1, -1, -1]


def test_confusion_matrix_counts_missed_and_false_objects():
    detections = [image([A, B, FAR], [1, 1, 2], [0.9, 0.8, 0.7]), image([A], [2], [0.2])]
    truth = [image([A, B], [1, 2]), image([A, FAR], [2, 1], iscrowd=[0, 1])]
    matrix = confusion_matrix(detections, truth, [0.5, 0.3])
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert confusion_matrix(detections, truth, [0.5, 0.1]).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_best_thresholds_maximize_f1():
    rng = np.random.default_rng(0)
    detections, truth = [], []
    for _ in range(30):
        is_there = rng.random(2) < 0.6
        boxes = [box for box, there in zip((A, B), is_there) if there]
        truth.append(image(boxes, [1] * len(boxes)))
        scores = np.where(is_there, 0.6, 0.3) + rng.normal(0, 0.2, 2)
        detections.append(image([A, B], [1, 1], scores))
    (threshold, unused) = best_score_thresholds(detections, truth, 2)

    def f1(minimum):
        matrix = confusion_matrix(detections, truth, [minimum, 1])
        return 2 * matrix[0, 0] / (2 * matrix[0, 0] + matrix[0, 2] + matrix[2, 0])

    scores = np.concatenate([one["scores"] for one in detections])
    assert f1(threshold) == pytest.approx(max(f1(score) for score in scores)) and unused == 0.5
    assert best_score_thresholds([image([FAR], [1], [0.9])], [image([A], [1])], 1) == [0.5]


def test_run_stores_thresholds_that_predictions_use(tmp_path):
    run = tmp_path / "run"
    assert main(["train", *DETECTION, "--run.dir", str(run)]) == 0
    thresholds = read_checkpoint(run / "best.ckpt")["thresholds"]
    assert len(thresholds) == 10 and (run / "confusion_matrix.png").exists()
    predictor = load_predictor(run, "cpu")
    assert predictor.thresholds.tolist() == pytest.approx(thresholds)
    predictor.info.thresholds = [0.0] * 9 + [1.0]
    result = predictor(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert 10 not in result.labels
    assert load_predictor(run, "cpu", score_threshold=0.3).thresholds.tolist() == pytest.approx([0.3] * 10)
    assert main(["validate", str(run), "--run.dir", str(tmp_path / "again")]) == 0
    before, after = (json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "again"))
    assert after["val_box_ap"] == pytest.approx(before["val_box_ap"], abs=1e-6)


def test_missed_objects_do_not_lower_the_threshold():
    truth = [image([A], [1])] * 10
    detections = [image([A], [1], [0.9])] + [image([], [], [])] * 9
    assert best_score_thresholds(detections, truth, 1) == [0.9]


def test_detections_in_crowds_do_not_count():
    truth = [image([A, [40, 40, 80, 80]], [1, 1], iscrowd=[0, 1])]
    detections = [image([A, FAR], [1, 1], [0.6, 0.9])]
    assert best_score_thresholds(detections, truth, 1) == [0.6]
    assert confusion_matrix(detections, truth, [0.5]).tolist() == [[1, 0], [0, 0]]
