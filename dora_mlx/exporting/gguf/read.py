"""The tensors of a GGUF file back under the names and in the arrangement of mlx-lm."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from dora_mlx.exporting.gguf.write import FilePlan


class WrittenTensors(Mapping[str, mx.array]):
    """Name to tensor of the model, dequantized to float32 when it is asked for and not kept.

    Args:
        file: What ``write_gguf`` wrote.
        plan: What it was written by.
    """

    def __init__(self, file: Path, plan: FilePlan):
        self._written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        self._plans = {tensor.source: tensor for tensor in plan.tensors}

    def __getitem__(self, name: str) -> mx.array:
        plan = self._plans[name]
        written = self._written[plan.name]
        values = gguf.dequantize(written.data, written.tensor_type).astype(np.float32)
        return plan.restore(mx.array(values.reshape(plan.shape)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)
