"""Writers of one small data set of objects in the formats of COCO, YOLO and Pascal VOC."""

import json

import yaml

from crossformer_vision.data.readers.digits import MultiScaleDigits

NAMES = [str(digit) for digit in range(10)]
SPLITS = {"train": 12, "val": 6}


def samples(split):
    """Images with integer boxes, as all three formats can express them, and rectangular polygons."""
    digits = MultiScaleDigits(split, SPLITS[split], 64, (1, 3), (0.2, 0.5), seed=3)
    for index in range(len(digits)):
        image, target = digits[index]
        yield f"{index:03d}", image, target["boxes"].astype(int).tolist(), target["labels"].tolist()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def corners(box):
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def write_coco(root):
    for split in SPLITS:
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
        for n, (name, image, boxes, labels) in enumerate(samples(split)):
            save(image, root / f"images/{split}/{name}.png")
            content["images"].append({"id": n, "file_name": f"{name}.png", "width": 64, "height": 64})
            for box, label in zip(boxes, labels, strict=True):
                x1, y1, x2, y2 = box
                entry = {"id": len(content["annotations"]), "image_id": n, "category_id": label}
                entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [corners(box)], "iscrowd": 0}
                content["annotations"].append(entry)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def write_yolo(root, polygons=False):
    for split in SPLITS:
        for name, image, boxes, labels in samples(split):
            save(image, root / f"images/{split}/{name}.png")
            rows = []
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
                values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
                if polygons:
                    values = corners((x1, y1, x2, y2))
                rows.append(" ".join([str(label), *(f"{v / 64:.8f}" for v in values)]))
            (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
            (root / f"labels/{split}/{name}.txt").write_text("\n".join(rows) + "\n")
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def write_voc(root):
    for split in SPLITS:
        stems = []
        for name, image, boxes, labels in samples(split):
            stems.append(f"{split}_{name}")
            save(image, root / f"JPEGImages/{stems[-1]}.png")
            objects = "".join(
                f"<object><name>{NAMES[label]}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)
            )
            size = "<size><width>64</width><height>64</height><depth>3</depth></size>"
            (root / "Annotations").mkdir(exist_ok=True)
            text = f"<annotation><filename>x.png</filename>{size}{objects}</annotation>"
            (root / f"Annotations/{stems[-1]}.xml").write_text(text)
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
    (root / "classes.json").write_text(json.dumps(NAMES))


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}
