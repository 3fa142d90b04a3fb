"""The norm of a DoRA layer: digits kept under cancellation, and never that of other weights."""

from itertools import product

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.trainer import grad_checkpoint

from dora_mlx.kernels import frozen_product
from dora_mlx.kernels.frozen_product import (
    SharedReading,
    row_shape,
    shares_reading,
    use_blocked_products,
    weight_rows,
)
from dora_mlx.kernels.row_norm import ColumnNorm, RowNorm, Update, may_cancel, safe_norms
from dora_mlx.layers import DoRAConv2d, DoRAEmbedding, DoRALinear, DoRASwitchLinear, hoisted_norms
from dora_mlx.layers import linear as linear_layers


def as64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense64(base):
    return as64(weight_rows(base, 0, row_shape(base)[0], mx.float32))


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

KINDS = [
    pytest.param(DoRALinear, lambda: nn.Linear(64, 24, bias=False), id="linear"),
    pytest.param(DoRALinear, lambda: nn.Linear(64, 24).to_quantized(32, 4), id="quantized"),
    pytest.param(DoRAEmbedding, lambda: nn.Embedding(24, 64), id="embedding"),
    pytest.param(DoRAConv2d, lambda: nn.Conv2d(6, 24, 3), id="convolution"),
    pytest.param(DoRASwitchLinear, lambda: SwitchLinear(64, 24, 3), id="experts"),
]


def is_right(layer, norm=None):
    update = layer._update()
    change = as64(update.a) @ as64(update.b)
    total = dense64(layer.base) + layer.scale * change.swapaxes(-1, -2).reshape(
        row_shape(layer.base)
    )
    expected = np.linalg.norm(total, axis=0 if isinstance(layer, DoRAEmbedding) else 1)
    actual = as64(layer.norm() if norm is None else norm).reshape(-1)
    return np.allclose(actual, expected, rtol=1e-5)


def moved(layer, by=0.3):
    layer.lora_b = layer.lora_b + by * mx.random.normal(layer.lora_b.shape)
    return layer


@pytest.mark.parametrize(("kind", "make_base"), KINDS)
def test_norm_follows_every_way_of_loading(kind, make_base):
    layer = moved(kind.from_base(make_base(), rank=3))
    model = nn.Sequential(layer)
    assert is_right(layer)
    # The base, by load_weights: the sums of squares belong to the weights before.
    other = {f"layers.0.base.{k}": v for k, v in make_base().parameters().items()}
    model.load_weights(list(tree_flatten(other)), strict=False)
    assert is_right(layer)
    with hoisted_norms(model):
        assert is_right(layer)
    # The base as a whole, as nn.quantize replaces it.
    layer.base = make_base()
    assert is_right(layer)
    # The adapter.
    model.load_weights([("layers.0.lora_b", 2 * layer.lora_b)], strict=False)
    assert is_right(layer)
    model.eval()
    assert is_right(layer)
    model.train()
    assert is_right(layer)


def test_sums_of_squares_outlast_gradients_of_a_model_that_is_an_argument(monkeypatch):
    # mx.value_and_grad puts other arrays into it for the call, as it does into every argument.
    model, x = Net(bits=4), mx.random.normal((10, 32))
    monkeypatch.setattr(RowNorm, "_sum_squares", lambda self: pytest.fail("computed again"))
    for step in (hoisted_step, plain_step):
        step(model, optim.SGD(0.02), x)
        assert all(is_right(layer) for layer in model.layers)


def test_sums_of_squares_made_within_a_gradient_keep_nothing_else():
    # All of W dequantized is 4 MiB.
    layer = packed_layer(width=1024, out=1024)
    other = nn.Linear(1024, 1024).to_quantized(64, 4)
    x = mx.random.normal((5, 1024))
    mx.eval(layer.parameters(), other.parameters(), x)
    layer.base.update({name: other[name] for name in ("weight", "scales", "biases")})
    held = []

    def loss(layer, x):
        before = mx.get_active_memory()
        y = layer(x).sum()
        held.append(mx.get_active_memory() - before)
        return y

    nn.value_and_grad(layer, loss)(layer, x)
    assert max(held) < 2**20
    assert is_right(layer)


