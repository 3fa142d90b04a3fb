"""Transformer blocks that the backward computes again.

What it keeps is the input of a block, and maybe what is dear to compute in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.recomputation import recomputed
from dora_mlx.training.substitutes import standing_in

_bernoulli = mx.random.bernoulli


@contextmanager
def recomputed_blocks(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within the block, every transformer block of ``model`` is recomputed in the backward.

    Parameters and their names stay what they are; other models of the same classes are not
    touched.

    Args:
        model: Its blocks are ``model.layers``.
        keep: Whether what is dear in a block (``kernels/recomputation.py``) is kept: most of the
            memory of a block, and nearly all of its time. Without it this is gradient checkpointing
            (arXiv 1604.06174).
    """
    blocks: list[nn.Module] = model.layers
    classes = [type(block) for block in blocks]
    for block, original in zip(blocks, classes, strict=True):
        block.__class__ = _recomputed(original, keep)
    try:
        yield
    finally:
        for block, original in zip(blocks, classes, strict=True):
            block.__class__ = original


def _recomputed(original: type[nn.Module], keep: bool) -> type[nn.Module]:
    """A subclass of a block's class whose call is recomputed in the backward."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def forward(
            parameters: dict[str, Any], key: mx.array | None, *args: Any, **kwargs: Any
        ) -> Any:
            # Gradients flow to what is passed in, not to what the module holds.
            self.update(parameters)
            with nullcontext() if key is None else _drawing_from(mx.stop_gradient(key)):
                return original.__call__(self, *args, **kwargs)

        key = None
        if _drops_out(self):
            key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        return recomputed(forward, keep)(self.trainable_parameters(), key, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call})


def _drops_out(block: nn.Module) -> bool:
    # The name is MLX's, for the probability to keep a value.
    return any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in block.modules())


@contextmanager
def _drawing_from(key: mx.array) -> Iterator[None]:
    """Within the block, dropout draws what ``key`` says: the same whenever it is computed again.

    Its gradient would else be that of another mask than the loss has.
    """

    def draw(p: Any, shape: Any) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        return _bernoulli(p, shape, key=own)

    with standing_in(mx.random, {"bernoulli": draw}):
        yield
