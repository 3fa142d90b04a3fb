"""The ``gguf`` format: one file for llama.cpp and everything built on it."""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import mlx.core as mx

from dora_mlx.exporting.gguf.write import DTYPES, check_gguf_base, plan_file, write_gguf
from dora_mlx.exporting.logits import coarser
from dora_mlx.exporting.reload import logits_of_weights
from dora_mlx.exporting.staging import Progress
from dora_mlx.exporting.verify import (
    PROBES,
    check_gguf_tensors,
    check_gguf_tokens,
    llama_cpp_is_installed,
    run_llama_cpp,
)
from dora_mlx.exporting.writer import ExportSource, Reading

_NOT_INSTALLED = (
    "llama.cpp is not installed here, so the file's own tensors were run in mlx-lm instead: "
    "install dora-mlx[gguf-verify] to load it in llama.cpp as well."
)


class GgufWriter:
    """See ``Writer``."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse a model that has no GGUF form, from its files and its tensors' names."""
        check_gguf_base(source.base_dir)
        plan_file(source.base_dir, source.weights.shapes())

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the tensors."""
        _, _, plans = plan_file(source.base_dir, source.weights.shapes())
        size = DTYPES[quant][0].size
        return sum(prod(p.shape) * (4 if len(p.shape) == 1 else size) for p in plans)

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
        """Write the file."""
        write_gguf(
            source.weights,
            source.base_dir,
            output,
            quant,
            progress,
            overwrite=overwrite,
            check=check,
        )

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Compare every tensor, and run the file in llama.cpp where it is installed."""
        count = check_gguf_tensors(written, source.weights, source.base_dir, quant)
        dtype = DTYPES[quant][0]
        if llama_cpp_is_installed():
            logits, texts = run_llama_cpp(written, tokens, PROBES)
            check_gguf_tokens(texts, source.base_dir, written)
            return Reading("llama.cpp", count, logits, dtype)

        def rounded() -> Iterator[tuple[str, mx.array]]:
            # Bit for bit what the file holds, which was compared just now.
            for name in source.weights:
                yield name, source.weights[name].astype(dtype)

        logits, computed_in = logits_of_weights(source.base, rounded(), tokens)
        return Reading("mlx-lm", count, logits, coarser(dtype, computed_in), _NOT_INSTALLED)


WRITER = GgufWriter()
