"""``crossformer check``: check data before training."""

import sys
from pathlib import Path
from typing import Literal

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.errors import UserError, check_range
from crossformer_vision.tools.data_check import check_data
from crossformer_vision.tools.data_check_report import format_summary, write_report


def check(
    data: str,
    /,
    *,
    task: Literal["classification", "detection", "segmentation"] | None = None,
    format: Literal["coco", "yolo", "voc", "maps"] | None = None,
    output: str = "check",
    max_images: int = 20000,
) -> None:
    """Check data before training: classes, images, labels, duplicates. Exit code 1 if training would fail.

    Args:
        data: Folder or file of the data, as for crossformer train.
        task: Task; inferred from the layout by default.
        format: Format of the labels; detected by default.
        output: Folder for the report, a page with pictures.
        max_images: Maximum number of images to read per split.
    """
    check_range("--max-images", max_images, 1)
    folder, root = Path(output), Path(data)
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--output {output}: lies inside the data. Choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "index.html").is_file():
        raise UserError(f"--output {output}: has other files than a report. Choose another folder")
    result = check_data(data, task, format, max_images)
    print(format_summary(result))
    print(f"report: {write_report(result, folder)}")
    if result.has_errors:
        sys.exit(1)


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(check, "check", arguments)
