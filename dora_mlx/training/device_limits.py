"""What this machine gives MLX, and holding a run to what it was planned to need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")


def memory_limit() -> int:
    """Bytes that MLX may hold in all.

    With Metal what the system recommends a GPU to work with, elsewhere what is free now and what
    MLX holds already.
    """
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return mx.get_active_memory() + _free_memory()


def _free_memory() -> int:
    """Bytes that can be had without pushing others out."""
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    # A container may have less than its machine.
    allowed = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return free if allowed == "max" else min(free, int(allowed))


@contextmanager
def memory_held_to(planned: int, counted: int) -> Iterator[None]:
    """Within the block MLX waits instead of running ahead once it holds ``counted`` bytes.

    It begins operations before the memory of earlier ones is free, which without a bound makes
    a peak half as large again and wins no time. The operation it is at comes on top. On a Mac the
    cache of free memory is kept within ``planned`` bytes, and these stay wired, so that they are
    never paged out.
    """
    before = mx.set_memory_limit(counted)
    cache = mx.set_cache_limit(planned)
    metal = mx.metal.is_available()
    wired = mx.set_wired_limit(min(planned, memory_limit())) if metal else 0
    try:
        yield
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(cache)
        if metal:
            mx.set_wired_limit(wired)
