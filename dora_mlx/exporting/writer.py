"""What a format has to be able to do, and what it is given to do it with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.staging import Progress
from dora_mlx.loading import LoadedModel


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        base: The base model as it lies in its folder: shapes, types and quantization, with
            weights that are read only when they are asked for.
        weights: The weights to write, under the names that mlx-lm gives them.
        adapter_dir: The run's folder, for formats that hold the adapter alone.
        base_name: The base model's name for others, such as its name on the Hub.
        pre: What llama.cpp calls the tokenizer's splitter, when the person who exports knows it.
    """

    base: LoadedModel
    weights: Weights
    adapter_dir: Path | None = None
    base_name: str | None = None
    pre: str | None = None

    @property
    def base_dir(self) -> Path:
        """Folder of the base model."""
        return self.base.path


@dataclass(frozen=True)
class Reading:
    """What came back from a written export.

    Attributes:
        program: What read it: the target program, or what stood in for it.
        tensors: How many tensors were compared with the weights they were written from.
        logits: ``[B, L, vocab]`` float32 for the tokens that were asked for.
        precision: The coarsest type that weights or computation had, whose rounding is all that
            may have changed; ``None`` for weights quantized anew.
        note: A sentence when it was not the target program that read it.
    """

    program: str
    tensors: int
    logits: NDArray[np.float32]
    precision: mx.Dtype | None
    note: str | None = None


class Writer(Protocol):
    """One format: refuse, measure, write, read back."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Raise a ``UserError`` for what cannot be exported so; reads no weight."""
        ...

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes that ``write`` will write; reads no weight."""
        ...

    def write(
        self,
        source: ExportSource,
        output: Path,
        quant: str,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        """Write ``output`` completely or not at all.

        Args:
            source: The model.
            output: File or folder to write.
            quant: One of the format's.
            progress: Called with bytes done and bytes in total.
            overwrite: Replace an export that is there.
            check: Called with the complete output while it still has a temporary name; what it
                raises discards the output and keeps the one that was there before.
        """
        ...

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Load what ``write`` wrote, compare its tensors, and compute logits with it.

        Args:
            source: The model.
            written: The output, maybe still under a temporary name.
            quant: As it was written.
            tokens: ``[B, L]`` token ids to compute logits for.

        Raises:
            VerificationError: When it does not load or a tensor is not what was written.
        """
        ...
