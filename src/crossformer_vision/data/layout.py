"""Infer the task from the layout of a data folder."""

from pathlib import Path

from crossformer_vision.data.images import EXTENSIONS, is_hidden
from crossformer_vision.errors import UserError

CONVERT = "Convert the labels to COCO (annotations/instances_train.json), which many labeling tools export"


def infer_task(root: Path) -> tuple[str, str]:
    """Infer a task from a folder's layout.

    Args:
        root: Folder of the data.

    Returns:
        ``"classification"``, ``"detection"`` or ``"segmentation"``, and the reason, which names the file or
        folder found. Folders of an unknown layout are treated as class folders.

    Raises:
        UserError: If the labels are in a detection format that is not supported.
    """
    for pattern in ("annotations/instances_*.json", "*/_annotations.coco.json", "_annotations.coco.json"):
        if file := next(iter(sorted(root.glob(pattern))), None):
            return "detection", f"{file.relative_to(root)} is a COCO file"
    for name in ("leftImg8bit", "VOCdevkit"):
        if (root / name).is_dir():
            return "segmentation", f"{name}/ holds class maps"
    if has_class_maps(root):
        return "segmentation", "annotations/ holds class maps of images/"
    if file := find_yolo_labels(root):
        raise UserError(
            f"{root}: {file.relative_to(root)} holds detection labels in YOLO's format, which cannot be "
            f"read. {CONVERT}"
        )
    if file := next(root.glob("Annotations/*.xml"), None):
        raise UserError(
            f"{root}: {file.relative_to(root)} holds detection labels in Pascal VOC's format, which cannot "
            f"be read. {CONVERT}"
        )
    return "classification", "its folders are treated as classes"


def has_class_maps(root: Path) -> bool:
    """Whether ``annotations/`` has images below it, as ``images/`` has, or the classes are listed."""
    if not ((root / "images").is_dir() and (root / "annotations").is_dir()):
        return False
    if (root / "classes.json").is_file() or (root / "objectInfo150.txt").is_file():
        return True
    return any(
        path.suffix.lower() in EXTENSIONS and not is_hidden(path.relative_to(root))
        for path in (root / "annotations").rglob("*")
    )


def find_yolo_labels(root: Path) -> Path | None:
    """A file of labels in YOLO's format, or the ``data.yaml`` that describes them."""
    for pattern in ("labels/*.txt", "labels/*/*.txt", "*/labels/*.txt"):
        if file := next(iter(sorted(root.glob(pattern))), None):
            return file
    described = root / "data.yaml"
    return described if described.is_file() else None