def test_quantizing_an_adapted_model_is_seen():
    layer = moved(DoRALinear.from_base(nn.Linear(64, 24, bias=False)))
    nn.quantize(nn.Sequential(layer), 32, 2)
    assert isinstance(layer.base, nn.QuantizedLinear)
    assert is_right(layer)


def test_changing_weights_within_a_block_is_an_error():
    layer = moved(DoRALinear.from_base(nn.Linear(64, 24)))
    model = nn.Sequential(layer)
    for change in (
        lambda: moved(layer),
        lambda: model.load_weights([("layers.0.lora_a", 2 * layer.lora_a)], strict=False),
        lambda: layer.base.update({"weight": 2 * layer.base.weight}),
    ):
        with pytest.raises(RuntimeError, match="changed within"), hoisted_norms(model):
            change()
        assert layer._hoisted_norm is None
        assert is_right(layer)


class Net(nn.Module):
    def __init__(self, bits=None):
        super().__init__()
        mx.random.seed(2)
        self.layers = [nn.Linear(32, 32) for _ in range(3)]
        if bits:
            nn.quantize(self, 32, bits)
            use_blocked_products(self)
        self.layers = [moved(DoRALinear.from_base(layer, rank=3), by=0.03) for layer in self.layers]

    def __call__(self, x):
        for layer in self.layers:
            x = mx.tanh(layer(x))
        return x


def loss_of(model, x):
    return mx.square(model(x) - 1).sum()


def run_steps(step, bits=None, count=4):
    """Losses of training steps; ``step(model, optimizer, x)`` returns one."""
    model, optimizer = Net(bits), optim.SGD(0.02)
    mx.random.seed(9)
    losses = [step(model, optimizer, mx.random.normal((10, 32))).item() for _ in range(count)]
    assert all(is_right(layer) for layer in model.layers)
    return losses


def plain_step(model, optimizer, x):
    loss, gradients = nn.value_and_grad(model, loss_of)(model, x)
    optimizer.update(model, gradients)
    return loss


def hoisted_step(model, optimizer, x):
    with hoisted_norms(model):
        loss, gradients = nn.value_and_grad(model, loss_of)(model, x)
        mx.eval(loss, gradients)
    optimizer.update(model, gradients)
    return loss


def accumulated_step(model, optimizer, x):
    with hoisted_norms(model):
        function = nn.value_and_grad(model, loss_of)
        first, gradients = function(model, x[:5])
        second, more = function(model, x[5:])
    optimizer.update(
        model,
        {
            "layers": [
                {k: a[k] + b[k] for k in ("lora_a", "lora_b", "magnitude")}
                for a, b in zip(gradients["layers"], more["layers"], strict=True)
            ]
        },
    )
    return first + second


def compiled_steps(hoist, state):
    """A step whose gradient is compiled once and then run in one block after another."""
    compiled = None

    def step(model, optimizer, x):
        nonlocal compiled

        def by_state(x):
            return nn.value_and_grad(model, loss_of)(model, x)

        def by_parameters(parameters, x):
            def loss(parameters):
                model.update(parameters)
                return loss_of(model, x)

            return mx.value_and_grad(loss)(parameters)

        if compiled is None:
            compiled = (
                mx.compile(by_state, inputs=model.state) if state else mx.compile(by_parameters)
            )
        parameters = model.trainable_parameters()

        def call():
            return compiled(x) if state else compiled(parameters, x)

        if hoist:
            with hoisted_norms(model):
                loss, gradients = call()
                mx.eval(loss, gradients)
                model.update(parameters)
        else:
            loss, gradients = call()
        model.update(parameters)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
        return loss

    return step


