"""``python -m crossformer_vision``: the same as the command ``crossformer``."""

import sys

from crossformer_vision.cli import main

sys.exit(main())
