"""The short form of `make fuzz`: some hundred damaged files, of two seeds."""

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_or_refused_in_one_line(seed):
    assert fuzz(400, seed) == []