WAYS = {
    "hoisted": lambda: hoisted_step,
    "accumulated": lambda: accumulated_step,
    "compiled-state": lambda: compiled_steps(hoist=False, state=True),
    "compiled-state-hoisted": lambda: compiled_steps(hoist=True, state=True),
    "compiled-parameters": lambda: compiled_steps(hoist=False, state=False),
    "compiled-parameters-hoisted": lambda: compiled_steps(hoist=True, state=False),
}


# With 4 bits and ten rows the norm shares the product's reading of W. Compiling for the CPU is
# slow, so of the compiled ways only the one that a constant norm would break is tried with both.
@pytest.mark.parametrize(
    ("way", "bits"), [*product(WAYS, [None]), *product(list(WAYS)[:2] + list(WAYS)[-1:], [4])]
)
def test_every_way_of_training_uses_the_norm_of_the_step(way, bits):
    # A norm kept from the first step, as a constant of a compiled one, changes the second loss.
    np.testing.assert_allclose(run_steps(WAYS[way](), bits), run_steps(plain_step, bits), rtol=1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_function_compiled_after_other_calls_of_a_block_gives_no_stale_norm(checkpoint):
    # Its trace finds the norms of the block, which would stay in it as constants.
    model, x = Net(), mx.random.normal((10, 32))

    def loss(parameters, x):
        model.update(parameters)
        return loss_of(model, x)

    gradient = mx.value_and_grad(mx.checkpoint(loss) if checkpoint else loss)
    compiled = mx.compile(gradient)

    def loss_by(function, copied):
        parameters = model.trainable_parameters()
        given = tree_map(lambda a: a + 0, parameters) if copied else parameters
        mx.eval(given)
        with hoisted_norms(model):
            mx.eval(model(x))
            loss, _ = function(given, x)
            model.update(parameters)
            return loss.item()

    assert loss_by(compiled, True) == pytest.approx(loss_by(gradient, True), rel=1e-5)
    for layer in model.layers:
        moved(layer, by=0.03)
    assert np.isfinite(loss_by(gradient, True))
    assert np.isnan(loss_by(compiled, True))
    # With the very arrays of the block MLX sees it.
    parameters = model.trainable_parameters()
    with pytest.raises(ValueError, match="uncaptured"):
        loss_by(mx.compile(lambda *given: gradient(*given)), False)
    model.update(parameters)


@pytest.mark.parametrize("change", ["lora_b", "base"])
def test_a_function_compiled_over_everything_has_the_norms_of_every_block(change):
    layer = moved(DoRALinear.from_base(nn.Linear(32, 24), rank=3))
    x = mx.random.normal((5, 32))
    by_state = mx.compile(lambda x: layer(x), inputs=layer.state)

    def both():
        with hoisted_norms(layer):
            expected = layer(x)
            return expected, by_state(x)

    for _ in range(2):
        expected, found = both()
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)
        if change == "base":
            layer.base.weight = layer.base.weight + mx.random.normal((24, 32))
        moved(layer)


@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_gradient_checkpointing_uses_the_norm_of_the_step(bits):
    class Block(DoRALinear):
        pass

    def step(model, optimizer, x):
        for layer in model.layers:
            layer.__class__ = Block
        return hoisted_step(model, optimizer, x)

    expected = run_steps(plain_step, bits)
    grad_checkpoint(Block.from_base(nn.Linear(2, 2)))
    np.testing.assert_allclose(run_steps(step, bits), expected, rtol=1e-5)


def test_asking_for_the_norm_does_not_run_the_backward_of_a_checkpoint():
    # To evaluate A in the backward of mx.checkpoint runs all of the backward before it.
    layer = moved(DoRALinear.from_base(nn.Linear(512, 512)))
    calls = []

    def forward(parameters, x):
        layer.update(parameters)
        calls.append(layer._block.usable)
        return layer(x)

    def loss(parameters):
        return mx.checkpoint(forward)(parameters, mx.ones((2, 512))).sum()

    with hoisted_norms(layer):
        mx.grad(loss)(layer.trainable_parameters())
    assert calls == [None, True]


