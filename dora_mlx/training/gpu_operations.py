"""What is one operation on a GPU, for a plan that is made where it may be many."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx

from dora_mlx.kernels.device import on_cpu
from dora_mlx.training.substitutes import standing_in


@contextmanager
def planned_operations() -> Iterator[None]:
    """Within the block a plan for a GPU has norms and rotations as a GPU has them.

    They are one operation forward and one backward, which have other values here, in arrays of the
    right sizes, on every machine. The CPU makes them of many, with float32 arrays between them.
    """
    if on_cpu():
        yield
        return
    with standing_in(mx.fast, {"rms_norm": _norm, "layer_norm": _norm, "rope": _rope}):
        yield


def _norm(x: mx.array, weight: mx.array | None, *_: Any, **__: Any) -> mx.array:
    @mx.custom_function
    def forward(x: mx.array, weight: mx.array) -> mx.array:
        return mx.abs(x)

    @forward.vjp
    def backward(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        product = cotangent * x
        return product, product.reshape(-1, weight.size).sum(axis=0).reshape(weight.shape)

    return cast(mx.array, forward(x, mx.zeros(x.shape[-1:], x.dtype) if weight is None else weight))


def _rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return mx.abs(x)
