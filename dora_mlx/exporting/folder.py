"""A model folder: weights in safetensors files, ``config.json``, and the base's tokenizer."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.exporting.logits import coarser
from dora_mlx.exporting.reload import logits_of_folder
from dora_mlx.exporting.staging import Progress, byte_counter, staged_folder
from dora_mlx.exporting.stored import MAX_SHARD_BYTES, Stored, check_shards, write_shards
from dora_mlx.exporting.writer import ExportSource, Reading

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class FolderWriter(ABC):
    """A ``Writer`` of model folders; see there.

    Attributes:
        max_shard_bytes: Largest size of one file; a larger tensor gets a file of its own.
        source_format: What the files say that their layout is: ``pt`` or ``mlx``.
    """

    max_shard_bytes: int = MAX_SHARD_BYTES
    source_format: ClassVar[str]

    @abstractmethod
    def tensors(self, source: ExportSource, quant: str) -> list[Stored]:
        """What the folder holds, in order; computes nothing."""

    @abstractmethod
    def config(self, source: ExportSource, quant: str) -> dict[str, Any]:
        """The folder's ``config.json``, or a ``UserError``."""

    @abstractmethod
    def precision(self, source: ExportSource, quant: str) -> mx.Dtype | None:
        """The type of the weights, ``None`` if they are quantized anew."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse a model that cannot be written so."""
        self.config(source, quant)

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the tensors."""
        return sum(stored.nbytes for stored in self.tensors(source, quant))

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
        """Write weights, config, and the files of the base that belong to the tokenizer."""
        base, place = source.base_dir.resolve(), output.resolve()
        if place == base or place in base.parents:
            raise UserError(f"{output} holds the base model. Choose another folder.")
        config = json.dumps(self.config(source, quant), indent=2, ensure_ascii=False) + "\n"
        tensors = self.tensors(source, quant)
        files = [p for pattern in _COPIED for p in sorted(base.glob(pattern)) if p.is_file()]
        total = sum(stored.nbytes for stored in tensors)
        headers = 200 * sum(len(stored.specs) for stored in tensors) + len(config) + 10**6
        needed = total + headers + sum(path.stat().st_size for path in files)
        with staged_folder(output, needed, overwrite) as folder:
            report = byte_counter(total, progress)
            write_shards(folder, tensors, self.source_format, report, self.max_shard_bytes)
            (folder / "config.json").write_text(config, encoding="utf-8")
            for path in files:
                shutil.copyfile(path, folder / path.name)
            if check is not None:
                check(folder)

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Compare every tensor byte for byte, and run the folder in mlx-lm."""
        count = check_shards(written, self.tensors(source, quant))
        logits, computed_in = logits_of_folder(written, tokens)
        precision = self.precision(source, quant)
        if precision is not None:
            precision = coarser(precision, computed_in)
        return Reading("mlx-lm", count, logits, precision)
