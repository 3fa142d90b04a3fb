"""The loss that is written down: cross-entropy over the trained tokens, and nothing else."""

import mlx.core as mx
import mlx.nn as nn


def loss_sum(model: nn.Module, inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of the cross-entropies of the trained tokens, float32 scalar.

    Args:
        model: Maps ``[batch, length]`` tokens to ``[batch, length, vocabulary]`` logits.
        inputs: ``[batch, length]`` int32.
        targets: ``[batch, length]`` int32, the next tokens.
        weights: ``[batch, length]`` float32, 1 for a trained target and 0 for any other.

    A sum and not a mean, so that micro-batches add up: the mean over the trained tokens of the
    global batch is the sum of their sums over the sum of their counts.
    """
    logits = model(inputs).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, targets)
    # Not losses * weights: an infinite loss on a masked token would make the sum NaN.
    return mx.where(weights > 0, losses, 0).sum()
