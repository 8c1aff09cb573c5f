"""Classification datasets loaded by name through timm (torchvision) or Hugging Face ``datasets``."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from timm.data.dataset_factory import create_dataset

from crossformer_vision.data.images import apply_orientation
from crossformer_vision.errors import UserError, missing_extra

CACHE = Path("~/.cache/crossformer-vision")


def _error(dataset: str, split: str, error: Exception) -> UserError:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"dataset '{dataset}', split '{split}': {message}")


class TimmImages:
    """A dataset that timm creates by name, such as ``torch/cifar10``.

    Args:
        dataset: Name of the dataset.
        root: Directory of its files. ``None`` for the cache directory.
        split: Name of the split.
        download: Download a torchvision dataset that is not in ``root``.

    Raises:
        UserError: If the dataset cannot be loaded.
    """

    def __init__(self, dataset: str, root: str | None, split: str, download: bool) -> None:
        try:
            self.dataset = create_dataset(
                dataset, root=root or str(CACHE.expanduser()), split=split, download=download
            )
        except Exception as error:
            raise _error(dataset, split, error) from error
        self.label = f"{dataset} {split}"
        reader = getattr(self.dataset, "reader", None)
        classes = getattr(self.dataset, "classes", None) or list(getattr(reader, "class_to_idx", None) or ())
        self.classes = [str(c) for c in classes or range(1 + max(self.read(i)[1] for i in range(len(self))))]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image and its class index."""
        image, label = self.dataset[index]
        return apply_orientation(image), int(label)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        return f"{self.label}, image {index}"


class HuggingFaceImages:
    """A Hugging Face dataset with a column of images and a column of classes.

    Classes are a ``ClassLabel`` column, integers from 0, or strings.

    Args:
        dataset: ``hfds/`` and the name of a repository or the path of a local folder.
        root: Cache directory. ``None`` for this library's own.
        split: Name of the split, such as ``train`` or ``test``.
        image_column: Column with the images. ``None`` if there is only one.
        label_column: Column with the classes. ``None`` for ``label``, or the only ``ClassLabel`` column.
        classes: Class names of the training split, to which the integers or strings of this split refer.
            Empty for the training split itself.

    Raises:
        UserError: If the dataset cannot be loaded, a column is missing or ambiguous, or a class is unknown.
    """

    def __init__(
        self,
        dataset: str,
        root: str | None,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise missing_extra(error, "huggingface") from None
        name = dataset.removeprefix("hfds/")
        datasets.disable_progress_bars()
        try:
            data = datasets.load_dataset(name, split=split, cache_dir=root or str(CACHE.expanduser()))
        except Exception as error:
            raise _error(dataset, split, error) from error
        features: dict[str, object] = data.features
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        self.image_column = _choose_column(dataset, "image", image_column, images, list(features))
        self.label_column = _choose_column(dataset, "label", label_column, labels, list(features))
        self.label = f"{dataset} {split}"
        self.dataset = data.select_columns([self.image_column, self.label_column])
        self.classes = self._class_names(features[self.label_column], list(classes))
        self._indices = {name: index for index, name in enumerate(self.classes)}

    def _class_names(self, kind: object, known: list[str]) -> list[str]:
        if names := getattr(kind, "names", None):
            return [str(name) for name in names]
        values = self.dataset.unique(self.label_column)
        if known:
            if unknown := [value for value in values if str(value) not in known]:
                raise UserError(f"{self.label}: class {unknown[0]!r} does not occur in the training split")
            return known
        if all(isinstance(value, int) and value >= 0 for value in values):
            return [str(value) for value in range(1 + max(values))]
        if all(isinstance(value, str) for value in values):
            return sorted(values)
        raise UserError(
            f"{self.label}: column '{self.label_column}' holds neither class indices nor names. "
            "Choose another one with --data.label_column"
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image and its class index."""
        row = self.dataset[index]
        value = row[self.label_column]
        return apply_orientation(row[self.image_column]), self._indices[value] if isinstance(
            value, str
        ) else int(value)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        return f"{self.label}, image {index}"


def _choose_column(
    dataset: str, kind: str, chosen: str | None, candidates: list[str], columns: list[str]
) -> str:
    """The column that an option names, or the only candidate.

    Args:
        dataset: Name of the dataset, for messages.
        kind: ``image`` or ``label``, the name of the option and of the usual column.
        chosen: Value of the option.
        candidates: Columns of the right type.
        columns: All columns.

    Raises:
        UserError: If the column does not exist, or no column or several columns qualify.
    """
    option = f"--data.{kind}_column"
    if chosen is None and kind in columns:
        chosen = kind
    if chosen is not None:
        if chosen not in columns:
            raise UserError(f"{option} {chosen}: {dataset} has the columns {', '.join(columns)}")
        if kind == "image" and chosen not in candidates:
            raise UserError(f"{dataset}: column '{chosen}' holds no images. Choose another one with {option}")
        return chosen
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(candidates or columns)
    raise UserError(f"{dataset}: which column holds the {kind}s? Choose with {option}: {listed}")
