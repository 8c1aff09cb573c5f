"""Tests for COCO detection data: parsing, validation errors, transforms and batching."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from crossformer_vision import UserError
from crossformer_vision.data.detection import DetectionData
from crossformer_vision.data.detection_transforms import ToTensors
from crossformer_vision.data.readers.coco import CocoImages
from crossformer_vision.data.readers.coco_masks import decode_mask

SQUARE = [10, 10, 30, 10, 30, 40, 10, 40]


def coco(root, split="train", images=4, edit=None, layout="images"):
    """Write a COCO dataset of alternating wide and tall images with polygon, RLE and crowd annotations.

    Image 0 has no objects.
    """
    folder = root / "images" / split if layout == "images" else root / split
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
    }
    for n in range(images):
        w, h = ((80, 60), (50, 70))[n % 2]
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        content["images"].append(dict(id=100 + n, file_name=f"{n}.png", width=w, height=h))
        if n:
            counts = [h * 5, h * 10, h * (w - 15)]  # columns 5 to 14
            common = dict(image_id=100 + n, iscrowd=0)
            content["annotations"] += [
                dict(common, id=10 * n, category_id=3, bbox=[10, 10, 20, 30], area=600, segmentation=[SQUARE]),
                dict(common, id=10 * n + 1, category_id=7, bbox=[5, 0, 10, h], area=10 * h,
                     segmentation={"size": [h, w], "counts": counts}),
                dict(common, id=10 * n + 2, category_id=3, bbox=[0, 0, 9, 9], area=81, iscrowd=1,
                     segmentation={"size": [h, w], "counts": [0, 9, h * w - 9]}),
            ]  # fmt: skip
    if edit:
        edit(content)
    file = root / "annotations" / f"instances_{split}.json"
    if layout == "roboflow":
        file = folder / "_annotations.coco.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def data(root, **options):
    return DetectionData(
        str(root), **{"detector": "mask_rcnn", "min_size": 60, "max_size": 90, "num_workers": 0, **options}
    )


@pytest.mark.parametrize(
    "train, val, layout",
    [("train", "val", "images"), ("train2017", "val2017", "coco"), ("train", "valid", "roboflow")],
)
def test_directory_layouts(train, val, layout, tmp_path):
    coco(tmp_path, train, layout=layout)
    coco(tmp_path, val, layout=layout)
    found = data(tmp_path)
    assert found.num_classes == 2 and found.classes == [
        "a",
        "b",
    ]  # in order of the COCO category ids, 3 and 7
    images, targets = next(iter(found.val_dataloader()))
    assert len(images) == 1 and images[0].shape == (3, 60, 80) and len(targets[0]["boxes"]) == 0
    assert targets[0]["masks"].shape == (0, 60, 80)


def test_boxes_labels_and_masks_are_read_unchanged(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val")
    found = data(tmp_path)
    assert found.num_classes == 2
    image, target = found.images["val"][1]
    assert image.dtype == torch.float32 and image.min() >= 0 and 0.9 < image.max() <= 1
    assert target["boxes"].tolist() == [[10, 10, 30, 40], [5, 0, 15, 70], [0, 0, 9, 9]]
    assert target["labels"].tolist() == [1, 2, 1] and target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [600, 700, 81] and int(target["image_id"]) == 101
    assert target["masks"][0].sum() == 600 and target["masks"][0, 10:40, 10:30].all()
    assert target["masks"][1].sum() == 700 and target["masks"][1, :, 5:15].all()
    _, target = found.images["train"][1]
    assert target["labels"].tolist() == [1, 2] and "iscrowd" not in target  # training excludes crowds


def test_segmentation_encodings_are_equivalent():
    from pycocotools import mask

    drawn = np.zeros((40, 50), np.uint8)
    drawn[10:40, 10:30] = 1
    encoded = mask.encode(np.asfortranarray(drawn))
    assert (decode_mask({**encoded, "counts": encoded["counts"].decode()}, 50, 40) == drawn).all()
    assert (decode_mask([SQUARE], 50, 40) == drawn).all()


@pytest.mark.parametrize(
    "options", [dict(scale_jitter=(0.5, 2.0), photometric=True, vflip=0.5), dict(hflip=1.0)]
)
def test_boxes_and_masks_follow_image_transforms(options, tmp_path):
    coco(tmp_path, images=8)  # four images per orientation, so no incomplete batch
    coco(tmp_path, "val")
    found = data(tmp_path, batch_size=2, **options)
    for images, targets in found.train_dataloader():
        assert (
            len({image.shape[1] > image.shape[2] for image in images}) == 1
        )  # batches do not mix orientations
        for image, target in zip(images, targets, strict=True):
            assert image.shape[1:] == target["masks"].shape[1:]
            assert min(image.shape[1:]) == 60 and max(image.shape[1:]) <= 90
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                ys, xs = torch.where(mask)
                if len(ys):
                    inked = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                    assert (inked - box).abs().max() < 2.5  # tolerance for nearest-neighbor resizing
    assert len(found.train_dataloader()) == 4


def test_photometric_distortion_changes_only_images(tmp_path):
    for split in ("train", "val"):
        coco(tmp_path, split, images=8)
    plain, distorted = (data(tmp_path, photometric=wanted, hflip=0.0) for wanted in (False, True))
    changed = 0
    for n in range(8):
        torch.manual_seed(n)
        (image, target), (other, its) = plain.open("train")[n], distorted.open("train")[n]
        assert (target["boxes"] == its["boxes"]).all() and (target["masks"] == its["masks"]).all()
        assert other.dtype == torch.float32 and other.min() >= 0 and other.max() <= 1
        changed += bool((image != other).any())
    assert changed >= 4  # images have few colors, so some steps change nothing


def test_images_without_objects_can_be_excluded_from_training(tmp_path, caplog):
    def only_crowds(content):
        for annotation in content["annotations"]:
            if annotation["image_id"] == 102:
                annotation["iscrowd"] = 1

    for split in ("train", "val"):
        coco(tmp_path, split, edit=only_crowds)
    found = data(tmp_path, skip_empty=True)
    assert found.num_classes == 2
    assert found.images["train"].source.ids.tolist() == [101, 103]
    assert len(found.images["train"].source.sizes) == 2 and len(found.images["val"]) == 4
    assert found.images["train"].source.read(1)[1]["image_id"] == 103
    coco(tmp_path, edit=lambda content: content["annotations"].clear())
    with pytest.raises(UserError, match="has no annotations to train on. Export the labels again"):
        assert data(tmp_path, skip_empty=True).num_classes


def test_digits_are_deterministic():
    for detector in ("retinanet", "mask_rcnn"):
        first, second = (
            next(iter(DetectionData(None, detector=detector, min_size=64, num_workers=0).train_dataloader()))
            for _ in range(2)
        )
        assert torch.equal(first[0][0], second[0][0]) and torch.equal(
            first[1][1]["boxes"], second[1][1]["boxes"]
        )
        assert ("masks" in first[1][0]) == (detector == "mask_rcnn")
        assert all(1 <= label <= 10 for target in first[1] for label in target["labels"])


def change(path, value):
    """Return a function that edits COCO content, as in `change("annotations.0.bbox", …)`."""

    def edit(content):
        *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        for key in keys:
            content = content[key]
        content[last] = value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (change("annotations.0.image_id", 5), r"annotation 10: refers to image 5, which the file does not list"),
        (change("annotations.1.category_id", 9), r"annotation 11: of category 9; known are 3 \(a\), 7 \(b\)"),
        (change("annotations.0.bbox", [1, 2, 3]), r"annotation 10: its bbox is not \[x, y, width, height\]"),
        (change("annotations.0.segmentation", [[1, 2, 3, 4]]), "annotation 10: a polygon of fewer than three points"),
        (change("annotations.1.segmentation.size", [9, 9]), r"annotation 11: its mask is of size \[9, 9\], the image of"),
        (change("annotations.0.segmentation", None), "annotation 10: has no segmentation"),
        (change("annotations.0.bbox", [float("nan"), 1, 2, 3]), "annotation 10: its bbox or area has a number that is"),
        (change("annotations.0.area", float("inf")), "annotation 10: its bbox or area has a number that is none"),
        (change("annotations.0.area", "big"), "annotation 10: its area or iscrowd is no number"),
        (change("annotations.0.iscrowd", "yes"), "annotation 10: its area or iscrowd is no number"),
        (change("annotations.0.image_id", None), "annotation 10: its image_id is None"),
        (change("annotations.0.segmentation", [1, 2, 3, 4, 5, 6]), "annotation 10: its segmentation is not a list of"),
        (change("annotations.0.segmentation", [["1"] * 6]), "annotation 10: its segmentation has a value that is no"),
        (change("annotations.0.segmentation", [[1, 2, 3, float("nan"), 5, 6]]), "annotation 10: its segmentation has a"),
        (change("annotations.1.segmentation.counts", [100.0, 3400.0]), "annotation 11: the run lengths of its mask are n"),
        (change("annotations.1.segmentation.counts", [100, 20]), "annotation 11: the run lengths of its mask are of 120"),
        (change("annotations.0", "x"), "an annotation that is a str"),
        (change("images.1.id", 100), "two entries have the image id 100"),
        (change("categories.1.id", 7), "two entries have the category id 7"),
        (change("categories.1.name", "b"), "two classes have the name 'b'"),
        (change("categories.1.name", " "), "a class has no name"),
        (change("images.1.width", float("nan")), "not a COCO file: its images need id"),
        (change("images.1.width", 10**30), "not a COCO file: its images need id"),
        (change("categories", {}), "not a COCO file: it needs the lists images, annotations and categories"),
        (change("images.0", {"id": 1}), "not a COCO file: its images need id and file_name"),
        (change("annotations.1.segmentation.counts", ""), "annotation 11: its mask has no run lengths"),
        (change("images.1.file_name", "x.png"), r"image 101: x.png is not in .*train. Add what is missing, or pass --da"),
        (change("images.1.file_name", "../0.png"), r"image 101: ../0.png lies outside"),
        (change("images", []), "lists no images"),
    ],
)  # fmt: skip
def test_invalid_annotations_are_named_in_error(edit, message, tmp_path):
    file = coco(tmp_path, edit=edit)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        CocoImages(file, tmp_path / "images/train", masks=True)


def test_missing_and_invalid_json_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        assert data(tmp_path / "nowhere").num_classes
    with pytest.raises(
        UserError, match="has no labels in the format of COCO, YOLO or Pascal VOC. Check --data.root"
    ):
        assert data(tmp_path).num_classes
    file = coco(tmp_path)
    with pytest.raises(UserError, match=r"instances_val.json: no such annotation file"):
        assert data(tmp_path).num_classes
    file.write_text("{")
    with pytest.raises(UserError, match="instances_train.json: not JSON"):
        assert data(tmp_path).num_classes


def test_boxes_outside_image_are_skipped_and_counted(tmp_path, caplog):
    def edit(content):
        content["annotations"][0]["bbox"] = [200, 10, 20, 30]  # outside
        content["annotations"][1]["bbox"] = [5, 5, 0, 10]
        content["annotations"][3]["bbox"] = [5, 5, 10, -3]
        content["annotations"][4]["bbox"] = [70, 50, 40, 40]  # partly outside an image of 80 x 60

    file = coco(tmp_path, edit=edit)
    images = CocoImages(file, tmp_path / "images/train", train=True)
    said = (
        "3 objects outside the image or without area, skipped; the first is annotation 10 with bbox [200, 10,"
    )
    assert said in caplog.text
    assert np.diff(images.first).tolist() == [0, 1, 2, 3]
    assert images.read(2)[1]["boxes"][0].tolist() == [70, 50, 110, 90]
    boxes = ToTensors(lambda *pair: pair, train=True)(*images.read(2))[1]["boxes"]
    assert boxes[0].tolist() == [70, 50, 80, 60]
    # COCO metrics use the unmodified ground truth
    images = CocoImages(file, tmp_path / "images/train")
    assert np.diff(images.first).tolist() == [0, 3, 3, 3]
    assert ToTensors(lambda *pair: pair, train=False)(*images.read(2))[1]["boxes"][1].tolist() == [
        70,
        50,
        110,
        90,
    ]


@pytest.mark.parametrize("train", [True, False])
def test_empty_masks_are_skipped_and_counted(train, tmp_path, caplog):
    from pycocotools import mask

    empty = mask.encode(np.zeros((70, 50), np.uint8, order="F"))

    def edit(content):
        content["annotations"][0]["segmentation"] = [[100, 100, 130, 100, 130, 120]]  # outside
        content["annotations"][1]["segmentation"]["counts"] = [50 * 70]
        content["annotations"][3]["segmentation"] = [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]]
        content["annotations"][4]["segmentation"] = [[5, 6, 25, 6, 15, 6]]  # collinear
        content["annotations"][6]["segmentation"] = {"size": [70, 50], "counts": empty["counts"].decode()}

    file = coco(tmp_path, edit=edit)
    images = CocoImages(file, tmp_path / "images/train", masks=True, train=train)
    assert np.diff(images.first).tolist() == [0, 1, 1, 2]  # crowds remain here; training drops them later
    assert "instances_train.json: 5 objects without a mask pixel in the image, skipped" in caplog.text
    for n in range(4):
        target = ToTensors(lambda *pair: pair, train=train)(*images.read(n))[1]
        assert target["masks"].flatten(1).any(1).all()


def test_thin_polygons_match_pycocotools_masks():
    from pycocotools import mask

    from crossformer_vision.data.readers.coco_masks import polygons_have_pixels

    rng = np.random.default_rng(0)
    for _ in range(300):
        points = rng.uniform(-5, 45, (rng.integers(3, 7), 2)) * [1, rng.choice([0.02, 0.2, 1])]
        polygons = [points.ravel().tolist()]
        drawn = int(mask.area(mask.merge(mask.frPyObjects(polygons, 30, 40))))
        assert polygons_have_pixels(polygons, 40, 30) == (drawn > 0), polygons


@pytest.mark.parametrize(
    "annotations, message",
    [
        ([], "has no annotations to train on"),
        (
            [dict(iscrowd=1)] * 3,
            r"all objects \(3\) are crowd regions \(iscrowd 1\), which training skips. Label single",
        ),
        ([dict(bbox=[500, 5, 3, 3])], "no object of 1 can be trained on"),
    ],
)
def test_files_without_training_objects_are_rejected(annotations, message, tmp_path, caplog):
    common = dict(image_id=101, category_id=3, bbox=[5, 5, 10, 10])

    def edit(content):
        content["annotations"] = [{**common, "id": n, **a} for n, a in enumerate(annotations)]

    file = coco(tmp_path, edit=edit)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        CocoImages(file, tmp_path / "images/train", train=True)
    assert len(CocoImages(file, tmp_path / "images/train")) == 4  # validation
    assert ("has no annotations; average precision cannot be measured" in caplog.text) == (not annotations)


def test_crowds_are_reported(tmp_path, caplog):
    CocoImages(coco(tmp_path), tmp_path / "images/train", train=True)
    assert "instances_train.json: skipped in training: 3 crowd regions (iscrowd 1)" in caplog.text


def listed_as(names, root):
    """Write a COCO file that lists its images under the given names."""

    def edit(content):
        for image, name in zip(content["images"], names, strict=True):
            image["file_name"] = name

    return coco(root, images=len(names), edit=edit)


@pytest.mark.parametrize(
    "prefix", ["left\\", "./left/", "train/left/", "images/train/left/", "images\\train\\left\\"]
)
def test_file_name_variants_of_annotation_tools(prefix, tmp_path):
    file = listed_as([f"{prefix}{n}.png" for n in range(4)], tmp_path)
    folder = tmp_path / "images/train"
    (folder / "left").mkdir()
    for n in range(4):
        (folder / f"{n}.png").rename(folder / f"left/{n}.png")
    images = CocoImages(file, folder)
    assert [images.name(n) for n in range(4)] == [str(folder / f"left/{n}.png") for n in range(4)]
    assert images.read(1)[0].size == (50, 70)


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_unicode_file_names(form, other, tmp_path):
    file = listed_as([unicodedata.normalize(form, f"café {n}.png") for n in range(2)], tmp_path)
    for n in range(2):
        (tmp_path / f"images/train/{n}.png").rename(
            tmp_path / "images/train" / unicodedata.normalize(other, f"café {n}.png")
        )
    assert CocoImages(file, tmp_path / "images/train").read(1)[0].size == (50, 70)


def test_listed_hidden_images_are_read(tmp_path):
    file = listed_as(["0.png", ".1.png"], tmp_path)
    (tmp_path / "images/train/1.png").rename(tmp_path / "images/train/.1.png")
    assert CocoImages(file, tmp_path / "images/train").read(1)[0].size == (50, 70)


def test_missing_images_are_rejected_or_counted(tmp_path, caplog):
    for split in ("train", "val"):
        coco(tmp_path, split)
    for n in (2, 3):
        (tmp_path / f"images/val/{n}.png").unlink()
    with pytest.raises(
        UserError, match=r"instances_val.json: image 102: 2.png is not in .*val, nor are 1 more"
    ):
        assert data(tmp_path, classes=["a", "b"]).open("val")
    found = data(tmp_path, skip_corrupt=True, detector="retinanet")
    assert found.num_classes and len(list(found.val_dataloader())) == 4
    assert "image 102: 2.png is not in" in caplog.text and found.skipped == 2


def test_missing_sizes_are_read_from_images(tmp_path, caplog):
    def edit(content):
        del content["images"][1]["width"], content["images"][1]["height"]
        content["images"][2].update(width=0, height=0)
        content["images"][3]["width"] = None

    images = CocoImages(coco(tmp_path, edit=edit), tmp_path / "images/train", masks=True)
    assert images.sizes.tolist() == [[80, 60], [50, 70], [80, 60], [50, 70]]
    assert "lists no size of 3 images; the sizes of the image files are used" in caplog.text and images.read(
        1
    )[1]["masks"].shape == (3, 70, 50)


def test_image_with_two_ids_merges_their_objects(tmp_path, caplog):
    def edit(content):
        content["images"].append({**content["images"][1], "id": 900})
        content["annotations"][0]["image_id"] = 900

    images = CocoImages(coco(tmp_path, edit=edit), tmp_path / "images/train")
    assert np.diff(images.first).tolist() == [0, 3, 3, 3] and len(images) == 4
    assert "1 entry repeats an image; their objects are merged" in caplog.text


def test_root_category_is_ignored(tmp_path, caplog):
    def edit(content):
        for category in content["categories"]:
            category["supercategory"] = "cells"
        content["categories"].append({"id": 0, "name": "cells", "supercategory": "none"})

    for split in ("train", "val"):
        coco(tmp_path, split, edit=edit)
    found = data(tmp_path)
    assert found.num_classes == 2 and found.classes == ["a", "b"] and found.category_ids == [3, 7]
    assert found.images["train"].source.read(1)[1]["labels"].tolist() == [1, 2, 1]
    assert "category 'cells' has no objects and is the supercategory of others; it is ignored" in caplog.text


@pytest.mark.parametrize(
    "angle, box", [(90.0, [25, 5, 35, 35]), (180, [15, 15, 45, 25]), (45, [15.9, 5.9, 44.1, 34.1])]
)
def test_rotated_boxes_are_replaced_by_enclosing_boxes(angle, box, tmp_path, caplog):
    def edit(content):
        rotated = {"occluded": False, "rotation": angle}
        content["annotations"][0].update(bbox=[15, 15, 30, 10], attributes=rotated)
        content["annotations"][1]["attributes"] = {"rotation": 0.0}

    images = CocoImages(coco(tmp_path, edit=edit), tmp_path / "images/train")
    assert images.read(1)[1]["boxes"][0].tolist() == pytest.approx(box, abs=0.1)
    assert "1 box is rotated; their enclosing upright boxes are used" in caplog.text


def test_duplicate_id_lookup_takes_linear_time():
    """Counts comparisons instead of measuring time."""
    from crossformer_vision.data.readers.coco_json import first_duplicate

    compared = 0

    class Counting(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    assert first_duplicate([Counting(n) for n in (*range(2000), 1999)]) == 1999
    assert compared < 100 and first_duplicate(range(10)) is None


def test_polygons_beyond_the_border_exclude_padding(tmp_path):
    """A crop larger than the image adds gray padding that belongs to no object."""
    folder = tmp_path / "images/train"

    def edit(content):
        for annotation in content["annotations"]:
            annotation.update(iscrowd=0, bbox=[30, 20, 60, 30])
            annotation["segmentation"] = [
                [30, 20, 90, 10, 110, 60, 30, 50]
            ]  # images are 80 or 50 pixels wide

    for split in ("train", "val"):
        coco(tmp_path, split, edit=edit)
        for file in folder.glob("*.png"):
            Image.new("RGB", Image.open(file).size, (255, 0, 0)).save(file)
    found = data(tmp_path, min_size=96, hflip=0.0, scale_jitter=(0.5, 0.5))
    assert found.num_classes
    for n in (1, 2, 3):
        pixels, target = found.open("train")[n]
        red = (pixels[0] > 0.9) & (pixels[1] < 0.1)
        assert target["masks"].any() and not (target["masks"].bool().any(0) & ~red).any()


@pytest.mark.parametrize("side", [800, 672])
def test_boxes_at_the_border_are_kept_in_training(side, tmp_path):
    """Uses boxes in the lower right quarter and image sizes that cause rounding errors."""
    sizes = [(500, 375), (375, 500), (640, 480), (612, 612), (333, 500)]
    content = dict(images=[], annotations=[], categories=[dict(id=1, name="x")])
    for i, (w, h) in enumerate(sizes):
        content["images"].append(dict(id=i, file_name=f"{i}.png", width=w, height=h))
        content["annotations"].append(
            dict(id=i, image_id=i, category_id=1, bbox=[w / 2, h / 2, w / 2, h / 2])
        )
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / "images" / split / f"{i}.png")
    found = data(tmp_path, detector="retinanet", min_size=side, max_size=1333, hflip=0.0)
    assert found.num_classes == 1
    assert all(len(found.images["train"][i][1]["boxes"]) == 1 for i in range(5))


def test_categories_are_matched_by_name(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val", edit=change("categories", [{"id": 3, "name": "b"}, {"id": 7, "name": "a"}]))
    found = data(tmp_path)
    assert found.num_classes == 2 and found.classes == ["a", "b"]
    labels = [found.images[split].source.read(1)[1]["labels"].tolist() for split in ("train", "val")]
    assert labels == [[1, 2, 1], [2, 1, 2]]
    coco(tmp_path, "val", edit=change("categories.0.name", "z"))
    with pytest.raises(
        UserError, match=r"instances_val.json: annotation 11: of category 7 \(z\); known are a, b"
    ):
        assert data(tmp_path).num_classes


def test_string_float_and_large_ids(tmp_path):
    """Ids may be strings, floats or integers beyond 64 bits; equal whole numbers match."""

    def edit(content):
        for image in content["images"]:
            image["id"] = str(image["id"] + 2**64)
        for k, annotation in enumerate(content["annotations"]):
            annotation["image_id"] += 2**64
            annotation["category_id"] = (float, str)[k % 2](annotation["category_id"])
        content["images"][0]["id"] = "a hash"

    images = CocoImages(coco(tmp_path, edit=edit), tmp_path / "images/train")
    assert np.diff(images.first).tolist() == [0, 3, 3, 3]
    assert images.read(1)[1]["image_id"] == 1 and images.read(0)[1]["image_id"] == 0


def test_symlinked_images_are_read(tmp_path):
    """git-annex, DVC and shared storage use symbolic links."""
    file = coco(tmp_path)
    path = tmp_path / "images/train/1.png"
    path.rename(tmp_path / "store.png")
    path.symlink_to(tmp_path / "store.png")
    assert CocoImages(file, tmp_path / "images/train").read(1)[0].size == (50, 70)


def test_all_image_modes(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val", images=5)
    folder = tmp_path / "images/val"
    ramp = np.linspace(0, 65535, 80 * 60).reshape(60, 80)
    Image.fromarray((ramp / 257).astype(np.uint8)).save(folder / "0.png")
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "2.png")
    Image.new("RGBA", (50, 70), (10, 200, 30, 0)).save(folder / "1.png")
    (folder / "4.png").write_bytes(b"rubbish")
    found = data(tmp_path)
    assert found.num_classes
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match="val/2.png: has 1 channel of 16 bits, expected an RGB image"):
        found.images["val"][2]
    Image.new("L", (80, 60)).save(folder / "2.png")
    gray, colour = (found.images["val"][n][0] for n in range(2))
    assert gray.shape == (3, 60, 80) and gray[0, -1, -1] > 0.99
    assert (colour[:, 0, 0] * 255).round().tolist() == [10, 200, 30]
    for n in (3, 4):
        with pytest.raises(UserError, match=f"val/{n}.png: cannot read this image"):
            found.images["val"][n]
    lenient = data(tmp_path, skip_corrupt=True)
    assert lenient.num_classes
    assert lenient.images["val"][3] is None and lenient.skipped == 1
    batches = list(lenient.val_dataloader())
    assert [batch is None for batch in batches] == [False, False, False, True, True]


def test_file_names_outside_image_folder_are_rejected(tmp_path):
    file = coco(tmp_path, edit=change("images.0.file_name", "../../secret.png"))
    (tmp_path / "secret.png").write_bytes((tmp_path / "images/train/0.png").read_bytes())
    with pytest.raises(UserError, match=r"secret.png lies outside"):
        CocoImages(file, tmp_path / "images/train").read(0)


def test_image_size_mismatch_is_reported(tmp_path):
    file = coco(tmp_path, edit=change("images.0.width", 81))
    with pytest.raises(
        UserError,
        match=r"0.png: is 80x60 .after its EXIF orientation is applied., but 81x60 in .*instances_train.json",
    ):
        CocoImages(file, tmp_path / "images/train").read(0)


def test_invalid_utf8_is_rejected(tmp_path):
    """The annotation has a string category id, which disables the fast parser."""
    file = coco(tmp_path, edit=change("annotations.2.category_id", "7"))
    file.write_bytes(
        file.read_bytes().replace(b'"category_id": "7"', b'"note": "\xd4\x00", "category_id": "7"')
    )
    with pytest.raises(UserError, match="instances_train.json: not JSON"):
        CocoImages(file, tmp_path / "images/train")


def polygons(content):
    """Replace the objects of category 7 by polygons of two parts and leave the others unchanged."""
    for annotation in content["annotations"]:
        if annotation["category_id"] == 7:
            parts = [[5, 3, 15, 8, 12, 50, 5, 40], [30.5, 41.5, 44.5, 41.5, 44.5, 55.5]]
            annotation |= dict(segmentation=parts, bbox=[5, 3, 39.5, 52.5])


@pytest.mark.parametrize(
    "options",
    [{"hflip": 1.0}, {"vflip": 1.0, "min_size": 120, "max_size": 180}, {"scale_jitter": (0.5, 2.0)}, {}],
    ids=["flipped", "upside down", "cropped", "resized"],
)
def test_polygons_are_rasterized_at_final_size(tmp_path, options):
    """Results match masks passed through the same transforms, except for border pixels."""
    coco(tmp_path, edit=polygons)
    found = data(tmp_path, batch_size=1, **options)
    images = found.open("train")
    assert images.source.as_outlines and "outlines" in images.source.read(1)[1]
    for index in range(4):
        for seed in range(5):
            both = []
            for as_outlines in (True, False):
                images.source.as_outlines = as_outlines
                torch.manual_seed(seed)
                both.append(images[index])
            (image, ours), (other, theirs) = both
            assert torch.equal(image, other) and ours.keys() == theirs.keys()
            if len(ours["labels"]) != len(theirs["labels"]):  # only one variant keeps the corner of an object
                continue
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=2.5, rtol=0)
            for a, b in zip(ours["masks"].bool(), theirs["masks"].bool(), strict=True):
                border = 2 * (a.any(0).sum() + a.any(1).sum()) + 8
                assert (a != b).sum() <= border


def test_flipped_polygons_match_flipped_masks(tmp_path):
    coco(tmp_path)
    images = data(tmp_path, hflip=1.0, vflip=1.0, min_size=70, max_size=70).open("train")
    image, target = images[1]  # 50x70, not resized; a square polygon and an RLE mask
    assert image.shape == (3, 70, 50) and target["boxes"].tolist()[0] == [20, 30, 40, 60]
    inside = torch.zeros(70, 50, dtype=torch.uint8)
    inside[30:60, 20:40] = 1
    assert torch.equal(target["masks"][0], inside)
    coco(tmp_path / "polygons", edit=polygons)
    images = data(tmp_path / "polygons", hflip=1.0, vflip=1.0, min_size=70, max_size=70).open("train")
    assert torch.equal(images[1][1]["masks"][0], inside)
