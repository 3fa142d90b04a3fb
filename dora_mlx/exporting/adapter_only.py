"""The formats that hold an adapter alone: ``mlx-adapter`` and ``peft``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters

from dora_mlx.adapters.adapter_folder import mlx_lm_problems, write_mlx_adapter
from dora_mlx.adapters.peft import PEFT_WEIGHTS_FILE, peft_problems, write_peft
from dora_mlx.adapters.reading import read_adapter
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.errors import UserError
from dora_mlx.exporting.logits import VerificationError, logits_of
from dora_mlx.exporting.staging import Progress, byte_counter, staged_folder
from dora_mlx.exporting.writer import ExportSource, Reading
from dora_mlx.loading import load_base


class AdapterWriter(ABC):
    """A ``Writer`` of adapter folders; see there."""

    @abstractmethod
    def problems(self, adapter: StoredAdapter, source: ExportSource) -> list[str]:
        """What keeps this adapter from being written so, as sentences."""

    @abstractmethod
    def fill(self, folder: Path, adapter: StoredAdapter, source: ExportSource) -> None:
        """Write the adapter into an empty folder."""

    @abstractmethod
    def attach(self, model: nn.Module, folder: Path, source: ExportSource) -> str:
        """Put the written adapter into a base model; returns what read it."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse what is no adapter, or none that the program knows."""
        if problems := self.problems(_adapter(source), source):
            raise UserError(" ".join(problems))

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in _adapter(source).arrays.values())

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
        """Write the folder."""
        adapter = _adapter(source)
        total = self.size(source, quant)
        report = byte_counter(total, progress)
        with staged_folder(output, total + 10**6, overwrite) as folder:
            self.fill(folder, adapter, source)
            report(total)
            if check is not None:
                check(folder)

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Put the adapter into a base model that was read anew."""
        base = load_base(source.base_dir)
        program = self.attach(base.model, written, source)
        logits, computed_in = logits_of(base.model, tokens)
        return Reading(program, len(_adapter(source).arrays), logits, computed_in)


class MlxAdapterWriter(AdapterWriter):
    """The form of a run's own two files, with one rank for all layers."""

    def problems(self, adapter: StoredAdapter, source: ExportSource) -> list[str]:
        """Full fine-tuning leaves no adapter, and mlx-lm lacks some layers."""
        if adapter.spec.method != "full":
            return mlx_lm_problems(adapter.spec, source.base.model)
        return ["All weights were trained, so there is no adapter. Choose --format mlx."]

    def fill(self, folder: Path, adapter: StoredAdapter, source: ExportSource) -> None:
        """Write both files."""
        write_mlx_adapter(folder, adapter)

    def attach(self, model: nn.Module, folder: Path, source: ExportSource) -> str:
        """Let mlx-lm do it."""
        try:
            load_adapters(model, str(folder))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise VerificationError(f"mlx-lm cannot load {folder}: {error}") from error
        return "mlx-lm"


class PeftWriter(AdapterWriter):
    """PEFT's form."""

    def problems(self, adapter: StoredAdapter, source: ExportSource) -> list[str]:
        """What PEFT cannot express."""
        return peft_problems(adapter.spec, source.base)

    def fill(self, folder: Path, adapter: StoredAdapter, source: ExportSource) -> None:
        """Write both files."""
        write_peft(folder, adapter, source.base, source.base_name)

    def attach(self, model: nn.Module, folder: Path, source: ExportSource) -> str:
        """Read it by our own reader: PEFT needs the model as Transformers has it."""
        adapter = read_adapter(folder, source.base)
        written = _adapter(source)
        for name, array in written.arrays.items():
            if not mx.array_equal(adapter.arrays[name], array).item():
                raise VerificationError(f"{name} in {folder / PEFT_WEIGHTS_FILE} has changed")
        adapter.attach_to(model)
        return "dora-mlx's reader of PEFT adapters"


def _folder(source: ExportSource) -> Path:
    if source.adapter_dir is None:
        raise UserError("These weights are merged already. Choose a format that is no adapter.")
    return source.adapter_dir


def _adapter(source: ExportSource) -> StoredAdapter:
    return read_adapter(_folder(source), source.base)


MLX_ADAPTER = MlxAdapterWriter()
PEFT = PeftWriter()
