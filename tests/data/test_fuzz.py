"""Short version of `make fuzz` with two seeds."""

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_or_raise_one_line_error(seed):
    assert fuzz(400, seed) == []
