"""The loss that is written down: cross-entropy over the trained tokens, and nothing else.

``plain_loss_sum`` is the definition. ``ChunkedLoss`` computes the same without ever holding the
logits of a sequence: only positions with a trained token reach the output layer, a chunk at a
time, and each chunk's gradient is taken while its logits are there.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dora_mlx.data.batches import Batch
from dora_mlx.kernels.device import on_cpu
from dora_mlx.training import dear_exponentials
from dora_mlx.training.packed_attention import attention_arguments

# Logits alive at a time: 32 MiB in float32.
_CHUNK_VALUES = 1 << 23
# On the CPU every chunk dequantizes the output layer's weight once more in each direction.
_CPU_CHUNK_VALUES = 1 << 24
# Fewer rows would read the output layer's weight more often than it pays.
_SMALLEST_CHUNK = 64
# How far the two may differ relative to the loss; summing in another order explains far less.
_AGREEMENT = 1e-2
# The proof needs full logits; these are no more than a chunk of the loss has.
_PROOF_ROWS, _PROOF_TOKENS = 2, 16


class LossSum(Protocol):
    """Sum of the cross-entropies of a batch's trained tokens, a float32 scalar.

    A sum and not a mean, so that micro-batches add up: the mean over the trained tokens of the
    global batch is the sum of their sums over the sum of their counts.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """``model`` maps ``[batch, length]`` tokens to ``[batch, length, vocabulary]`` logits."""
        ...


def plain_loss_sum(model: nn.Module, batch: Batch) -> mx.array:
    """The loss by its definition, through the logits of every position."""
    arguments = attention_arguments(model, batch)
    logits = model(mx.array(batch.inputs), **arguments).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.array(batch.targets))
    # Not losses * weights: an infinite loss on a masked token would make the sum NaN.
    return mx.where(mx.array(batch.weights) > 0, losses, 0).sum()


