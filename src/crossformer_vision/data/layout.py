"""Infer the task and the format of the labels from the layout of a data folder."""

from pathlib import Path

from crossformer_vision.data.images import EXTENSIONS, is_hidden
from crossformer_vision.data.readers.yolo import find_names_file

FORMATS = {"coco": "COCO", "yolo": "YOLO", "voc": "Pascal VOC"}
"""Formats of object labels, and their names in messages."""


def infer_task(root: Path) -> tuple[str, str]:
    """Infer a task from a folder's layout.

    Args:
        root: Folder of the data, or a file that describes them.

    Returns:
        ``"classification"``, ``"detection"`` or ``"segmentation"``, and the reason, which names the file or
        folder found. Folders of an unknown layout are treated as class folders.
    """
    if root.suffix == ".csv":
        return "classification", "lists images and their classes"
    found = find_label_format(root)
    if found is not None and found[0] == "coco":
        return "detection", found[1]
    if (root / "leftImg8bit").is_dir():
        return "segmentation", "leftImg8bit/ holds class maps"
    if any((root / "VOCdevkit").glob("VOC*/SegmentationClass")):
        return "segmentation", "VOCdevkit/ holds class maps"
    if has_class_maps(root):
        return "segmentation", "annotations/ holds class maps of images/"
    if found is not None:
        return "detection", found[1]
    return "classification", "its folders are treated as classes"


def find_label_format(root: Path) -> tuple[str, str] | None:
    """Format of object labels.

    Args:
        root: Folder of the data, or ``data.yaml``.

    Returns:
        A key of ``FORMATS``, and the reason; ``None`` if there are no object labels.
    """
    if root.is_file():
        return ("yolo", "describes YOLO labels") if find_names_file(root) else None
    for pattern in ("annotations/instances_*.json", "*/_annotations.coco.json"):
        if file := _first(root, pattern):
            return "coco", f"{file} is a COCO file"
    for pattern in ("labels/*.txt", "labels/*/*.txt", "*/labels/*.txt"):
        if file := _first(root, pattern):
            return "yolo", f"{file} holds YOLO labels"
    names_file = find_names_file(root)
    if names_file is not None and names_file.suffix != ".txt":
        return "yolo", f"{names_file.name} describes YOLO labels"
    splits = ("train/*.xml", "valid/*.xml", "val/*.xml")
    for pattern in ("Annotations/*.xml", "VOCdevkit/VOC*/Annotations/*.xml", *splits):
        if file := _first(root, pattern):
            return "voc", f"{file} holds Pascal VOC labels"
    return None


def find_map_format(root: Path) -> str:
    """Format of data for segmentation: ``maps``, or ``coco`` or ``yolo`` for objects that are rendered.

    Args:
        root: Folder of the data, or ``data.yaml``.
    """
    found = find_label_format(root)
    if found is None or found[0] == "voc":
        return "maps"
    return "maps" if found[0] == "yolo" and has_class_maps(root) else found[0]


def _first(root: Path, pattern: str) -> str | None:
    """First path below a folder that matches a pattern."""
    return min((path.relative_to(root).as_posix() for path in root.glob(pattern)), default=None)


def has_class_maps(root: Path) -> bool:
    """Whether ``images/`` and ``annotations/`` exist, with images in the latter or a list of classes."""
    if not ((root / "images").is_dir() and (root / "annotations").is_dir()):
        return False
    if (root / "classes.json").is_file() or (root / "objectInfo150.txt").is_file():
        return True
    return any(
        path.suffix.lower() in EXTENSIONS and not is_hidden(path.relative_to(root))
        for path in (root / "annotations").rglob("*")
    )
