"""The host program that runs Metal kernels: it computes what Metal defines, and catches errors."""

import shutil
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_host import host_kernel
from metal_host.cases import GAIN_SHAPES, GAIN_TYPES, ROW_NORM_CASES, RowNormCase, gain_arguments
from metal_host.host_kernel import HostKernel, KernelFault, check_address_spaces, shared_compiler

from dora_mlx.kernels import gain_backward, packed_row_norm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the host program is for Linux")

# Two threadgroups; the rows, the inputs and the rank fill no tile.
CASE = RowNormCase("affine", 4, 64, mx.float32, 37, 320, 9)


def with_error(patch: pytest.MonkeyPatch, right: str, wrong: str) -> mx.array:
    """Norms from a kernel in which ``right`` was replaced by ``wrong``."""

    def edit(source: str) -> str:
        assert right in source
        return source.replace(right, wrong, 1)

    real = packed_row_norm._kernel
    for at_end in (True, False):
        options = {"seed": 1, "at_end": at_end, "edit": edit}
        patch.setattr(
            packed_row_norm,
            "_kernel",
            lambda mode, options=options: HostKernel(real(mode), shared_compiler(), **options),
        )
        norms = packed_row_norm.metal_packed_row_norm(CASE.base(), *CASE.update())
    return norms


BARRIER = "threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
STAGE = "for (int e = member"
USE = "for (int k = 0; k < ranks"
SUM = "const float total = metal::simd_sum(squares[i]);"

# What is right, what is wrong, and what is said about it.
PLANTED = {
    "reads rows past the last one": (
        "metal::min(first_row + i, outputs - 1)",
        "first_row + i",
        "past the end of weight",
    ),
    "reads a word past the last one": (
        "shift + VALUES * BITS > 32 ?",
        "true ?",
        "past the end of weight",
    ),
    "reads before the first input": (
        "inputs + start + c)",
        "inputs + start + c - 1)",
        "before the start of lora_a",
    ),
    "writes past the last norm": (
        "lane == 0 && first_row + i < outputs",
        "lane == 0",
        "past the end of norms",
    ),
    "leaves threadgroup memory": (
        "c % VALUES) *",
        "c % VALUES + 1) *",
        "outside of threadgroup memory",
    ),
    "leaves an array of a thread": (
        "i < ROWS; ++i) {\n        // Rows past",
        "i <= ROWS; ++i) {\n // Rows",
        "undefined integer arithmetic or array index",
    ),
    "stages a tile that others still use": (f"{BARRIER}\n            {STAGE}", STAGE, "data race"),
    "uses a tile that others still stage": (
        f"{BARRIER}\n            {USE}",
        USE,
        "data race|nobody wrote",
    ),
    "stages two values in one place": (
        "PITCH = LANES + 1",
        "PITCH = LANES - 1",
        "data race: writes what another thread wrote",
    ),
    "has a barrier for other memory": (
        "mem_flags::mem_threadgroup",
        "mem_flags::mem_device",
        "does not order threadgroup memory",
    ),
    "leaves a barrier to the others": (
        BARRIER,
        f"if (column < inputs) {{ {BARRIER} }}",
        "divergence",
    ),
    "leaves a sum to the others": (
        SUM,
        f"if (lane > 3) {{ return; }} {SUM}",
        "divergence: 32 threads wait .* 224 threads returned",
    ),
    "meets another sum than the others": (
        SUM,
        f"if (lane > 15) {{ metal::simd_sum(1.0f); }}\n{SUM}",
        "divergence: simd_sum at line .* meets simd_sum at line",
    ),
    "shifts by the whole width": ("if (shift > 0)", "if (shift >= 0)", "undefined integer"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_caught(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, message = PLANTED[error]
    with pytest.raises(KernelFault, match=message):
        with_error(monkeypatch, right, wrong)


# Guards the outputs' first contents: an element that no thread writes must not look like a norm.
def test_an_output_that_is_left_out_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = with_error(monkeypatch, "first_row + i < outputs)", "first_row + i < outputs - 1)")
    assert mx.isnan(norms).tolist() == [False] * (CASE.outputs - 1) + [True]


# Guards the comparison itself: a wrong formula gives other numbers, and no fault.
def test_a_wrong_formula_changes_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = with_error(monkeypatch, "float(code), bias)", "float(code), -bias)")
    right = packed_row_norm.reference_packed_row_norm(CASE.base(), *CASE.update())
    assert mx.abs(norms / right - 1).max().item() > 1e-3


def test_a_source_that_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="g\\+\\+ refused a kernel"):
        with_error(monkeypatch, "float squares[ROWS]", "float squares[ROWZ]")


def test_a_missing_compiler_is_an_error_and_no_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_kernel.shutil, "which", lambda _: None)
    with pytest.raises(AssertionError, match=r"need g\+\+.*apt install g\+\+"):
        with_error(monkeypatch, "uint low", "uint  low")


@cache
def all_sources() -> tuple[str, ...]:
    """The sources of every kernel for every combination of types."""
    sources: dict[str, None] = {}
    norm, gain = packed_row_norm._kernel, gain_backward._kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            packed_row_norm,
            "_kernel",
            lambda mode: HostKernel(norm(mode), shared_compiler(), sources=sources),
        )
        patch.setattr(
            gain_backward,
            "_kernel",
            lambda: HostKernel(gain(), shared_compiler(), sources=sources),
        )
        for case in ROW_NORM_CASES:
            packed_row_norm.metal_packed_row_norm(case.base(), *case.update())
        for shape in GAIN_SHAPES:
            for dtype in GAIN_TYPES:
                gain_backward.metal_gain_backward(*gain_arguments(shape, dtype))
    return tuple(sources)


