"""The norm of a DoRA layer is never that of other weights, however it is trained."""

from itertools import product

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from adapted_norms import is_right, moved
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.trainer import grad_checkpoint

from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.kernels.row_norm import RowNorm
from dora_mlx.layers import DoRAConv2d, DoRAEmbedding, DoRALinear, DoRASwitchLinear, hoisted_norms

KINDS = [
    pytest.param(DoRALinear, lambda: nn.Linear(64, 24, bias=False), id="linear"),
    pytest.param(DoRALinear, lambda: nn.Linear(64, 24).to_quantized(32, 4), id="quantized"),
    pytest.param(DoRAEmbedding, lambda: nn.Embedding(24, 64), id="embedding"),
    pytest.param(DoRAConv2d, lambda: nn.Conv2d(6, 24, 3), id="convolution"),
    pytest.param(DoRASwitchLinear, lambda: SwitchLinear(64, 24, 3), id="experts"),
]


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
