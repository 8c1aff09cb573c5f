"""Name of the command as the user called it, for follow-up commands in messages."""

import shlex
import shutil
import sys
from pathlib import Path


def command_name() -> str:
    """The command as it can be typed here: ``crossformer``, a path, or ``python -m crossformer_vision``."""
    program = Path(sys.argv[0])
    if program.name not in ("crossformer", "crossformer.exe"):
        return f"{shlex.quote(sys.executable)} -m crossformer_vision"
    found = shutil.which("crossformer")
    if found and Path(found).resolve() == program.resolve():
        return "crossformer"
    try:
        return shlex.quote(str(program.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(program))