needs_clang = pytest.mark.skipif(
    shutil.which("clang++") is None,
    reason="no clang++: device, constant and threadgroup were not checked as distinct spaces",
)


# Guards small inputs, which MLX puts into constant memory, and pointers that g++ cannot tell apart.
@needs_clang
def test_address_spaces_are_respected(tmp_path: Path) -> None:
    sources = all_sources()
    assert any("const constant uint32_t* weight" in source for source in sources)
    assert any("const device uint32_t* weight" in source for source in sources)
    check_address_spaces(sources, tmp_path)


@needs_clang
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("uint low = weight[word]", "const uint* words = weight; uint low = words[word]"),
        ("uint low = weight[word]", "device uint* words = weight; uint low = words[word]"),
        ("const float a = staged_a[", "device float* staged = staged_a; const float a = staged["),
    ],
)
def test_mixed_address_spaces_are_caught(right: str, wrong: str, tmp_path: Path) -> None:
    source = next(source for source in all_sources() if right in source)
    with pytest.raises(AssertionError, match=r"clang\+\+ refused a kernel"):
        check_address_spaces([source.replace(right, wrong, 1)], tmp_path)


# Guards the shim's 16-bit types, without which a comparison in them says nothing.
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_types_convert_like_mlx(dtype: mx.Dtype) -> None:
    copy = mx.fast.metal_kernel(
        name="copy",
        input_names=["x"],
        output_names=["y"],
        source="const uint i = thread_position_in_grid.x; y[i] = static_cast<T>(float(x[i]));",
    )

    def converted(x: mx.array, to: mx.Dtype) -> mx.array:
        (y,) = HostKernel(copy, shared_compiler())(
            inputs=[x],
            template=[("T", to)],
            grid=(x.size, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[to],
        )
        return y

    every = mx.arange(1 << 16).astype(mx.uint16).view(dtype)
    np.testing.assert_array_equal(converted(every, mx.float32), every.astype(mx.float32))
    # Numbers halfway between neighbours, and the ones beside them: there rounding decides.
    finite = np.unique(np.array(every.astype(mx.float32)))
    finite = finite[np.isfinite(finite)].astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    x = mx.array(np.concatenate([middle, *beside]))
    assert mx.array_equal(converted(x, dtype).view(mx.uint16), x.astype(dtype).view(mx.uint16))
