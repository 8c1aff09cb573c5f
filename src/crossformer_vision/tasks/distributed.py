"""Gathering of Python objects from all processes of a run."""

from typing import TypeVar

from torch import distributed

Item = TypeVar("Item")


def gather_lists(items: list[Item]) -> list[Item]:
    """Concatenate the lists of all processes, in each process. Without several processes, the list itself."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    gathered: list[list[Item]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
