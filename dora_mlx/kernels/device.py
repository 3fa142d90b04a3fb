"""Which device the layers build their operations for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

_assumed_cpu: ContextVar[bool | None] = ContextVar("assumed_cpu", default=None)


def on_cpu() -> bool:
    """Whether MLX runs on its CPU backend, or is assumed to."""
    assumed = _assumed_cpu.get()
    return mx.default_device().type == mx.DeviceType.cpu if assumed is None else assumed


@contextmanager
def assuming_device(cpu: bool) -> Iterator[None]:
    """Within the block, layers build the graph that they would on a CPU or on a GPU.

    For planning: what is built for another device than this one is not to be evaluated.
    """
    token = _assumed_cpu.set(cpu)
    try:
        yield
    finally:
        _assumed_cpu.reset(token)


def planning_for_cpu() -> bool:
    """Whether in ``assuming_device(cpu=True)``, where nothing is evaluated."""
    return _assumed_cpu.get() is True


def planning_for_gpu() -> bool:
    """Whether in ``assuming_device(cpu=False)``, where nothing is evaluated."""
    return _assumed_cpu.get() is False
