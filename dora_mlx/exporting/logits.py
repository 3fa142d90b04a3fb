"""Logits of models on the same tokens, and how they differ."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from dora_mlx.exporting.prompts import Prompts
from dora_mlx.exporting.report import LogitReport

Logits = NDArray[np.float32]

# Root mean square of the logit difference over the spread of the logits. Rounding stays an order
# of magnitude below; one wrong tensor, permutation or frequency is an order of magnitude above.
LIMITS = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}


class VerificationError(RuntimeError):
    """An exported file is not the model that was exported."""


def coarser(one: mx.Dtype, other: mx.Dtype) -> mx.Dtype:
    """The type of the two that rounds more."""
    return max(one, other, key=LIMITS.__getitem__)


def logits_of(model: nn.Module, tokens: mx.array) -> tuple[Logits, mx.Dtype]:
    """Logits ``[B, L, vocab]`` of ``tokens`` ``[B, L]``, and the type they were computed in."""
    # Dropout would be a difference; the caller's mode is put back.
    training = model.training
    model.eval()
    try:
        logits = model(tokens)
        return np.array(logits.astype(mx.float32)), logits.dtype
    finally:
        model.train(training)


def compare_logits(
    reference: Logits, other: Logits, used: NDArray[np.bool_] | None = None
) -> LogitReport:
    """The difference of two arrays of logits ``[B, L, vocab]``.

    Args:
        reference: Of the model that is compared with.
        other: Of the model that is compared.
        used: ``[B, L]``, the positions that count; all by default.

    Raises:
        VerificationError: When a logit is not finite or the shapes differ.
    """
    if reference.shape != other.shape:
        raise VerificationError(f"logits are {other.shape} where {reference.shape} are expected")
    largest = squares = divergence = 0.0
    agreed = positions = values = 0
    moments = np.zeros(2)
    for a, b in _rows(used, reference, other):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise VerificationError("a logit is NaN or infinite")
        difference = b - a
        log_p, log_q = log_softmax(a), log_softmax(b)
        largest = max(largest, float(np.abs(difference).max()))
        squares += float(np.square(difference).sum())
        divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        moments += a.sum(), np.square(a).sum()
        positions += len(a)
        values += a.size
    mean, mean_square = moments / values
    return LogitReport(
        max_abs_logit_difference=largest,
        relative_rms=float(np.sqrt(squares / values / (mean_square - mean**2))),
        top1_agreement=agreed / positions,
        kl=divergence / positions,
    )


def check_rounding(difference: LogitReport, precision: mx.Dtype, place: Path) -> None:
    """Refuse more than what the rounding of ``precision`` makes of the logits of ``place``.

    Raises:
        VerificationError: With the figures.
    """
    limit = LIMITS[precision]
    # NaN is not above the limit either.
    if not difference.relative_rms <= limit:
        raise VerificationError(
            f"{place} computes something else than the model it was exported from: "
            f"{difference}, and relative_rms may be {limit}"
        )


def mean_loss(logits: Logits, prompts: Prompts) -> float | None:
    """Mean cross-entropy of the prompts' answers in nats; ``None`` if they have none of the data.

    ``logits`` ``[B, L, vocab]``.
    """
    trained = prompts.batch.weights > 0
    if not prompts.measures_loss or not trained.any():
        return None
    total = 0.0
    for row, chosen, targets in zip(logits, trained, prompts.batch.targets, strict=True):
        log_p = log_softmax(row[chosen].astype(np.float64))
        total -= float(log_p[np.arange(len(log_p)), targets[chosen]].sum())
    return total / int(trained.sum())


def change_kept(base: Logits, trained: Logits, exported: Logits, used: NDArray[np.bool_]) -> float:
    """How much of the change from base to trained is in that from base to exported.

    The projection of the second change on the first, over the first's length: 1 for the same
    change, 0 for none or one in another direction.

    A shift of all logits of a position changes no probability and is taken out. Where the
    trained model does not differ from its base there is nothing to lose, and all is kept.
    """
    both = of_trained = 0.0
    for a, b, c in _rows(used, base, trained, exported):
        first, second = b - a, c - a
        first -= first.mean(-1, keepdims=True)
        second -= second.mean(-1, keepdims=True)
        both += float((first * second).sum())
        of_trained += float(np.square(first).sum())
    return both / of_trained if of_trained else 1.0


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _rows(
    used: NDArray[np.bool_] | None, *arrays: Logits
) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """The same row of every array in float64, one at a time: all of them would not fit."""
    for index in range(len(arrays[0])):
        chosen = slice(None) if used is None else used[index]
        yield tuple(array[index][chosen].astype(np.float64) for array in arrays)
