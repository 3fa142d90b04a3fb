"""Which of the two, kernel or reference, runs."""

import os
import subprocess
import sys
from collections.abc import Iterator

import mlx.core as mx
import pytest

from dora_mlx.errors import UserError
from dora_mlx.kernels import metal_dispatch
from dora_mlx.kernels.metal_dispatch import KERNELS_VARIABLE, use_metal


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment is read once per process: forget what was read, before and after."""
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    metal_dispatch._forced_choice.cache_clear()
    yield
    metal_dispatch._forced_choice.cache_clear()


def pretend_metal(patch: pytest.MonkeyPatch, available: bool, device: mx.DeviceType) -> None:
    patch.setattr(mx.metal, "is_available", lambda: available)
    patch.setattr(mx, "default_device", lambda: mx.Device(device))


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_the_kernel_runs_where_metal_and_the_gpu_are(
    available: bool, device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_metal(monkeypatch, available, device)
    assert use_metal() == (available and device == mx.gpu)


# Guards a CUDA machine, whose default device is a GPU that knows no Metal.
def test_this_machine_is_asked_itself() -> None:
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    assert use_metal() == (mx.metal.is_available() and on_gpu)


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_metal(monkeypatch, True, mx.gpu)
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert use_metal() is False


@pytest.mark.parametrize(
    ("available", "device"), [(False, mx.cpu), (False, mx.gpu), (True, mx.cpu)]
)
def test_forcing_metal_where_it_cannot_run_says_so(
    available: bool, device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_metal(monkeypatch, available, device)
    monkeypatch.setenv(KERNELS_VARIABLE, "metal")
    with pytest.raises(UserError, match="needs MLX with Metal and the GPU"):
        use_metal()


def test_forcing_metal_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_metal(monkeypatch, True, mx.gpu)
    monkeypatch.setenv(KERNELS_VARIABLE, "metal")
    assert use_metal() is True


@pytest.mark.parametrize("value", ["Metal", "", "cuda"])
def test_an_unknown_value_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, value)
    with pytest.raises(UserError, match=f"'{value}'; it can be 'metal', 'reference'"):
        use_metal()


# Guards a switch in the middle of a run, which would change the numbers.
def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_metal(monkeypatch, True, mx.gpu)
    assert use_metal() is True
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert use_metal() is True


# Guards --help and every import on machines without Metal: a kernel is made at its first call.
def test_importing_the_kernels_makes_none() -> None:
    program = (
        "import dora_mlx, mlx.core as mx\n"
        "mx.fast.metal_kernel = None\n"
        "import dora_mlx.kernels.packed_row_norm, dora_mlx.kernels.gain_backward\n"
    )
    environment = {**os.environ, KERNELS_VARIABLE: "nonsense"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
