"""The row-norm kernel: its source on the host against float64, and on a GPU where there is one."""

import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_host.cases import ROW_NORM_CASES, RowNormCase
from metal_host.exact import exact_update, exact_weight, to_float64
from metal_host.host_kernel import HostCompiler, HostKernel, shared_compiler

from dora_mlx.kernels import packed_row_norm as module
from dora_mlx.kernels.frozen_weight import weight_rows

on_host = pytest.mark.skipif(
    sys.platform != "linux", reason="the host program is for Linux; a Mac runs the kernel itself"
)
on_metal = pytest.mark.skipif(
    not mx.metal.is_available(), reason="no Metal here: the kernel itself did not run"
)

SCALE = 2.5
# Relative to ||w|| + s ||A B||: some float32 roundings of the values, at most 65 per element.
BOUND = 3e-7


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compiles the sources of all cases at once, which takes a quarter of the time."""
    sources: dict[str, None] = {}
    with pytest.MonkeyPatch.context() as patch:
        on_the_host(patch, sources=sources)
        for case in ROW_NORM_CASES:
            module.metal_packed_row_norm(case.base(), *case.update())
    shared_compiler().compile(list(sources))


def on_the_host(
    patch: pytest.MonkeyPatch, compiler: HostCompiler | None = None, **options: object
) -> None:
    """Let the calls of the kernel run on the host."""
    real, compiler = module._kernel, compiler or shared_compiler()
    patch.setattr(module, "_kernel", lambda mode: HostKernel(real(mode), compiler, **options))


def error(norms: mx.array, base: nn.Module, lora_a: mx.array, lora_b: mx.array) -> float:
    """Largest error of a norm, relative to ||w_j|| + s ||(A B)_j||."""
    weight, update = exact_weight(base), exact_update(lora_a, lora_b, SCALE)
    exact = np.linalg.norm(weight + update, axis=1)
    size = np.linalg.norm(weight, axis=1) + np.linalg.norm(update, axis=1)
    return float(np.max(np.abs(to_float64(norms) - exact) / size))


# Guards the float64 reference: MLX's own idea of how values are packed has the last word.
@pytest.mark.parametrize("case", ROW_NORM_CASES, ids=str)
def test_the_exact_weight_is_what_mlx_dequantizes(case: RowNormCase) -> None:
    base = case.base()
    rows = weight_rows(base, 0, case.outputs, mx.float32)
    np.testing.assert_allclose(np.array(rows), exact_weight(base), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ROW_NORM_CASES, ids=str)
def test_reference_is_the_float64_norm(case: RowNormCase) -> None:
    base, (lora_a, lora_b) = case.base(), case.update()
    norms = module.reference_packed_row_norm(base, lora_a, SCALE * lora_b)
    assert error(norms, base, lora_a, lora_b) < BOUND


# Guards the unpacking of every width, rows and inputs that fill no tile, and ranks that fill none.
@on_host
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", ROW_NORM_CASES, ids=str)
def test_kernel_on_the_host_is_the_float64_norm(
    case: RowNormCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (lora_a, lora_b) = case.base(), case.update()
    on_the_host(monkeypatch)
    norms = module.metal_packed_row_norm(base, lora_a, SCALE * lora_b)
    assert error(norms, base, lora_a, lora_b) < BOUND


# Guards a result that depends on which thread runs first, and reads before a buffer's start.
@on_host
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", ROW_NORM_CASES[::7], ids=str)
def test_kernel_does_not_depend_on_the_order_of_threads(
    case: RowNormCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (lora_a, lora_b) = case.base(), case.update()
    results = []
    for seed, at_end in ((0, True), (1, True), (2, False)):
        with monkeypatch.context() as patch:
            on_the_host(patch, seed=seed, at_end=at_end)
            results.append(np.array(module.metal_packed_row_norm(base, lora_a, lora_b)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


# Guards digits that are there only if the compiler does, or does not, fuse a product into a sum.
@on_host
@pytest.mark.parametrize("case", ROW_NORM_CASES[::13], ids=str)
def test_kernel_with_fused_products_is_the_float64_norm(
    case: RowNormCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, (lora_a, lora_b) = case.base(), case.update()
    on_the_host(monkeypatch, HostCompiler(tmp_path, contract=True))
    norms = module.metal_packed_row_norm(base, lora_a, SCALE * lora_b)
    assert error(norms, base, lora_a, lora_b) < BOUND
    alone = mx.zeros((case.inputs, 1)), mx.zeros((1, case.outputs))
    start = module.metal_packed_row_norm(base, lora_a, 0 * lora_b)
    assert mx.array_equal(start, module.metal_packed_row_norm(base, *alone))


def cancelling(case: RowNormCase, remainder: float) -> tuple[nn.Module, mx.array, mx.array]:
    """Rows w_j = c_j v, A = v and s B = -(1 - remainder) c: the sum is remainder W."""
    base = case.base()
    base.weight = mx.broadcast_to(base.weight[:1], base.weight.shape)
    base.scales = mx.broadcast_to(base.scales[:, :1], base.scales.shape)
    base.biases = -8 * base.scales
    lora_b = -(1 - remainder) / SCALE * to_float64(base.scales)[:, :1].T
    lora_a = exact_weight(base)[:1].T / to_float64(base.scales)[0, 0]
    return base, mx.array(lora_a).astype(mx.float32), mx.array(lora_b).astype(mx.float32)


# Guards the reason for the direct form: the factored one has no digit left at these rows.
@pytest.mark.parametrize("remainder", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("path", [pytest.param("metal", marks=on_host), "reference"])
def test_rows_that_nearly_cancel_keep_their_digits(
    path: str, remainder: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = RowNormCase("affine", 4, 64, mx.float16, 33, 4096, 1)
    base, lora_a, lora_b = cancelling(case, remainder)
    on_the_host(monkeypatch)
    norm = getattr(module, f"{path}_packed_row_norm")
    norms = to_float64(norm(base, lora_a, SCALE * lora_b))
    exact = np.linalg.norm(exact_weight(base) + exact_update(lora_a, lora_b, SCALE), axis=1)
    assert np.max(np.abs(norms / exact - 1)) < 5e-7 + 1e-7 / remainder


# Guards a gain that is not exactly 1 before the first step.
@on_host
@pytest.mark.parametrize("case", ROW_NORM_CASES[::11], ids=str)
def test_without_an_update_the_norm_is_that_of_the_weight_bit_for_bit(
    case: RowNormCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (lora_a, lora_b) = case.base(), case.update()
    on_the_host(monkeypatch)
    norms = module.metal_packed_row_norm(base, lora_a, 0 * lora_b)
    alone = mx.zeros((case.inputs, 1)), mx.zeros((1, case.outputs))
    assert mx.array_equal(norms, module.metal_packed_row_norm(base, *alone))


# Guards long rows, where a sum over one lane would lose digits, and rows of zeros.
@on_host
def test_long_rows_and_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RowNormCase("affine", 4, 64, mx.bfloat16, 2, 14336, 8)
    base, (lora_a, lora_b) = case.base(), case.update()
    base.scales[0], base.biases[0], lora_b[:, 0] = 0, 0, 0
    on_the_host(monkeypatch)
    norms = module.metal_packed_row_norm(base, lora_a, SCALE * lora_b)
    assert norms[0].item() == 0
    assert error(norms[1:], *rows_from(1, base, lora_a, lora_b)) < BOUND


def rows_from(
    start: int, base: nn.Module, lora_a: mx.array, lora_b: mx.array
) -> tuple[nn.Module, mx.array, mx.array]:
    for name in ("weight", "scales", "biases"):
        base[name] = base[name][start:]
    return base, lora_a, lora_b[:, start:]


# Guards an expert that is given another's weight, A or B, and nvfp4's scale of the whole tensor.
@pytest.mark.parametrize("mode", ["affine", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("path", [pytest.param("metal", marks=on_host), "reference"])
def test_experts_each_have_their_own(path: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, group = {"affine": (5, 64), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    case = RowNormCase(mode, bits, group, mx.float16, 35, 320, 9)
    parts = [replace(case, seed=seed) for seed in (1, 2, 3)]
    bases, updates = [part.base() for part in parts], [part.update() for part in parts]
    together = nn.Module()
    together.mode, together.bits, together.group_size = mode, bits, group
    for name in ("weight", "scales", "biases"):
        together[name] = mx.stack([base[name] for base in bases]) if name in bases[0] else None
    lora_a, lora_b = (mx.stack(factor) for factor in zip(*updates, strict=True))
    gains = mx.array([1.0, 1.0, 1.0])
    if mode == "nvfp4":
        gains = mx.array([0.5, 2.0, 3.0])
        together.global_scale = gains * 448 * 6
    on_the_host(monkeypatch)
    norm = getattr(module, f"{path}_packed_row_norm")
    norms = norm(together, lora_a, SCALE * lora_b)
    assert norms.shape == (3, 35)
    for expert, base in enumerate(bases):
        # ||g W + U|| = g ||W + U / g||
        gain, b = gains[expert], lora_b[expert] / gains[expert]
        assert error(norms[expert] / gain, base, lora_a[expert], b) < BOUND


# Guards a NaN in the weights that would silently become a number.
@on_host
def test_a_nan_weight_gives_a_nan_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RowNormCase("mxfp8", 8, 32, mx.uint8, 2, 32, 1)
    base = case.base()
    base.weight[0, 0] = 0x7F
    on_the_host(monkeypatch)
    norms = module.metal_packed_row_norm(base, *case.update())
    assert mx.isnan(norms).tolist() == [True, False]


# Guards an update in bfloat16 that would be multiplied by s in bfloat16.
@on_host
def test_the_op_takes_the_kernel_where_it_can_and_works_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = RowNormCase("affine", 4, 64, mx.bfloat16, 40, 320, 4)
    base, (lora_a, lora_b) = case.base(), (array.astype(mx.bfloat16) for array in case.update())
    on_the_host(monkeypatch)
    monkeypatch.setattr(module, "kernel_runs", lambda name, trial: True)
    monkeypatch.setattr(module, "reference_packed_row_norm", None)
    norms = module.packed_row_norm(base, lora_a, lora_b, SCALE)
    assert norms.dtype == mx.float32
    assert error(norms, base, lora_a, lora_b) < BOUND


# Guards a kernel that is called for what it cannot read, or for nothing where it cannot run.
@pytest.mark.parametrize("metal", [False, True])
def test_the_kernel_serves_packed_weights_where_metal_is(
    metal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "kernel_runs", lambda name, trial: metal)
    for case in ROW_NORM_CASES[::9]:
        assert module.kernel_serves(case.base()) == metal
    assert not module.kernel_serves(nn.Linear(4, 4))


# Guards "not implemented for CustomKernel" in training: the norm carries no gradient.
@pytest.mark.parametrize("metal", [False, True])
def test_the_op_is_a_constant_of_the_backward(
    metal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = RowNormCase("affine", 4, 64, mx.float32, 8, 64, 2)
    base, (lora_a, lora_b) = case.base(), case.update()
    monkeypatch.setattr(module, "kernel_runs", lambda name, trial: metal)

    def loss(a: mx.array, b: mx.array) -> mx.array:
        return (module.packed_row_norm(base, a, b, SCALE) * b.sum(axis=0)).sum()

    gradient = mx.grad(loss, argnums=(0, 1))
    # Tracing is enough to meet the kernel's missing gradient, and needs no Metal.
    mx.export_function(f"{tmp_path}/traced", gradient, lora_a, lora_b)
    if not metal:
        d_a, d_b = gradient(lora_a, lora_b)
        assert not d_a.any()
        np.testing.assert_allclose(d_b[0], module.packed_row_norm(base, lora_a, lora_b, SCALE))


@pytest.mark.metal
@on_metal
def test_kernel_on_metal_is_the_float64_norm() -> None:
    wrong = {}
    for case in ROW_NORM_CASES:
        base, (lora_a, lora_b) = case.base(), case.update()
        with mx.stream(mx.gpu):
            norms = module.metal_packed_row_norm(base, lora_a, SCALE * lora_b)
            mx.eval(norms)
        if not error(norms, base, lora_a, lora_b) < BOUND:
            wrong[str(case)] = error(norms, base, lora_a, lora_b)
    assert not wrong


@pytest.mark.metal
@on_metal
def test_the_op_runs_the_kernel_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ROW_NORM_CASES[0]
    monkeypatch.setattr(module, "reference_packed_row_norm", None)
    with mx.stream(mx.gpu):
        mx.eval(module.packed_row_norm(case.base(), *case.update(), SCALE))
