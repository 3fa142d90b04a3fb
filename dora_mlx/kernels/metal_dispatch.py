"""Whether the Metal kernels or their plain-ops references run: decided here and nowhere else.

``DORA_MLX_KERNELS=metal`` or ``=reference`` forces one of the two. Unset, the kernels run where
they can: when MLX has Metal and the default device is the GPU.
"""

import os
from functools import cache

import mlx.core as mx

from dora_mlx.errors import UserError

KERNELS_VARIABLE = "DORA_MLX_KERNELS"


def use_metal() -> bool:
    """Whether an op runs its Metal kernel now.

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


@cache
def _forced_choice() -> str | None:
    choice = os.environ.get(KERNELS_VARIABLE)
    if choice not in (None, "metal", "reference"):
        raise UserError(
            f"{KERNELS_VARIABLE} is '{choice}'; it can be 'metal', 'reference' or unset."
        )
    return choice
