"""Attention that stays within each example of a packed row, for the models of mlx-lm.

mlx-lm's models ask the key-value cache for their mask (``make_mask``) and for the position of
the first token (``offset``). A cache that stores nothing and answers with a block-diagonal
causal mask keeps examples apart without touching the model. Positions go on through the row:
rotary positions only enter as differences, so a constant offset changes nothing.

Whether a model plays by these rules is measured on the model itself before packing is used.
"""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dora_mlx.data.batches import Batch, make_batch, make_packed_batch
from dora_mlx.data.examples import Example

# How far packed and unpacked logits may differ, as a share of their spread: 16-bit rounding.
_AGREEMENT = 5e-2
_PROBE_LENGTHS = (19, 27, 22)


class PackedRows:
    """Stands in for a layer's key-value cache: keeps nothing, masks other examples.

    ``segments`` ``[batch, length]`` says which example a position belongs to.
    """

    offset = 0

    def __init__(self, segments: mx.array):
        self._segments = segments
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """``[batch, 1, length, length]`` bool: causal, within the example and the window."""
        if window_size not in self._masks:
            position = mx.arange(length)
            distance = position[:, None] - position[None]
            seen = distance >= 0
            if window_size is not None:
                seen = seen & (distance < window_size)
            same = self._segments[:, :, None] == self._segments[:, None, :]
            self._masks[window_size] = (same & seen)[:, None]
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values themselves: there is nothing before them."""
        return keys, values


def attention_arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model has to be called with besides the inputs of ``batch``."""
    if batch.segments is None:
        return {}
    # One for all layers, so that their masks are made once.
    return {"cache": [PackedRows(mx.array(batch.segments))] * len(model.layers)}


def why_not_packed(model: nn.Module) -> str | None:
    """Why examples cannot share a row with this model, or ``None`` if they can.

    Measured: what an example's neighbours are must change nothing at all in its logits, and
    these must be those of the example alone, up to rounding.
    """
    try:
        leak, difference = _probe(model)
    except (TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
        return f"its layers keep more than keys and values, or take no mask ({error})"
    if leak != 0:
        return f"an example changes the logits of its neighbour by {leak:.1e}"
    if not difference <= _AGREEMENT:
        return f"logits depend on where in a row an example is, by {difference:.0%} of their spread"
    return None


def _probe(model: nn.Module) -> tuple[float, float]:
    """Largest change of an example's logits by its neighbours, and mean one by its position.

    The second one as a share of the standard deviation of the logits.
    """
    training = model.training
    model.eval()
    try:
        vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
        random = np.random.default_rng(0)
        examples = [_example(random, vocabulary, length) for length in _PROBE_LENGTHS]
        changed = [_example(random, vocabulary, length) for length in _PROBE_LENGTHS[:2]]
        last = sum(len(example) - 1 for example in changed)
        packed, beside_others, alone = (
            _logits(model, make_packed_batch([row]))[0, start : start + len(examples[2]) - 1]
            for row, start in (
                (examples, last),
                ([*changed, examples[2]], last),
                ([examples[2]], 0),
            )
        )
        unpacked = _logits(model, make_batch([examples[2]]))[0, : len(examples[2]) - 1]
        leak = mx.abs(packed - beside_others).max()
        spread = mx.std(unpacked) + 1e-9
        difference = mx.maximum(mx.abs(packed - unpacked).mean(), mx.abs(alone - unpacked).mean())
        return cast(float, leak.item()), cast(float, (difference / spread).item())
    finally:
        model.train(training)


def _example(random: np.random.Generator, vocabulary: int, length: int) -> Example:
    tokens = random.integers(0, vocabulary, length, dtype=np.int32)
    return Example(tokens, np.arange(length) > 0)


def _logits(model: nn.Module, batch: Batch) -> mx.array:
    logits = model(mx.array(batch.inputs), **attention_arguments(model, batch))
    return cast(mx.array, logits.astype(mx.float32))
