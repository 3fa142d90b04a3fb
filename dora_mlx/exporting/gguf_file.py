"""The ``gguf`` format: one file for llama.cpp and everything built on it."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.read import WrittenTensors
from dora_mlx.exporting.gguf.tokenization import PROBES, as_llama_cpp, check_gguf_tokens
from dora_mlx.exporting.gguf.vocabulary import read_vocabulary
from dora_mlx.exporting.gguf.write import (
    check_gguf_base,
    gguf_size,
    notes_on,
    plan_file,
    write_gguf,
)
from dora_mlx.exporting.logits import VerificationError, coarser
from dora_mlx.exporting.reload import logits_of_weights
from dora_mlx.exporting.staging import Progress
from dora_mlx.exporting.verify import (
    check_gguf_tensors,
    gguf_precision,
    llama_cpp_is_installed,
    run_llama_cpp,
)
from dora_mlx.exporting.writer import ExportSource, Reading

_NOT_INSTALLED = (
    "llama.cpp is not installed here, so the file's own tensors were run in mlx-lm instead: "
    "`pip install 'dora-mlx[gguf-verify]'` to load it in llama.cpp as well."
)


class GgufWriter:
    """See ``Writer``."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse a model that has no GGUF form, from its files and its tensors' names."""
        check_gguf_base(source.base_dir, quant, source.pre)
        plan_file(source.base_dir, source.weights, quant)

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the file."""
        return gguf_size(source.weights, source.base_dir, quant, source.pre)

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
            pre=source.pre,
            check=check,
        )

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Compare every tensor, and run the file in llama.cpp where it is installed."""
        count = check_gguf_tensors(written, source.weights, source.base_dir, quant)
        precision = gguf_precision(quant)
        plan = plan_file(source.base_dir, source.weights, quant)
        vocabulary = read_vocabulary(source.base_dir, plan.rows(), source.pre)
        notes = notes_on(source.weights, plan, vocabulary)
        if llama_cpp_is_installed():
            tokenizer = as_llama_cpp(source.base_dir, vocabulary)
            try:
                [(logits, cut)] = run_llama_cpp([written], tokens, PROBES)
                check_gguf_tokens(cut, PROBES, tokenizer, written)
            except VerificationError as error:
                if source.pre is None:
                    raise
                raise UserError(
                    f"--pre {source.pre} is not what this tokenizer does: {error}."
                ) from error
            return Reading("llama.cpp", count, logits, precision, " ".join(notes) or None)
        logits, computed_in = logits_of_weights(source.base, WrittenTensors(written, plan), tokens)
        if precision is not None:
            precision = coarser(precision, computed_in)
        return Reading("mlx-lm", count, logits, precision, " ".join([*notes, _NOT_INSTALLED]))


WRITER = GgufWriter()
