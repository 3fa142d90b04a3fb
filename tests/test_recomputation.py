"""Functions that are computed again in the backward, and what is kept for it."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from dora_mlx.kernels.recomputation import dear, kept, product, recomputed
from dora_mlx.layers import DoRALinear
from dora_mlx.training.graph import trace


@pytest.mark.parametrize("keep", [False, True])
def test_recomputed_function_keeps_value_and_gradients(keep):
    weight = mx.random.normal((5, 5))

    def function(x, y):
        return mx.sin(x) * dear(lambda y: y @ weight)(mx.exp(y))

    x, y = mx.random.normal((2, 5)), mx.random.normal((2, 5))
    grads = [
        mx.grad(lambda x, y, f=f: f(x, y).sum(), argnums=(0, 1))(x, y)
        for f in (function, recomputed(function, keep))
    ]
    for plain, again in zip(*grads, strict=True):
        assert mx.array_equal(plain, again)
    single = mx.grad(lambda x: recomputed(nn.silu, keep)(x).sum())(x)
    assert mx.allclose(single, mx.grad(lambda x: nn.silu(x).sum())(x))


def test_what_is_kept_within_what_is_kept_is_kept_once():
    asked = []

    def function(x):
        def inner():
            asked.append("inner")
            return [mx.exp(x)]

        def outer():
            asked.append("outer")
            return [2 * kept(inner)[0]]

        return mx.stop_gradient(kept(outer)[0]) * x

    x = mx.array(0.5)
    gradient = mx.grad(recomputed(function, keep=True))(x)
    assert gradient.item() == pytest.approx(2 * mx.exp(x).item())
    assert asked == ["outer", "inner"]


@pytest.mark.parametrize(("first", "again"), [(1, 2), (2, 1)])
def test_a_function_that_is_another_the_second_time_is_refused(first, again):
    calls = [again, first]

    def function(x):
        for _ in range(calls.pop()):
            x = dear(mx.exp)(x)
        return x

    with pytest.raises(RuntimeError, match="more products" if again > first else "fewer products"):
        mx.grad(recomputed(function, keep=True))(mx.array(0.5))


def before(graph, name):
    """The operations that an array of a graph waits for, its own included."""
    maker = {output: node for node in graph.nodes for output in node.outputs}
    found, waiting = [], [name]
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node not in found:
            found.append(node)
            waiting += node.inputs
    return found


def test_a_block_is_computed_again_when_its_cotangent_is_there_and_not_earlier():
    def step(x):
        return list(mx.vjp(lambda x: mx.sin(recomputed(mx.exp)(x)), [x], [mx.ones(8)])[1])

    graph = trace(step, [mx.zeros(8)])
    again = [
        node
        for node in graph.nodes
        if node.kind == "Exp" and "Cos" in {n.kind for n in before(graph, node.outputs[0])}
    ]
    assert len(again) == 1


def test_a_backward_goes_on_when_it_has_the_gradients_of_an_adapter():
    layer = DoRALinear.from_base(nn.Linear(16, 12, bias=False), rank=3)
    names, arrays = zip(*tree_flatten(layer.trainable_parameters()), strict=True)

    def step(x, *arrays):
        def output(x, *arrays):
            layer.update(dict(zip(names, arrays, strict=True)))
            return [layer(x)]

        return list(mx.vjp(output, [x, *arrays], [mx.ones((5, 12))])[1])

    graph = trace(step, [mx.zeros((5, 16)), *arrays])
    first, *others = graph.outputs
    assert len(others) == 3
    earlier = before(graph, first)
    for other in others:
        work = [node for node in before(graph, other) if node.kind in ("Matmul", "Reduce")]
        assert work
        assert all(node in earlier for node in work)


# In 16 bits ours rounds the sum of both gradients of x, and a plain one each of them too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.bfloat16, 2**-7)])
def test_product_has_the_gradients_of_a_product(dtype, tolerance):
    mx.random.seed(0)
    x, a = (mx.random.normal(shape).astype(dtype) for shape in ((2, 7, 16), (16, 3)))
    cotangents = mx.random.normal((2, 7, 3)).astype(dtype), mx.random.normal(x.shape).astype(dtype)

    def through(multiply):
        def objective(x, a):
            results = multiply(x, a)
            return sum((own * d).sum() for own, d in zip(results, cotangents, strict=True))

        return mx.grad(objective, argnums=(0, 1))(x, a)

    for ours, theirs in zip(through(product), through(lambda x, a: (x @ a, x)), strict=True):
        assert ours.dtype == dtype
        assert mx.abs(ours - theirs).max() <= tolerance * mx.abs(theirs).max()
