"""Whether the Metal kernels or their plain-ops references run: decided here and nowhere else.

``DORA_MLX_KERNELS=metal`` or ``=reference`` forces one of the two. Unset, the kernels run where
they can: when MLX has Metal, the default device is the GPU, and a kernel has passed its trial.
"""

import logging
import os
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.kernels.device import planning_for_gpu

KERNELS_VARIABLE = "DORA_MLX_KERNELS"

_log = logging.getLogger(__name__)
# What a kernel is compiled for, such as ``packed_row_norm affine 4 64``, and whether it passed.
_verdicts: dict[str, bool] = {}


def kernel_runs(name: str, trial: Callable[[], float]) -> bool:
    """Whether the kernel ``name`` runs here, which its trial has to show once per process.

    A kernel that Apple's compiler refuses or that computes something else is not used: its
    reference computes the same, and one line in the log says so.

    Args:
        name: What is tried: the kernel and everything that its source is compiled for.
        trial: Runs the kernel on a tiny case; its error relative to what is allowed there.

    Raises:
        UserError: As ``use_metal``, and where the variable forces a kernel that fails its trial.
    """
    if planning_for_gpu() or not use_metal():
        return False
    if name not in _verdicts:
        problem = _problem(trial)
        if problem and _forced_choice() == "metal":
            raise UserError(
                f"{KERNELS_VARIABLE}=metal, but the kernel {name} does not work here: {problem}. "
                f"Unset {KERNELS_VARIABLE} to do without it."
            )
        if problem:
            _log.warning("Metal kernel %s is not used, plain ops are: %s", name, problem)
        _verdicts[name] = problem is None
    return _verdicts[name]


def kernels_planned() -> bool:
    """Whether a plan is being made for where the kernels run, which need not be here."""
    refused = _forced_choice() == "reference" or mx.cuda.is_available()
    return planning_for_gpu() and not refused


def use_metal() -> bool:
    """Whether Metal kernels may run now.

    The environment is read once per process; the default device is asked every time, because a
    program may move to the CPU and back. A kernel object can be made without Metal and only
    calling it fails, so this guards the calls and the modules import everywhere.

    Raises:
        UserError: The variable has an unknown value, or forces Metal where it cannot run.
    """
    choice = _forced_choice()
    if choice == "reference":
        return False
    capable = mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    if choice == "metal" and not capable:
        raise UserError(
            f"{KERNELS_VARIABLE}=metal needs MLX with Metal and the GPU as default device; "
            f"this is {mx.default_device()} with Metal "
            f"{'available' if mx.metal.is_available() else 'not available'}. "
            f"Unset {KERNELS_VARIABLE}, or set it to 'reference'."
        )
    return capable


def _problem(trial: Callable[[], float]) -> str | None:
    """What is wrong with a kernel, in one line; ``None`` if nothing is."""
    try:
        error = trial()
    except (RuntimeError, ValueError) as refusal:
        # Metal's compiler answers with the whole source; its first lines say what it minds.
        return "; ".join(line.strip() for line in str(refusal).splitlines()[:2] if line.strip())
    # Written so that a NaN is wrong as well.
    return None if error <= 1 else f"its result is off by {error:.1e} times what is allowed"


@cache
def _forced_choice() -> str | None:
    choice = os.environ.get(KERNELS_VARIABLE)
    if choice not in (None, "metal", "reference"):
        raise UserError(
            f"{KERNELS_VARIABLE} is '{choice}'; it can be 'metal', 'reference' or unset."
        )
    return choice
