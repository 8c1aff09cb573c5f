"""Tests for results as objects of supervision."""

import numpy as np
import pytest
from PIL import Image

from crossformer_vision.inference.results import (
    ClassificationResult,
    DetectionResult,
    MultiLabelResult,
    SegmentationResult,
)

pytest.importorskip("supervision")
IMAGE = Image.new("RGB", (6, 4))
CLASSES = ["cat", "dog"]


def test_classes():
    probabilities = np.array([0.3, 0.7], np.float32)
    found = ClassificationResult("a.png", IMAGE, CLASSES, probabilities).to_supervision()
    assert found.class_id.tolist() == [1, 0] and found.get_top_k(1)[0].tolist() == [1]
    found = MultiLabelResult("a.png", IMAGE, CLASSES, probabilities, [0.2, 0.8]).to_supervision()
    assert found.class_id.tolist() == [0]


def test_objects():
    boxes = np.array([[0, 0, 3, 2], [1, 1, 5, 3]], np.float32)
    masks = np.zeros((2, 4, 6), np.uint8)
    masks[0, :2, :3] = 1
    labels, scores = np.array([2, 1]), np.array([0.9, 0.6], np.float32)
    found = DetectionResult("a.png", IMAGE, CLASSES, boxes, labels, scores, masks).to_supervision()
    assert found.class_id.tolist() == [1, 0] and found["class_name"].tolist() == ["dog", "cat"]
    assert found.xyxy.tolist() == boxes.tolist() and found.mask.sum() == 6
    empty = DetectionResult("a.png", IMAGE, CLASSES, boxes[:0], labels[:0], scores[:0], None).to_supervision()
    assert len(empty) == 0


def test_class_maps():
    class_map = np.zeros((4, 6), np.uint8)
    class_map[1:3, 2:5] = 1
    found = SegmentationResult("a.png", IMAGE, CLASSES, class_map).to_supervision()
    assert found["class_name"].tolist() == CLASSES and found.mask[1].sum() == 6
