"""Class maps rendered from the polygons and masks of objects, such as those of COCO and YOLO files."""

import numpy as np
from numpy.typing import NDArray

from crossformer_vision.data.class_lists import IGNORED
from crossformer_vision.data.rasters import AnyImage, image_size
from crossformer_vision.data.readers.objects import ObjectImages
from crossformer_vision.errors import UserError

BACKGROUND = "background"
MAX_CLASSES = 253  # besides the background; 254 and 255 are reserved


class ObjectMaps:
    """Images with class maps of their objects. Pixels without an object are background.

    Smaller objects are drawn over larger ones. Crowds are ignored.

    Args:
        objects: Images and objects with masks.

    Raises:
        UserError: If there are more categories than values in a class map.
    """

    def __init__(self, objects: ObjectImages) -> None:
        self.objects = objects
        names = list(objects.categories.values())
        if len(names) > MAX_CLASSES:
            raise UserError(
                f"{objects.annotations}: has {len(names)} categories, but class maps at most {MAX_CLASSES}"
            )
        self.classes = [BACKGROUND, *(name for name in names if name != BACKGROUND)]
        self._names_by_label = [BACKGROUND, *names]
        self.reorder_classes(self.classes)

    def __len__(self) -> int:
        return len(self.objects)

    def reorder_classes(self, classes: list[str]) -> list[int]:
        """Reorder the classes.

        Args:
            classes: The same names in the new order.

        Returns:
            An empty list, as the files have no values of classes.
        """
        self.classes = classes
        self.table = np.array([classes.index(name) for name in self._names_by_label], np.uint8)
        return []

    def name(self, index: int) -> str:
        """Path of an image."""
        return self.objects.name(index)

    def read(self, index: int) -> tuple[AnyImage, NDArray[np.uint8]]:
        """An upright image and its class map, shape ``(H, W)``."""
        image, target = self.objects.read(index)
        width, height = image_size(image)
        class_map = np.full((height, width), self.table[0], np.uint8)
        masks = target["masks"].astype(bool)
        for n in np.argsort(-masks.sum((1, 2)), kind="stable"):
            class_map[masks[n]] = IGNORED if target["iscrowd"][n] else self.table[target["labels"][n]]
        return image, class_map
