"""What can be exported, as data: the command's flags and the app's controls are made from it.

A format is one entry here and one module with a ``WRITER`` (``exporting/writer.py``); nothing else
knows the list. Importing this file imports nothing heavy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from dora_mlx.errors import UserError

if TYPE_CHECKING:
    from dora_mlx.exporting.writer import Writer


@dataclass(frozen=True)
class Quant:
    """One value of ``--quant``. ``advanced`` ones are for people who know why they want them."""

    name: str
    help: str
    advanced: bool = False


@dataclass(frozen=True)
class ExportFormat:
    """One value of ``--format``.

    Attributes:
        name: As in ``--format``.
        summary: What it writes, for whom.
        program: The program that it is for, and that reads it back where it is installed.
        quants: What ``--quant`` takes, the default first.
        keeps: The quant that keeps a training whatever its size, advised when another does not.
        suffix: Ending of the file it writes; empty for a folder.
        writer_at: Module and name of its code.
    """

    name: str
    summary: str
    program: str
    quants: tuple[Quant, ...]
    keeps: str
    suffix: str
    writer_at: str

    @property
    def writer(self) -> "Writer":
        """The code of the format; imports MLX."""
        module, _, name = self.writer_at.partition(":")
        writer: Writer = getattr(import_module(module), name)
        return writer

    def quant(self, name: str | None) -> Quant:
        """The quant called ``name``, or the default for ``None``.

        Raises:
            UserError: If the format has no such quant.
        """
        if name is None:
            return self.quants[0]
        for quant in self.quants:
            if quant.name == name:
                return quant
        own = [quant.name for quant in self.quants if quant.name not in _BY_LLAMA_QUANTIZE]
        message = f"--quant {name} is not available for {self.name}; choose {_either(own)}."
        if len(own) < len(self.quants):
            message += f" With llama.cpp's llama-quantize: {_either(_BY_LLAMA_QUANTIZE)}."
        raise UserError(message)


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# What keeps any training, because nothing is merged and nothing rounded.
ADAPTER_FORMAT = "mlx-adapter"

_BF16 = Quant("bf16", "16 bits with the range of float32, as models are published today.")
_F16 = Quant("f16", "16 bits, more exact than bf16, for values up to 65504.")
_F32 = Quant("f32", "32 bits: exact, twice the size; for comparing.", advanced=True)

# What llama-quantize makes of an f16 file; there for those who have it.
_BY_LLAMA_QUANTIZE = (
    "q5_k_s",
    "q4_k_s",
    "iq4_nl",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "iq3_m",
    "iq3_s",
    "q2_k",
)
_GGUF_QUANTS = (
    _F16,
    _BF16,
    _F32,
    Quant("q8_0", "8 bits: hardly to be told from 16, half the size."),
    Quant("q6_k", "6.6 bits: close to 8."),
    Quant("q5_k_m", "5.7 bits on average."),
    Quant("q4_k_m", "4.8 bits on average: the usual choice for running a model."),
    Quant("q5_1", "6 bits, older form.", advanced=True),
    Quant("q5_0", "5.5 bits, older form.", advanced=True),
    Quant("q4_1", "5 bits; keeps an affine 4-bit base as it is.", advanced=True),
    Quant("q4_0", "4.5 bits, older form.", advanced=True),
    *(
        Quant(name, "Needs llama.cpp's llama-quantize on the PATH.", advanced=True)
        for name in _BY_LLAMA_QUANTIZE
    ),
)

_AS_TRAINED = Quant("f32", "The adapter as it was trained.")

# Of the mlx format: quantized as the base model is, and not at all.
BASE_QUANT = "base"
DENSE_QUANT = "none"
# Group size, bits and mode of the others.
MLX_PACKINGS = {
    **{f"{bits}bit": (64, bits, "affine") for bits in (8, 6, 5, 4, 3, 2)},
    "mxfp8": (32, 8, "mxfp8"),
    "mxfp4": (32, 4, "mxfp4"),
    "nvfp4": (16, 4, "nvfp4"),
    **{
        f"{bits}bit-g{group}": (group, bits, "affine")
        for bits in (8, 6, 5, 4, 3, 2)
        for group in (32, 128)
    },
}


def _mlx_quants() -> Iterator[Quant]:
    yield Quant(BASE_QUANT, "Quantized layer by layer as the base model is; 16 bits if it is not.")
    yield Quant(DENSE_QUANT, "Not quantized: 16 bits, as the base model has them, else bf16.")
    for name, (group, bits, mode) in MLX_PACKINGS.items():
        what = f"{bits} bits in groups of {group}" if mode == "affine" else f"MLX's {name} format"
        yield Quant(name, f"{what}.", advanced="-" in name or bits in (2, 3, 5))


EXPORT_FORMATS = (
    ExportFormat(
        "mlx",
        "a folder for mlx-lm and LM Studio on a Mac, quantized as the base model is",
        "mlx-lm",
        tuple(_mlx_quants()),
        keeps=DENSE_QUANT,
        suffix="",
        writer_at="dora_mlx.exporting.mlx_folder:WRITER",
    ),
    ExportFormat(
        "safetensors",
        "a folder in Hugging Face layout, for Transformers, vLLM, mlx-lm and others",
        "Transformers",
        (_BF16, _F16),
        keeps="f16",
        suffix="",
        writer_at="dora_mlx.exporting.safetensors:WRITER",
    ),
    ExportFormat(
        "gguf",
        "one file for llama.cpp, Ollama, LM Studio and others",
        "llama.cpp",
        _GGUF_QUANTS,
        keeps="f16",
        suffix=".gguf",
        writer_at="dora_mlx.exporting.gguf_file:WRITER",
    ),
    ExportFormat(
        "ollama",
        "a folder with a GGUF file and the Modelfile to create an Ollama model from",
        "llama.cpp",
        _GGUF_QUANTS,
        keeps="f16",
        suffix="",
        writer_at="dora_mlx.exporting.ollama:WRITER",
    ),
    ExportFormat(
        ADAPTER_FORMAT,
        "the adapter alone, for mlx-lm with the same base model: nothing is rounded",
        "mlx-lm",
        (_AS_TRAINED,),
        keeps=_AS_TRAINED.name,
        suffix="",
        writer_at="dora_mlx.exporting.adapter_only:MLX_ADAPTER",
    ),
    ExportFormat(
        "peft",
        "the adapter alone, for PEFT with the base model in Transformers",
        "PEFT",
        (_AS_TRAINED,),
        keeps=_AS_TRAINED.name,
        suffix="",
        writer_at="dora_mlx.exporting.adapter_only:PEFT",
    ),
)


def find_format(name: str) -> ExportFormat:
    """The format called ``name``.

    Raises:
        UserError: If there is none.
    """
    for export_format in EXPORT_FORMATS:
        if export_format.name == name:
            return export_format
    names = ", ".join(export_format.name for export_format in EXPORT_FORMATS)
    raise UserError(f"There is no export format {name!r}; choose one of {names}.")
