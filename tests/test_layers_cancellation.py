"""The norm of a DoRA layer keeps its digits where weight and update nearly cancel."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from float64 import as64
from mlx_lm.models.switch_layers import SwitchLinear

from dora_mlx.kernels.frozen_weight import weight_rows
from dora_mlx.kernels.row_norm import ColumnNorm, RowNorm, Update, may_cancel, safe_norms
from dora_mlx.layers import DoRALinear, hoisted_norms


def cancelling(left, width=512, out=96, rank=8, scale=2.0):
    """W and an update that leaves the share ``left`` of a third of its rows."""
    mx.random.seed(1)
    a, b = mx.random.normal((width, rank)), mx.random.normal((rank, out))
    rows = mx.random.normal((out, width))
    # s (A B)^T = -(1 - left) W
    undone = -scale / (1 - left) * (b.T @ a.T)
    weight = mx.where((mx.arange(out) % 3 == 0)[:, None], undone, rows)
    return weight, Update(a, b, scale)


def relative_errors(norm, weight, update):
    total = as64(weight) + update.scale * (as64(update.a) @ as64(update.b)).T
    expected = np.linalg.norm(total, axis=1)
    lengths = np.linalg.norm(as64(weight), axis=1)
    lengths += np.linalg.norm(total - as64(weight), axis=1)
    return np.abs(as64(norm).reshape(-1) / expected - 1), (lengths / expected) ** 2


@pytest.mark.parametrize("left", [0.5, 0.3, 0.1, 0.03, 0.01, 0.003])
def test_cancelling_rows_keep_their_digits(left):
    weight, update = cancelling(left)
    base = nn.Linear(512, 96, bias=False)
    base.weight = weight
    norm = RowNorm(base)
    errors, kappa = relative_errors(norm.factored(update), weight, update)
    assert (errors <= 5e-7 * kappa).all(), "the bound of the factored sum"
    (safe,) = safe_norms([(norm, update)])
    errors, kappa = relative_errors(safe, weight, update)
    # Below the limit the factored sum is kept, above it the error grows with the root only.
    assert (errors <= np.where(kappa <= 100, 5e-7 * kappa, 2e-7 * np.sqrt(kappa))).all()
    others = np.arange(96) % 3 > 0
    assert mx.array_equal(
        safe[mx.array(others.nonzero()[0])], norm.factored(update)[mx.array(others.nonzero()[0])]
    )


def test_cancelling_experts_and_columns_keep_their_digits():
    weight, update = cancelling(0.01)
    experts = SwitchLinear(512, 32, 3, bias=False)
    experts.weight = weight.reshape(3, 32, 512)
    a = mx.broadcast_to(update.a, (3, *update.a.shape))
    b = update.b.reshape(8, 3, 32).swapaxes(0, 1)
    (safe,) = safe_norms([(RowNorm(experts), Update(a, b, update.scale))])
    errors, kappa = relative_errors(safe, weight, update)
    assert safe.shape == (3, 32)
    assert (errors <= 2e-7 * np.sqrt(kappa) + 5e-6).all()
    embedding = nn.Embedding(512, 96)
    embedding.weight = weight.T
    flipped = Update(update.b.T, update.a.T, update.scale)
    (safe,) = safe_norms([(ColumnNorm(embedding), flipped)])
    errors, _ = relative_errors(safe, weight, update)
    assert (errors <= 2e-7 * np.sqrt(kappa) + 5e-6).all()


# Staleness. ``is_right`` compares with the norm of the weights as they are now, in float64.


@pytest.mark.parametrize("length", [0, 0.3, 0.8, 0.99, 1, 1.3, 3])
def test_no_norm_cancels_more_than_the_lengths_allow(length):
    # Whatever the direction: row 0 is undone as far as this length can, the others at random.
    mx.random.seed(4)
    a, b = mx.random.normal((64, 3)), mx.random.normal((3, 20))
    rows = mx.random.normal((20, 64))
    change = b.T @ a.T
    rows[0] = -change[0]
    ratio = mx.linalg.norm(rows, axis=1) / mx.linalg.norm(change, axis=1)
    base = nn.Linear(64, 20, bias=False)
    base.weight = rows
    norm, update = RowNorm(base), Update(a, b * ratio, length)
    _, kappa = norm.with_cancellation(update)
    bound = norm.cancellation_bound(update).item()
    assert kappa.max().item() <= bound * (1 + 1e-4)
    # Two lengths that are the same can leave nothing; all others leave something.
    assert may_cancel([(norm, update)]) == [length in (0.99, 1)]
    # The bound is no larger than it has to be: row 0 reaches it.
    if length < 0.9:
        assert kappa[0].item() == pytest.approx(bound, rel=1e-3)


def test_a_block_computes_norms_that_may_cancel_directly():
    weight, update = cancelling(0.01)
    base = nn.Linear(512, 96, bias=False)
    base.weight = weight
    cancels = DoRALinear.from_base(base.to_quantized(64, 8))
    cancels.lora_a, cancels.lora_b = update.a, update.b
    safe = DoRALinear.from_base(nn.Linear(256, 96, bias=False).to_quantized(64, 4))
    with hoisted_norms(nn.Sequential(safe, cancels)):
        assert safe._hoisted_norm is None, "nothing to read W for before the first call"
        weight = weight_rows(cancels.base, 0, 96, mx.float32)
        errors, kappa = relative_errors(cancels.norm(), weight, update)
    assert kappa.max() > 100
    assert (errors <= np.where(kappa <= 100, 5e-7 * kappa, 2e-7 * np.sqrt(kappa))).all()