class ChunkedLoss:
    """The same loss through the body of an mlx-lm model and its output layer in chunks.

    The output layer must be frozen: its gradient is not computed. It is the model's own code that
    runs, with the body replaced by values that are already there, so tied, untied and quantized
    heads, logit scales and soft caps need no knowledge of theirs here.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> mx.array:
        """The loss sum of ``batch``; in training mode with its gradient."""
        positions = np.flatnonzero(batch.weights)
        hidden = model.model(mx.array(batch.inputs), **attention_arguments(model, batch))
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]
        targets = mx.array(batch.targets.reshape(-1)[positions])
        if not model.training:
            losses, _ = _chunk_by_chunk(model, hidden, targets, gradient=False)
            return losses
        return _loss_with_gradient(model, hidden, targets)


def best_loss(model: nn.Module, batch: Batch) -> tuple[LossSum, str | None]:
    """The chunked loss if it is proven equal on some of ``batch``, else the plain one and why."""
    reason = why_not_chunked(model)
    if reason is None:
        batch = excerpt(batch)
        with _evaluating(model):
            plain, chunked = plain_loss_sum(model, batch), ChunkedLoss()(model, batch)
        difference = abs(cast(float, (plain - chunked).item()))
        if difference <= _AGREEMENT * max(1.0, abs(cast(float, plain.item()))):
            return ChunkedLoss(), None
        reason = f"it gives {chunked.item():.4f} where the plain loss is {plain.item():.4f}"
    return plain_loss_sum, f"the output layer is not computed in chunks: {reason}"


def excerpt(batch: Batch) -> Batch:
    """The first rows of ``batch``, around their first trained token."""
    rows = batch.weights[:_PROOF_ROWS]
    first = int(np.flatnonzero(rows.any(axis=0))[0]) if rows.any() else 0
    start = max(0, first - _PROOF_TOKENS // 2)
    part = slice(_PROOF_ROWS), slice(start, start + _PROOF_TOKENS)
    segments = None if batch.segments is None else batch.segments[part]
    return Batch(batch.inputs[part], batch.targets[part], batch.weights[part], segments)


def why_not_chunked(model: nn.Module) -> str | None:
    """What in the structure of a model keeps its loss from being computed in chunks."""
    body = model.get("model")
    if not isinstance(body, nn.Module):
        return "the model has no body named 'model'"
    try:
        inspect.signature(body.__call__).bind(None)
    except TypeError:
        return "its body takes more than tokens"
    outside = {k: v for k, v in model.children().items() if k != "model"}
    head_trains = any(nn.Module.trainable_parameters(m) for m in _modules(outside))
    embedding = body.get("embed_tokens")
    if "lm_head" not in model and isinstance(embedding, nn.Module):
        head_trains = head_trains or bool(embedding.trainable_parameters())
    return "it is trained itself" if head_trains else None


def _modules(children: dict[str, Any]) -> Iterator[nn.Module]:
    return (child for child in children.values() if isinstance(child, nn.Module))


def _loss_with_gradient(model: nn.Module, hidden: mx.array, targets: mx.array) -> mx.array:
    """Loss sum whose gradient with respect to ``hidden`` was taken in the forward pass."""

    @mx.custom_function
    def loss(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return _chunk_by_chunk(model, hidden, targets, gradient=True)

    @loss.vjp
    def loss_vjp(
        hidden: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        return cotangents[0].astype(hidden.dtype) * outputs[1]

    value, _ = cast(tuple[mx.array, mx.array], loss(hidden))
    return value


def _chunk_by_chunk(
    model: nn.Module, hidden: mx.array, targets: mx.array, gradient: bool
) -> tuple[mx.array, mx.array]:
    """Loss sum of ``hidden`` ``[n, dims]``, and its gradient there (zeros without ``gradient``)."""

    def chunk_loss(hidden: mx.array, targets: mx.array) -> mx.array:
        return _cross_entropy_sum(_output_layer(model, hidden), targets, gradient)

    rows = loss_chunk(_vocabulary_size(model, hidden))
    total, gradients = mx.array(0.0), []
    for start in range(0, len(targets), rows):
        # Without the dependency all chunks would be computed side by side.
        part = mx.depends([hidden[start : start + rows]], [total])[0]
        labels = targets[start : start + rows]
        if gradient:
            loss, d_part = mx.value_and_grad(chunk_loss)(part, labels)
            total = total + mx.depends([loss], [d_part])[0]
            gradients.append(d_part)
        else:
            total = total + chunk_loss(part, labels)
    if not gradients:
        return total, mx.zeros_like(hidden)
    # The last logits go before the backward through the body begins.
    return total, mx.depends([mx.concatenate(gradients)], [total])[0]


def _cross_entropy_sum(logits: mx.array, targets: mx.array, gradient: bool) -> mx.array:
    """Sum over the rows of ``logits`` ``[n, vocabulary]``, with the gradient of just that."""
    if not on_cpu():
        # One kernel, which sums in float32 whatever it is given.
        return mx.fast.cross_entropy(logits, targets).sum()

    @mx.custom_function
    def value(logits: mx.array) -> tuple[mx.array, mx.array]:
        return dear_exponentials.cross_entropy(logits, targets)

    @value.vjp
    def gradient_of_value(_: mx.array, __: Any, outputs: tuple[mx.array, ...]) -> mx.array:
        # Nothing comes behind the sum, so its cotangent is one.
        return outputs[1]

    logits = logits.astype(mx.float32)
    if gradient:
        return cast(tuple[mx.array, mx.array], value(logits))[0]
    return dear_exponentials.cross_entropy(logits, targets)[0]


def loss_chunk(vocabulary: int) -> int:
    """Positions whose logits are computed together."""
    values = _CPU_CHUNK_VALUES if on_cpu() else _CHUNK_VALUES
    return max(_SMALLEST_CHUNK, values // vocabulary)


def _vocabulary_size(model: nn.Module, hidden: mx.array) -> int:
    # Shapes are known before anything is computed.
    return _output_layer(model, hidden[:1]).shape[-1]


def _output_layer(model: nn.Module, hidden: mx.array) -> mx.array:
    """Logits ``[n, vocabulary]`` of hidden states ``[n, dims]``, by the model's own code."""
    body = model["model"]
    # As a dictionary item: an attribute would change the order of the parameters.
    model["model"] = _Computed(body, hidden[None])
    try:
        # An index would be a copy, and zeros to put its gradient into.
        return cast(mx.array, model(mx.zeros((1, len(hidden)), mx.int32)).squeeze(0))
    finally:
        model["model"] = body


class _Computed:
    """Stands in for a model's body whose output is already there."""

    def __init__(self, body: nn.Module, output: mx.array):
        self._body = body
        self._output = output

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._output

    def __getattr__(self, name: str) -> Any:
        # A tied head is the body's embedding.
        return getattr(self._body, name)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
