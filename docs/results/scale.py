"""Time and memory of work on large data sets, compared with other libraries.

Usage: python docs/results/scale.py ROW

Rows: folder, coco, ap, validation, windows, sample, predict, outlines, photos, shards. All data are generated
in a temporary folder.
"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


def peak():
    """Memory peak of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def interleaved(rows, rounds=5):
    """Time functions in turn, and print the median seconds of each."""
    taken = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        print(f"{name}: {np.median(seconds):.3f} s")


def folder(at):
    """Find 256,000 images in 200 class folders."""
    from torchvision.datasets import ImageFolder

    from crossformer_vision.data.readers.folders import FolderImages

    for c in range(200):
        (at / f"n{c:08d}").mkdir()
        for i in range(1280):
            (at / f"n{c:08d}/{i}.JPEG").touch()
    interleaved({"FolderImages": lambda: FolderImages(at, []), "ImageFolder": lambda: ImageFolder(at)})


def coco(at):
    """Read annotations of 118,000 images and 860,000 objects.

    Further arguments: `masks` to read masks too, or `pycocotools` to measure that library.
    """
    rng = random.Random(0)
    with open(at / "big.json", "w", encoding="utf-8") as file:
        same = dict(width=640, height=480, license=1)
        images = [dict(id=i, file_name=f"{i:012d}.jpg", **same) for i in range(118_000)]
        categories = [dict(id=k, name=f"c{k}", supercategory="x") for k in range(1, 81)]
        lists = json.dumps(dict(images=images, categories=categories))
        file.write(f'{lists[:-1]}, "annotations": [')
        for m in range(860_000):
            x, y, w, h = rng.uniform(0, 500), rng.uniform(0, 400), rng.uniform(5, 120), rng.uniform(5, 70)
            corners = [(x + rng.random() * w, y + rng.random() * h) for _ in range(rng.randint(8, 36))]
            points = [round(v, 2) for corner in corners for v in corner]
            one = dict(segmentation=[points], area=w * h / 2, iscrowd=0, image_id=rng.randrange(118_000))
            one |= dict(bbox=[round(v, 2) for v in (x, y, w, h)], category_id=rng.randint(1, 80), id=m + 1)
            file.write(("," if m else "") + json.dumps(one))
        file.write("]}")
    (at / "images").mkdir()  # the reader checks that listed images exist
    for i in range(118_000):
        (at / f"images/{i:012d}.jpg").touch()
    before, start = peak(), time.perf_counter()
    if sys.argv[2:] == ["pycocotools"]:
        from pycocotools.coco import COCO

        COCO(str(at / "big.json"))
    else:
        from crossformer_vision.data.readers.coco import CocoImages

        CocoImages(at / "big.json", at / "images", masks=sys.argv[2:] == ["masks"], train=True)
    print(f"{time.perf_counter() - start:.1f} s, {peak() - before} MB increase of the memory peak")


def ap(at):
    """AP of 5,000 images with 100 boxes each."""
    from faster_coco_eval import COCO, COCOeval_faster

    from crossformer_vision.tasks.coco_metrics import CocoMetrics, _ignore, _to_annotations

    rng = np.random.default_rng(0)

    def objects(count):
        xy, wh = rng.uniform(0, 400, (count, 2)), rng.uniform(8, 200, (count, 2))
        boxes = torch.tensor(np.concatenate([xy, xy + wh], 1), dtype=torch.float32)
        return {"boxes": boxes, "labels": torch.tensor(rng.integers(1, 81, count))}

    found = [{**objects(100), "scores": torch.rand(100)} for _ in range(5000)]
    true = [{**objects(7), "iscrowd": torch.zeros(7), "area": torch.full((7,), 900.0)} for _ in range(5000)]

    sizes = [(640, 640)] * 5000

    def ours():
        metrics = CocoMetrics(["box"])
        metrics.update(found, true, sizes)
        return metrics.compute()

    ready = CocoMetrics(["box"])
    ready.update(found, true, sizes)
    keys = ("image_id", "category_id", "bbox", "score")
    results = [{k: a[k] for k in keys} for a in _to_annotations(ready.detections, "box")]
    truth = _to_annotations(ready.ground_truth, "box")

    def alone():
        reference = COCO()
        reference.dataset = {
            "images": [{"id": i} for i in range(5000)],
            "categories": [{"id": k} for k in range(1, 81)],
            "annotations": [dict(a) for a in truth],
        }
        reference.createIndex()
        found = reference.loadRes([dict(a) for a in results])
        evaluation = COCOeval_faster(reference, found, "bbox", print_function=_ignore)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    interleaved({"ours": ours, "faster-coco-eval alone": alone}, 3)


