"""Which machine this is, in a few words."""

import functools
import os
import platform
import subprocess
import sys


@functools.cache
def description() -> str:
    """Such as ``Apple M3 Max · 64 GB``."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # What a maker calls 64 GB is 64 times 2^30 bytes.
    return f"{_chip()} · {memory / 2**30:.0f} GB"


def _chip() -> str:
    if sys.platform != "darwin":
        return platform.machine()
    asked = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or platform.machine()
