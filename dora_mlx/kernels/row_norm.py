"""Norms of the rows or columns of W + s (A B)^T without building the sum.

    ||w_j + s d_j||^2 = ||w_j||^2 + 2 s <w_j, d_j> + s^2 b_j^T (A^T A) b_j,    d_j = A b_j

With U = A^T W^T ``[rank, out]`` the cross term is sum_k B_kj U_kj, so one product of W with
``rank`` rows replaces the dequantized weight and the full ``out x in`` update. Columns, which an
embedding needs, are the same with A and B in each other's place and U = B W ``[rank, in]``.

Everything is float32: in bfloat16 a change of the norm below 0.4 % would be rounded away.

**Cancellation.** The three terms are rounded before they meet, so the relative error of a norm n
grows with the digits that cancel between them. It stays below about 5e-7 kappa, with

    kappa = (||w|| + s ||d||)^2 / n^2

(3e-6 kappa where a device multiplies float32 matrices in TF32). Vectors without a common
direction have kappa <= 2; beyond ``CANCELLATION_LIMIT`` an update undoes most of its row. Such
norms are taken from the sum itself by ``safe_norms``. Since n >= | ||w|| - s ||d|| |, the lengths
alone tell, without reading W, where kappa cannot be that large: ``may_cancel``.
``AdaptedNorm.factored`` cannot look at values, so that it can be compiled and differentiated,
and has the bound alone.

Where Metal runs, the norms of packed rows come from ``packed_row_norm``, which loses no digits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dora_mlx.kernels.frozen_product import frozen_product, frozen_product_transposed
from dora_mlx.kernels.frozen_weight import (
    BLOCK_VALUES,
    chosen_rows,
    leading_shape,
    row_blocks,
    weight_rows,
    weight_shape,
)
from dora_mlx.kernels.packed_row_norm import kernel_serves, packed_row_norm

CANCELLATION_LIMIT = 100.0
# Partial sums of this many squares keep float32 rounding near that of a pairwise sum.
_PARTIAL_SUM = 64
# Floor of a squared norm: rounding can push that of a nearly cancelling row below zero, and a
# row of zeros needs a norm to be divided by.
_SMALLEST_SQUARE = 1e-24


@dataclass(frozen=True)
class Update:
    """s (A B)^T, the low-rank update of a weight.

    Attributes:
        a: A ``[..., in, rank]``; the leading axis is that of the experts, if there are any.
        b: B ``[..., rank, out]``.
        scale: s.
    """

    a: mx.array
    b: mx.array
    scale: float

    def constant(self) -> "Update":
        """The same in float32 and without a gradient."""
        a, b = (mx.stop_gradient(factor).astype(mx.float32) for factor in (self.a, self.b))
        return Update(a, b, self.scale)

    def rows(self, chosen: slice | mx.array) -> mx.array:
        """Rows of the update, counted over all experts: ``[rows, in]`` in float32."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        if a.ndim == 2:
            return self.scale * (b[:, chosen].T @ a.T)
        if isinstance(chosen, slice):
            chosen = mx.arange(chosen.start, chosen.stop)
        expert, row = mx.divmod(chosen, b.shape[-1])
        return self.scale * (a[expert] @ b[expert, :, row][..., None]).squeeze(-1)


def updated_rows(base: nn.Module, update: Update, chosen: slice | mx.array) -> mx.array:
    """Rows of W + s (A B)^T: ``[rows, in]`` in float32."""
    return chosen_rows(base, chosen, mx.float32) + update.rows(chosen)


