"""The types of a GGUF file by the names people know, and which tensor gets which.

The choice per tensor is llama.cpp's own (``llama-quant.cpp``), so that ``q4_k_m`` means here what
it means everywhere: the same types, the same size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Quant:
    """What a name stands for: the type of most tensors, and the number of the mixture."""

    type: Type
    file_type: FileType


# Written here; the first is the default.
QUANTS: Mapping[str, Quant] = {
    "f16": Quant(Type.F16, FileType.MOSTLY_F16),
    "bf16": Quant(Type.BF16, FileType.MOSTLY_BF16),
    "f32": Quant(Type.F32, FileType.ALL_F32),
    "q8_0": Quant(Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q6_k": Quant(Type.Q6_K, FileType.MOSTLY_Q6_K),
    "q5_k_m": Quant(Type.Q5_K, FileType.MOSTLY_Q5_K_M),
    "q4_k_m": Quant(Type.Q4_K, FileType.MOSTLY_Q4_K_M),
    "q5_1": Quant(Type.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": Quant(Type.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_1": Quant(Type.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": Quant(Type.Q4_0, FileType.MOSTLY_Q4_0),
}
# Made by the program llama-quantize from an f16 file.
LLAMA_QUANTIZE_QUANTS: Mapping[str, Quant] = {
    "q5_k_s": Quant(Type.Q5_K, FileType.MOSTLY_Q5_K_S),
    "q4_k_s": Quant(Type.Q4_K, FileType.MOSTLY_Q4_K_S),
    "iq4_nl": Quant(Type.IQ4_NL, FileType.MOSTLY_IQ4_NL),
    "iq4_xs": Quant(Type.IQ4_XS, FileType.MOSTLY_IQ4_XS),
    "q3_k_l": Quant(Type.Q3_K, FileType.MOSTLY_Q3_K_L),
    "q3_k_m": Quant(Type.Q3_K, FileType.MOSTLY_Q3_K_M),
    "q3_k_s": Quant(Type.Q3_K, FileType.MOSTLY_Q3_K_S),
    "iq3_m": Quant(Type.IQ3_S, FileType.MOSTLY_IQ3_M),
    "iq3_s": Quant(Type.IQ3_S, FileType.MOSTLY_IQ3_S),
    "q2_k": Quant(Type.Q2_K, FileType.MOSTLY_Q2_K),
}


def find_quant(name: str) -> Quant:
    """What ``name`` stands for.

    Raises:
        UserError: When there is no such type.
    """
    quant = QUANTS.get(name) or LLAMA_QUANTIZE_QUANTS.get(name)
    if quant is None:
        raise UserError(
            f"There is no GGUF type {name!r}; choose one of {', '.join(QUANTS)}, or with llama.cpp "
            f"installed one of {', '.join(LLAMA_QUANTIZE_QUANTS)}."
        )
    return quant


_FLOATS = (Type.F32, Type.F16, Type.BF16)
# For rows that are no multiple of the block's length.
_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
_MIXTURES = (FileType.MOSTLY_Q4_K_M, FileType.MOSTLY_Q5_K_M)
# Layers of the models that share one value head among eight query heads.
_LARGE = {"llama": 80, "qwen2": 80}


def choose_type(
    quant: Quant, name: str, shape: tuple[int, ...], numbers: Hyperparameters, tied: bool
) -> Type:
    """The type of the tensor ``name`` of ``shape`` in a file of ``quant``.

    Args:
        quant: From ``QUANTS``.
        name: In the GGUF file.
        shape: ``[out, in]``, or ``[experts, out, in]``.
        numbers: Of the model.
        tied: Whether the embedding is the output layer as well.
    """
    # llama.cpp multiplies by norms, adds biases and routes to experts in float32.
    vector = sum(size > 1 for size in shape) < 2
    if vector or not name.endswith(".weight") or name.endswith(("_norm.weight", "gate_inp.weight")):
        return Type.F32
    if quant.type in _FLOATS:
        return quant.type
    chosen = _mixed_type(quant, name, numbers, tied)
    if shape[-1] % _block(chosen):
        chosen = _FALLBACKS.get(chosen, chosen)
    return Type.F16 if shape[-1] % _block(chosen) else chosen


def size_in_bytes(shape: tuple[int, ...], tensor_type: Type) -> int:
    """Bytes of a tensor's data in a file."""
    length, size = gguf.GGML_QUANT_SIZES[tensor_type]
    return prod(shape) // length * size


def _block(tensor_type: Type) -> int:
    return gguf.GGML_QUANT_SIZES[tensor_type][0]


def _mixed_type(quant: Quant, name: str, numbers: Hyperparameters, tied: bool) -> Type:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return quant.type if quant.type == Type.Q8_0 else Type.Q6_K
    if not name.startswith("blk."):
        return quant.type
    _, layer, part, _ = name.split(".")
    eight_experts = numbers.config.get("num_experts") == 8
    if part in ("attn_v", "attn_k") and eight_experts:
        return Type.Q8_0
    if part == "attn_output" and eight_experts and quant.file_type == FileType.MOSTLY_Q4_K_M:
        return Type.Q5_K
    values = part in ("attn_v", "attn_qkv")
    if values or part.startswith("ffn_down"):
        if quant.file_type in _MIXTURES and _gets_more_bits(int(layer), numbers.block_count):
            return Type.Q6_K
        if values and quant.type == Type.Q4_K and _is_large(numbers):
            return Type.Q5_K
    return quant.type


def _gets_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_large(numbers: Hyperparameters) -> bool:
    """What llama.cpp calls a 70B."""
    return (
        _LARGE.get(numbers.config["model_type"]) == numbers.block_count
        and numbers.head_count != numbers.head_count_kv
    )
