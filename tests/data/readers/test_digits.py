"""Tests for the synthetic digits dataset: determinism and consistency of the labels of all four tasks."""

import numpy as np
import pytest

from crossformer_vision.data.readers.digits import MultiScaleDigits, _handwriting


def test_samples_depend_only_on_seed_split_and_index():
    a, b = MultiScaleDigits(seed=3), MultiScaleDigits(seed=3)
    assert np.array_equal(a[7][0], b[7][0]) and a[7][1]["label"] == b[7][1]["label"]
    for other in (a[8], MultiScaleDigits(seed=4)[7], MultiScaleDigits("val", seed=3)[7]):
        assert not np.array_equal(a[7][0], other[0])


def test_splits_do_not_share_handwriting_samples():
    train, val = (_handwriting(split)[0].reshape(-1, 64) for split in ("train", "val"))
    assert len(train) + len(val) == 1797
    assert (
        len({d.tobytes() for d in train} & {d.tobytes() for d in val}) <= 3
    )  # the source data contains a few duplicates


@pytest.mark.parametrize("size, digits", [(64, (1, 1)), (128, (2, 6))])
def test_labels_of_all_tasks_are_consistent(size, digits):
    dataset = MultiScaleDigits(size=size, digits=digits, length=50)
    sides, counts = [], set()
    for i in range(50):
        image, target = dataset[i]
        assert image.size == (size, size) and image.mode == "RGB"
        n = len(target["labels"])
        counts.add(n)
        assert target["boxes"].shape == (n, 4) and target["masks"].shape == (n, size, size)
        assert target["label"] == target["labels"][0]
        assert (target["masks"].sum(0) <= 1).all()  # masks do not overlap
        for label, box, mask in zip(target["labels"], target["boxes"], target["masks"], strict=True):
            x1, y1, x2, y2 = box.astype(int)
            assert 0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            assert (target["semantic"][mask == 1] == label + 1).all()
            pixels = np.asarray(image, float)
            assert (
                pixels[mask == 1].mean() > pixels[target["semantic"] == 0].mean() + 30
            )  # digits are brighter than the background
            sides.append(max(x2 - x1, y2 - y1) / size)
        assert (target["semantic"] == 0).sum() == size * size - target["masks"].sum()
    assert max(sides) > 2.5 * min(sides)
    assert max(counts) <= digits[1] and (digits[0] == digits[1] or len(counts) > 2)
