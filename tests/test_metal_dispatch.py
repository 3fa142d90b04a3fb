"""Which of the two, kernel or reference, runs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest

from dora_mlx.errors import UserError
from dora_mlx.kernels import metal_dispatch
from dora_mlx.kernels.metal_dispatch import KERNELS_VARIABLE, kernel_runs, use_metal


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment is read once per process: forget what was read, before and after."""
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    metal_dispatch._forced_choice.cache_clear()
    monkeypatch.setattr(metal_dispatch, "_verdicts", {})
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


def refused() -> float:
    raise RuntimeError(
        "[metal::Device] Unable to build metal library\n  program:1: no such thing\n"
    )


# Outcomes of a trial: within what is allowed, beyond it, no number, no kernel.
OUTCOMES = {
    "right": (lambda: 0.9, None),
    "wrong": (lambda: 1.1, "its result is off by 1.1e+00 times what is allowed"),
    "no number": (lambda: float("nan"), "its result is off"),
    "refused": (refused, r"Unable to build metal library; program:1: no such thing"),
}


@pytest.mark.parametrize(("trial", "problem"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_kernel_runs_if_it_passes_its_one_trial(
    trial: Callable[[], float],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretend_metal(monkeypatch, True, mx.gpu)
    trials = []

    def counted() -> float:
        trials.append(trial)
        return trial()

    for _ in range(2):
        assert kernel_runs("some kernel", counted) == (problem is None)
    assert len(trials) == 1
    assert len(caplog.records) == (problem is not None)
    if problem:
        assert f"Metal kernel some kernel is not used, plain ops are: {problem}" in re.sub(
            r"\[.*?\] ", "", caplog.text
        )
    # The verdict is of one kernel, and of the device it was tried on.
    assert kernel_runs("another", lambda: 0.0)
    pretend_metal(monkeypatch, True, mx.cpu)
    assert not kernel_runs("another", lambda: 0.0)


@pytest.mark.parametrize("name", ["wrong", "no number", "refused"])
def test_forcing_a_kernel_that_fails_its_trial_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_metal(monkeypatch, True, mx.gpu)
    monkeypatch.setenv(KERNELS_VARIABLE, "metal")
    assert kernel_runs("some kernel", lambda: 0.0)
    for _ in range(2):
        with pytest.raises(UserError, match=r"the kernel other does not work here: .*Unset"):
            kernel_runs("other", OUTCOMES[name][0])


def test_nothing_is_tried_where_the_reference_is_forced_or_no_metal_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_metal(monkeypatch, False, mx.gpu)
    assert not kernel_runs("some kernel", refused)
    metal_dispatch._forced_choice.cache_clear()
    pretend_metal(monkeypatch, True, mx.gpu)
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert not kernel_runs("some kernel", refused)
    assert metal_dispatch._verdicts == {}


# Guards --help and every import on machines without Metal: a kernel is made at its first call.
def test_importing_the_kernels_makes_none() -> None:
    program = (
        "import dora_mlx, mlx.core as mx\n"
        "mx.fast.metal_kernel = None\n"
        "import dora_mlx.kernels.packed_row_norm, dora_mlx.kernels.gain_backward\n"
    )
    environment = {**os.environ, KERNELS_VARIABLE: "nonsense"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