def evaluate(*arrays: mx.array) -> bool:
    """Evaluate arrays; false where they stand for later arguments, as inside ``mx.compile``."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def same_values(some: Sequence[mx.array], others: Sequence[mx.array]) -> bool | None:
    """Whether arrays have the same values; ``None`` where they have none, as in ``mx.compile``."""
    if len(some) != len(others):
        return False
    pairs = [(x, y) for x, y in zip(some, others, strict=True) if x is not y]
    if not pairs:
        return True
    equal = mx.stack([mx.array_equal(x, y, equal_nan=True) for x, y in pairs]).all()
    return bool(equal.item()) if evaluate(equal) else None


class AdaptedNorm(ABC):
    """``||W + s (A B)^T||`` of each row or column, for the W of one frozen layer.

    The sums of squares of W alone are kept as long as the arrays in ``base`` are those that they
    were computed from, or have their values, so loading or assigning other weights makes new sums.
    What this does not see is a write *into* an array, such as ``base.weight[0] = 1``.

    Args:
        base: The frozen layer that holds W.
    """

    def __init__(self, base: nn.Module):
        self.base = base
        self._sources: list[mx.array] = []
        self._square_sums = mx.zeros(0)

    def of(self, update: Update) -> mx.array:
        """The norms in the way that is best here, as constants of the backward pass.

        DoRA, arXiv 2402.09353, section 4.3: the norm follows the update but gets no gradient.
        """
        return self.factored(update)

    def without_update(self) -> mx.array:
        """``||W||``: what ``of`` gives for B = 0, bit for bit."""
        return mx.sqrt(mx.maximum(self.square_sums(), _SMALLEST_SQUARE))

    def factored(self, update: Update, cross: mx.array | None = None) -> mx.array:
        """The norms by the factored sum, as constants of the backward pass.

        Args:
            update: Of which the norms follow.
            cross: U, where it is there already.
        """
        return mx.sqrt(self._squares(update.constant(), cross)[0])

    def with_cancellation(self, update: Update) -> tuple[mx.array, mx.array]:
        """What ``of`` gives, bit for bit, and kappa of every norm; 0 where it loses no digits."""
        squares, update_squares = self._squares(update.constant())
        lengths = mx.sqrt(self.square_sums()) + mx.sqrt(mx.maximum(update_squares, 0))
        kappa = mx.square(lengths) / squares
        return mx.sqrt(squares), kappa

    def cancellation_bound(self, update: Update) -> mx.array:
        """What no kappa can exceed: a scalar. Of W it takes ``square_sums`` alone."""
        _, update_squares = self._factors(update.constant())
        of_rows, of_update = mx.sqrt(self.square_sums()), mx.sqrt(mx.maximum(update_squares, 0))
        least = mx.maximum(mx.abs(of_rows - of_update), math.sqrt(_SMALLEST_SQUARE))
        return mx.square((of_rows + of_update) / least).max()

    def square_sums(self) -> mx.array:
        """``||w||^2`` of every row or column: float32, added up in two levels."""
        sources = self.sources()
        # Of a model that is an argument of mx.value_and_grad, all arrays are replaced meanwhile.
        if same_values(sources, self._sources):
            return self._square_sums
        sums = mx.stop_gradient(self._sum_squares())
        if evaluate(sums):
            # Through NumPy: what is computed meanwhile keeps all that it was computed from.
            sums = mx.array(np.array(sums))
            self._sources, self._square_sums = sources, sums
        return sums

    def sources(self) -> list[mx.array]:
        """The arrays that W is made of: the objects themselves that the layer holds."""
        names = ("weight", "scales", "biases", "global_scale")
        return [self.base[name] for name in names if self.base.get(name) is not None]

    def _squares(self, update: Update, cross: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """``||w + s d||^2`` and ``||s d||^2``."""
        own, update_squares = self._factors(update)
        cross = self._cross(update) if cross is None else cross
        change = 2 * update.scale * (own * cross).sum(axis=-2) + update_squares
        return mx.maximum(self.square_sums() + change, _SMALLEST_SQUARE), update_squares

    def _factors(self, update: Update) -> tuple[mx.array, mx.array]:
        """The factor ``[..., rank, rows or columns]`` that tells them apart, and ``||s d||^2``."""
        shared, own = self._shared_and_own(update)
        squares = (own * ((shared @ shared.swapaxes(-1, -2)) @ own)).sum(axis=-2)
        return own, update.scale**2 * squares

    @abstractmethod
    def direct(self, update: Update, chosen: mx.array) -> mx.array:
        """Norms of W + s (A B)^T itself, in blocks of it: ``[n]`` float32.

        Args:
            update: Taken as a constant of the backward pass.
            chosen: Which norms: indices ``[n]``, counted over all experts.
        """

    @abstractmethod
    def _sum_squares(self) -> mx.array: ...

    @abstractmethod
    def _cross(self, update: Update) -> mx.array:
        """U ``[..., rank, rows or columns]``: the one thing that needs all of W."""

    @abstractmethod
    def _shared_and_own(self, update: Update) -> tuple[mx.array, mx.array]:
        """The factors of the update ``[..., rank, n]``: n counts the terms of a norm, the norms."""


class RowNorm(AdaptedNorm):
    """One norm per output: ``[out]`` or ``[experts, out]``."""

    def of(self, update: Update) -> mx.array:
        """As ``AdaptedNorm`` says."""
        if not kernel_serves(self.base):
            return super().of(update)
        norms = packed_row_norm(self.base, update.a, update.b, update.scale)
        return mx.maximum(norms, math.sqrt(_SMALLEST_SQUARE))

    def without_update(self) -> mx.array:
        """As ``AdaptedNorm`` says."""
        if not kernel_serves(self.base):
            return super().without_update()
        *experts, out, width = weight_shape(self.base)
        return self.of(Update(mx.zeros((*experts, width, 1)), mx.zeros((*experts, 1, out)), 1.0))

    def with_cancellation(self, update: Update) -> tuple[mx.array, mx.array]:
        """As ``AdaptedNorm`` says."""
        if not kernel_serves(self.base):
            return super().with_cancellation(update)
        norms = self.of(update)
        return norms, mx.zeros_like(norms)

    def cancellation_bound(self, update: Update) -> mx.array:
        """As ``AdaptedNorm`` says."""
        return mx.array(0.0) if kernel_serves(self.base) else super().cancellation_bound(update)

    def direct(self, update: Update, chosen: mx.array) -> mx.array:
        """As ``AdaptedNorm`` says."""
        update = update.constant()
        # With experts, every row of a block brings an A of its own.
        width = update.a.shape[-2] * (update.a.shape[-1] if update.a.ndim > 2 else 1)
        size = max(1, BLOCK_VALUES // width)
        norms = []
        for start in range(0, chosen.size, size):
            rows = updated_rows(self.base, update, chosen[start : start + size])
            norms.append(mx.linalg.norm(rows, axis=1))
            evaluate(norms[-1])
        return mx.concatenate(norms)

    def _sum_squares(self) -> mx.array:
        sums = []
        for start, stop in row_blocks(self.base):
            squares = mx.square(weight_rows(self.base, start, stop, mx.float32))
            if squares.shape[1] % _PARTIAL_SUM == 0:
                squares = squares.reshape(stop - start, -1, _PARTIAL_SUM).sum(axis=-1)
            sums.append(squares.sum(axis=-1))
            # One dequantized block alive at a time, where that can be had.
            evaluate(sums[-1])
        return mx.concatenate(sums).reshape(leading_shape(self.base))

    def _cross(self, update: Update) -> mx.array:
        return frozen_product(update.a.swapaxes(-1, -2), self.base)

    def _shared_and_own(self, update: Update) -> tuple[mx.array, mx.array]:
        return update.a.swapaxes(-1, -2), update.b


class ColumnNorm(AdaptedNorm):
    """One norm per input of W ``[out, in]``: ``[in]``."""

    def direct(self, update: Update, chosen: mx.array) -> mx.array:
        """As ``AdaptedNorm`` says."""
        update = update.constant()
        total = mx.zeros(chosen.shape)
        for start, stop in row_blocks(self.base):
            rows = updated_rows(self.base, update, slice(start, stop))
            total = total + mx.square(rows[:, chosen]).sum(axis=0)
            evaluate(total)
        return mx.sqrt(total)

    def _sum_squares(self) -> mx.array:
        total = mx.zeros(weight_shape(self.base)[1])
        for start, stop in row_blocks(self.base):
            total = total + mx.square(weight_rows(self.base, start, stop, mx.float32)).sum(axis=0)
            evaluate(total)
        return total

    def _cross(self, update: Update) -> mx.array:
        return frozen_product_transposed(update.b, self.base)

    def _shared_and_own(self, update: Update) -> tuple[mx.array, mx.array]:
        return update.b, update.a.T


def may_cancel(updates: Sequence[tuple[AdaptedNorm, Update]]) -> list[bool]:
    """For every layer, whether kappa of any of its norms may exceed ``CANCELLATION_LIMIT``.

    That is decided without reading W, at the price of one wait for the device. Inside
    ``mx.compile`` there are no values to look at, and the answer is no.
    """
    bounds = [norm.cancellation_bound(update) for norm, update in updates]
    if not bounds or not evaluate(*bounds):
        return [False] * len(bounds)
    return [cast(float, bound.item()) > CANCELLATION_LIMIT for bound in bounds]


def safe_norms(updates: Sequence[tuple[AdaptedNorm, Update]]) -> list[mx.array]:
    """Norms of many layers, evaluated together, none of which has lost its digits.

    Where kappa exceeds ``CANCELLATION_LIMIT``, a norm comes from the sum itself, whose relative
    error is about 1e-7 sqrt(kappa). Looking for such rows costs one maximum per layer and one
    wait for the device. Inside ``mx.compile`` there are no values to look at, and the norms are
    those of ``AdaptedNorm.of``.
    """
    pairs = [norm.with_cancellation(update) for norm, update in updates]
    if not pairs:
        return []
    norms = [norm for norm, _ in pairs]
    worst = mx.stack([kappa.max() for _, kappa in pairs])
    if not evaluate(worst, *norms):
        return norms
    for i in np.flatnonzero(np.array(worst) > CANCELLATION_LIMIT).tolist():
        norm, update = updates[i]
        chosen = mx.array(np.flatnonzero(np.array(pairs[i][1]) > CANCELLATION_LIMIT))
        flat = norms[i].flatten()
        flat[chosen] = norm.direct(update, chosen)
        norms[i] = flat.reshape(norms[i].shape)
    return norms
