"""Float32 tensors in the precision of a file, as bytes that can be written."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dora_mlx.errors import UserError


def encode(tensor: mx.array, dtype: mx.Dtype, name: str) -> NDArray[np.generic]:
    """``tensor`` rounded to ``dtype``, to nearest even; bfloat16 comes as its uint16 bits.

    Raises:
        UserError: When the tensor holds NaN or infinity, or a value too large for ``dtype``.
    """
    check_finite(tensor, dtype, name)
    encoded = tensor.astype(dtype)
    if dtype == mx.bfloat16:
        encoded = encoded.view(mx.uint16)
    return np.array(encoded, copy=False)


def check_finite(tensor: mx.array, dtype: mx.Dtype, name: str) -> None:
    """Refuse a tensor that ``dtype`` cannot hold.

    Raises:
        UserError: When the tensor holds NaN or infinity, or a value too large for ``dtype``.
    """
    if not mx.isfinite(tensor.astype(dtype)).all().item():
        raise UserError(_not_finite(tensor, dtype, name))


def _not_finite(tensor: mx.array, dtype: mx.Dtype, name: str) -> str:
    if not mx.isfinite(tensor).all().item():
        return (
            f"{name} holds NaN or infinity, so this model cannot be exported. "
            "Training probably diverged: export an earlier checkpoint."
        )
    largest = mx.abs(tensor).max().item()
    return (
        f"{name} holds {largest:.3g}, too large for {str(dtype).removeprefix('mlx.core.')}. "
        "Export with bfloat16 instead."
    )
