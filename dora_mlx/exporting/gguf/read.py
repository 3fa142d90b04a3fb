"""The tensors of a GGUF file back under the names and in the arrangement of mlx-lm."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from dora_mlx.exporting.gguf.write import FilePlan


def read_tensors(file: Path, plan: FilePlan) -> Iterator[tuple[str, mx.array]]:
    """``(name, tensor)`` for every tensor of the model, dequantized to float32, one at a time.

    Args:
        file: What ``write_gguf`` wrote.
        plan: What it was written by.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in plan.tensors:
        written = found[tensor.name]
        values = gguf.dequantize(written.data, written.tensor_type).astype(np.float32)
        yield tensor.source, tensor.restore(mx.array(values.reshape(tensor.shape)))
