"""`python -m crossformer_vision`, the same as the command `crossformer`."""

from crossformer_vision.cli import script

script()
