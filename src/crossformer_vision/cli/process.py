"""Settings of the process that runs a command."""

import ctypes
import io
import os
import sys


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GiB of freed memory for the process.

    By default it returns large blocks to the system at once, and new ones cost a page fault per page: a tenth
    of a training step on a CPU (``docs/results/speed.md``). ``MALLOC_TRIM_THRESHOLD_`` or
    ``MALLOC_MMAP_THRESHOLD_`` in the environment disable this.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        m_trim_threshold, m_mmap_threshold = -1, -3  # constants of malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)


def replace_unencodable_characters() -> None:
    """Print characters that the terminal's encoding lacks, as in file names, as escape sequences."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