def validation(at):
    """Validation step for a 512x512 image, 150 classes, without the network, and argmax for comparison."""
    from crossformer_vision.tasks.segmentation import Segmentation

    task = Segmentation("semantic_fpn", "crossformer_nano", 150, width=16).eval()
    logits, labels = torch.randn(1, 150, 512, 512), torch.randint(0, 150, (1, 512, 512))
    task.net = torch.nn.Identity()
    task.net.forward = lambda images: logits.clone()
    task.plotted, type(task).evaluation_batches = [None] * 9, 1
    views = [torch.zeros(1, 3, 512, 512)]
    with torch.no_grad():
        interleaved(
            {
                "step": lambda: task.validation_step((views, labels), 1),
                "argmax and confusion matrix": lambda: task.confusion.update(
                    logits.clone().argmax(1), labels
                ),
            }
        )


def windows(at):
    """Memory peak of a class map, 2000x3000, 150 classes, relative to one float map of all classes.

    Further argument: `whole` for the whole image instead of windows.
    """
    from crossformer_vision.models.dense import windows

    before = peak()
    with torch.inference_mode():
        net = lambda images: images.new_zeros(1, 150, *images.shape[2:])  # noqa: E731
        windows.MAX_WHOLE_PIXELS = 1 << 40
        window = None if sys.argv[2:] == ["whole"] else 512
        windows.class_map(windows.segment(net, [torch.zeros(1, 3, 2000, 3000)], window=window))
    print(f"{(peak() - before) / (150 * 2000 * 3000 * 4 / 2**20):.2f}")


def sample(at):
    """Overhead of 320,000 samples, without decoding, transforms and workers."""
    from PIL import Image

    from crossformer_vision.data import sampling

    class Source:
        image = Image.new("RGB", (64, 64))

        def __len__(self):
            return 6400

        def read(self, index):
            return self.image, 0

    data = sampling.SeededDataset(sampling.ReadImages(Source(), lambda image, label: 0, False), 0)
    start = time.perf_counter()
    for k in range(0, 6400, 64):
        data.__getitems__([(1, k + i) for i in range(64)])
    print(f"{(time.perf_counter() - start) * 50:.1f} s")


def predict(at):
    """Predict a folder of 400 photos of 800x600."""
    from PIL import Image

    from crossformer_vision import load_predictor
    from crossformer_vision.inference.files import predict_files

    pixels = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    for count in (50, 400):
        (at / str(count)).mkdir()
        Image.fromarray(pixels).save(at / f"{count}/0.jpg")
        for i in range(1, count):
            (at / f"{count}/{i}.jpg").hardlink_to(at / f"{count}/0.jpg")
    predictor = load_predictor("crossformer_nano.cifar10", "cpu")
    predict_files(predictor, [str(at / "50")], at / "out")
    before, start = peak(), time.perf_counter()
    predict_files(predictor, [str(at / "400")], at / "out")
    print(f"{(time.perf_counter() - start) / 0.4:.1f} ms per image, {peak() - before} MB more for 350 images")