# Norms at first use: what is known without reading W, and what shares the product's reading.


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
    safe = packed_layer()
    with hoisted_norms(nn.Sequential(safe, cancels)):
        assert safe._hoisted_norm is None, "nothing to read W for before the first call"
        weight = weight_rows(cancels.base, 0, 96, mx.float32)
        errors, kappa = relative_errors(cancels.norm(), weight, update)
    assert kappa.max() > 100
    assert (errors <= np.where(kappa <= 100, 5e-7 * kappa, 2e-7 * np.sqrt(kappa))).all()


def packed_layer(width=256, out=96, bits=4):
    mx.random.seed(6)
    base = nn.Linear(width, out).to_quantized(64, bits)
    return moved(DoRALinear.from_base(base, rank=3), by=0.03)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_shared_reading_computes_the_same_product_bit_for_bit(bits, monkeypatch):
    # Blocks of 20 rows: 96 rows leave a last block that is not full.
    monkeypatch.setattr(frozen_product, "BLOCK_VALUES", 20 * 256)
    layer = packed_layer(bits=bits)
    x = mx.random.normal((2, 5, 256))
    assert shares_reading(x, layer.base)
    reading = SharedReading(layer.base, layer.lora_a)
    assert mx.array_equal(reading.product(x), frozen_product.frozen_product(x, layer.base))
    expected = dense64(layer.base) @ as64(layer.lora_a)
    np.testing.assert_allclose(as64(reading.constant_product), expected, atol=1e-5)


def test_sixteen_bit_activations_do_not_round_the_norm():
    layer = packed_layer()
    x = mx.random.normal((10, 256)).astype(mx.bfloat16)
    assert not shares_reading(x, layer.base)
    with hoisted_norms(layer):
        layer(x)
        assert is_right(layer, layer._hoisted_norm)


def test_a_block_reads_the_weight_once_for_all_its_norms(monkeypatch):
    # Micro-batches, and the second forward of mx.checkpoint, find the norm of the first call.
    layer = packed_layer()
    readings = []

    class Counted(SharedReading):
        def __init__(self, *arguments):
            readings.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(linear_layers, "SharedReading", Counted)

    def loss(parameters, x):
        def forward(parameters, x):
            layer.update(parameters)
            return layer(x)

        return mx.checkpoint(forward)(parameters, x).square().sum()

    parameters = layer.trainable_parameters()
    with hoisted_norms(layer):
        for _ in range(3):
            mx.eval(mx.value_and_grad(loss)(parameters, mx.random.normal((9, 256))))
        layer.update(parameters)
    assert len(readings) == 1
    layer(mx.random.normal((9, 256)))
    assert len(readings) == 2, "outside of a block every forward has a norm of its own"


def test_a_norm_that_a_compiled_function_was_first_to_need_can_be_used_after_it():
    # Its trace has no values, and a norm that hung on x would have none afterwards.
    layer = packed_layer()
    x = mx.random.normal((9, 256))
    expected = layer(x)
    with hoisted_norms(layer):
        assert mx.allclose(mx.compile(layer)(x), expected, rtol=1e-5, atol=1e-5)
        assert mx.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_does_not_bring_the_dequantized_weight_with_it(monkeypatch):
    # Blocks of 256 KiB; all of W dequantized is 4 MiB.
    monkeypatch.setattr(frozen_product, "BLOCK_VALUES", 2**16)
    layer = packed_layer(width=1024, out=1024)
    x = mx.random.normal((8, 1024))

    def peak(function):
        gradient = mx.value_and_grad(lambda x: function(x).square().sum())
        mx.eval(gradient(x))
        before = mx.get_active_memory()
        limit = mx.set_memory_limit(before + 2**18)
        mx.reset_peak_memory()
        mx.eval(gradient(x))
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - before

    without_norm = peak(lambda x: frozen_product.frozen_product(x, layer.base))
    assert peak(layer) < without_norm + 2**20