def photo(path, width, height):
    """Write scikit-learn's photo of a temple as a JPEG with the quality of a camera."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    Image.fromarray(load_sample_image("china.jpg")).resize((width, height)).save(path, quality=90)


def outlines(at):
    """Training image of Mask R-CNN: 640x480, 7 objects with 8 to 36 corners, to 1067x800, flips."""
    from pycocotools import mask as rle
    from torchvision import io, tv_tensors
    from torchvision.transforms import v2

    from crossformer_vision.data.detection import DetectionData

    rng = np.random.default_rng(0)
    for folder in ("annotations", "images/train"):
        (at / folder).mkdir(parents=True)
    photo(at / "images/train/0.jpg", 640, 480)
    annotations = []
    for n in range(7):
        corners = rng.integers(8, 37)
        angle, (x, y), (w, h) = (
            np.sort(rng.uniform(0, 6.28, corners)),
            rng.uniform(120, 350, 2),
            rng.uniform(20, 110, 2),
        )
        points = np.stack([x + w * np.cos(angle), y + h * np.sin(angle)], 1).round(2)
        box = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
        same = dict(id=n + 1, image_id=1, category_id=1, iscrowd=0, area=box[2] * box[3])
        annotations.append(dict(same, bbox=box, segmentation=[points.flatten().tolist()]))
    images = [dict(id=1, file_name="0.jpg", width=640, height=480)]
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="thing")])
    (at / "annotations/instances_train.json").write_text(json.dumps(content))
    rows = {}
    for name, as_outlines in (("polygons, rasterized once", True), ("masks", False)):
        data = DetectionData(str(at), detector="mask_rcnn", num_workers=0).open("train")
        data.source.as_outlines = as_outlines
        rows[name] = lambda data=data: [data[0] for _ in range(20)]
    peer = v2.Compose([
        v2.RandomShortestSize([800], 1333, antialias=False), v2.RandomHorizontalFlip(),
        v2.SanitizeBoundingBoxes(),
        v2.ToDtype({torch.Tensor: torch.float32, "others": None}, scale=True),
    ])  # fmt: skip

    def torchvision():
        for _ in range(20):
            image = io.decode_image(str(at / "images/train/0.jpg"))
            drawn = [rle.decode(rle.merge(rle.frPyObjects(a["segmentation"], 480, 640))) for a in annotations]
            boxes = torch.tensor([a["bbox"] for a in annotations])
            boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(480, 640))
            masks = tv_tensors.Mask(torch.from_numpy(np.stack(drawn)))
            peer(tv_tensors.Image(image), dict(boxes=boxes, masks=masks, labels=torch.ones(7)))

    print("20 images each:")
    interleaved({**rows, "torchvision v2": torchvision}, 9)


def photos(at):
    """Training image of a classifier: 500x375 to 224x224, plain and with RandAugment."""
    from PIL import Image
    from torchvision import io
    from torchvision.transforms import v2

    from crossformer_vision import ClassificationData

    for c in "ab":
        for part in ("train", "val"):
            (at / f"{part}/{c}").mkdir(parents=True)
            photo(at / f"{part}/{c}/0.jpg", 500, 375)
    path = str(at / "train/a/0.jpg")
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    rows = {}
    for name, policy, more in (
        ("plain", None, []),
        ("RandAugment", "rand-m9-mstd0.5-inc1", [v2.RandAugment(2, 9)]),
    ):
        data = ClassificationData("crossformer_small", str(at), auto_augment=policy, num_workers=0).open(
            "train"
        )
        crop = v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC)
        peer = v2.Compose([crop, v2.RandomHorizontalFlip(), *more, *end])
        rows[f"ours, {name}"] = lambda data=data: [data[0] for _ in range(40)]
        rows[f"torchvision v2 on tensors, {name}"] = lambda peer=peer: [
            peer(io.decode_image(path)) for _ in range(40)
        ]
    rows["decoding only, PIL"] = lambda: [Image.open(path).convert("RGB") for _ in range(40)]
    rows["decoding only, torchvision"] = lambda: [io.decode_image(path) for _ in range(40)]
    print("40 images each:")
    interleaved(rows, 9)


def shards(at):
    """Open two shards of 20,000 small images and read them in random order, compared with a folder."""
    import io
    import tarfile

    from crossformer_vision.data.readers.folders import FolderImages
    from crossformer_vision.data.readers.shards import ShardImages

    photo(at / "one.jpg", 64, 48)
    content = (at / "one.jpg").read_bytes()
    for c in range(2):
        (at / f"folder/{c}").mkdir(parents=True)
    for number in range(2):
        with tarfile.open(at / f"{number}.tar", "w") as tar:
            for n in range(20_000):
                for name, part in ((f"{n:06d}.jpg", content), (f"{n:06d}.cls", str(n % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
                (at / f"folder/{n % 2}/{number}-{n:06d}.jpg").write_bytes(content)
    paths = [at / "0.tar", at / "1.tar"]
    sources = {"shards": ShardImages(paths, []), "folder": FolderImages(at / "folder", [])}
    order = np.random.default_rng(0).permutation(40_000)[:2000].tolist()
    rows = {f"read 2,000, {k}": lambda s=s: [s.read(n)[0].load() for n in order] for k, s in sources.items()}
    interleaved({
        "open 40,000 images in shards": lambda: ShardImages(paths, []),
        "open 40,000 images in a folder": lambda: FolderImages(at / "folder", []),
        **rows,
    })  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        globals()[sys.argv[1]](Path(temporary))
