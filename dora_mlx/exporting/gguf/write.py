"""Write a GGUF file, one tensor in memory at a time."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.architectures import (
    Architecture,
    Hyperparameters,
    TensorPlan,
    find_architecture,
    plan_tensors,
    read_hyperparameters,
    rope_frequency_factors,
)
from dora_mlx.exporting.gguf.vocabulary import Vocabulary, read_vocabulary
from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.precision import encode
from dora_mlx.exporting.staging import Progress, byte_counter, staged_file
from dora_mlx.model_config import read_json

DTYPES = {
    "f16": (mx.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (mx.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f32": (mx.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
ROPE_FACTORS = "rope_freqs.weight"


def check_gguf_base(base_dir: Path) -> None:
    """Refuse a base model that cannot be exported, from its files alone.

    Raises:
        UserError: Naming the first of architecture, config and tokenizer that is not supported.
    """
    config = read_json(base_dir / "config.json")
    find_architecture(config)
    read_hyperparameters(config)
    if config.get("vocab_size") is None:
        raise UserError("vocab_size is missing from the base model's config.json.")
    read_vocabulary(base_dir, config["vocab_size"])


def write_gguf(
    weights: Weights,
    base_dir: Path,
    output_file: Path,
    dtype: str = "f16",
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write ``weights`` with the hyper-parameters and the tokenizer of ``base_dir``.

    Args:
        weights: The merged model.
        base_dir: Folder of the base model: ``config.json`` and the tokenizer's files.
        output_file: File to write; complete when this returns, untouched when it raises. Its
            name without the suffix is the name that programs show for the model.
        dtype: ``f16``, ``bf16`` or ``f32``; one-dimensional tensors are always float32.
        progress: Called with bytes done and bytes in total.
        overwrite: Replace a file that exists.
        check: Called with the complete output while it still has a temporary name; what it
            raises discards the output and keeps the one that was there before.

    Raises:
        UserError: When this model cannot be exported, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    architecture, numbers, plans = plan_file(base_dir, weights.shapes())
    rows = {plan.name: plan.shape[0] for plan in plans}["token_embd.weight"]
    vocabulary = read_vocabulary(base_dir, rows)
    factors = rope_frequency_factors(numbers)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.gguf_arch])
    _add_general(writer, output_file.stem, dtype)
    _add_hyperparameters(writer, numbers, len(vocabulary.tokens))
    _add_vocabulary(writer, vocabulary)
    total = _announce_tensors(writer, plans, dtype, factors)
    with staged_file(output_file, total + _metadata_bytes(vocabulary, plans), overwrite) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        report = byte_counter(total, progress)
        # GGUFWriter's own tensor output reports a full disk as an OSError without errno.
        with open(partial, "ab") as file:
            if factors is not None:
                report(_write_aligned(file, factors))
            for plan in plans:
                value_type, _ = tensor_types(plan, dtype)
                tensor = plan.arrange(weights[plan.source])
                report(_write_aligned(file, encode(tensor, value_type, plan.source)))
        if check is not None:
            check(partial)


def tensor_types(plan: TensorPlan, dtype: str) -> tuple[mx.Dtype, GGMLQuantizationType]:
    """The types ``plan`` is written as: MLX's and GGUF's."""
    # llama.cpp multiplies by norms and adds biases in float32 and refuses anything else.
    value_type, tensor_type, _ = DTYPES["f32" if len(plan.shape) == 1 else dtype]
    return value_type, tensor_type


def plan_file(
    base_dir: Path, shapes: dict[str, tuple[int, ...]]
) -> tuple[Architecture, Hyperparameters, list[TensorPlan]]:
    """What a file holds, from the base model's config and the shapes of its weights.

    Raises:
        UserError: When this model cannot be exported.
    """
    config = read_json(base_dir / "config.json")
    architecture = find_architecture(config)
    numbers = read_hyperparameters(config)
    return architecture, numbers, plan_tensors(architecture, numbers, shapes)


def _announce_tensors(
    writer: gguf.GGUFWriter,
    plans: list[TensorPlan],
    dtype: str,
    factors: NDArray[np.float32] | None,
) -> int:
    """Tell ``writer`` every name, shape and type, in writing order; returns bytes of data."""
    tensors = [(plan.name, plan.shape, *tensor_types(plan, dtype)) for plan in plans]
    if factors is not None:
        tensors.insert(0, (ROPE_FACTORS, factors.shape, mx.float32, GGMLQuantizationType.F32))
    total = 0
    for name, shape, value_type, tensor_type in tensors:
        size = prod(shape) * value_type.size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=tensor_type)
        total += size
    return total


def _metadata_bytes(vocabulary: Vocabulary, plans: list[TensorPlan]) -> int:
    """About what everything except the tensors' data takes; never less."""
    texts = sum(len(text.encode()) + 24 for text in [*vocabulary.tokens, *vocabulary.merges])
    return texts + 200 * len(plans) + 10**6


def _write_aligned(file: BinaryIO, data: NDArray[Any]) -> int:
    """Write ``data`` with zeros around it up to GGUF's alignment; returns its own size."""
    for content in (data.data, b""):
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        file.write(content)
    return data.nbytes


def _add_general(writer: gguf.GGUFWriter, name: str, dtype: str) -> None:
    if "phi3" in name.lower() or "phi-3" in name.lower():
        raise UserError(
            f"llama.cpp takes any model named {name!r} for a Phi-3 and fails on it. "
            "Choose a file name without 'phi-3'."
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_hyperparameters(writer: gguf.GGUFWriter, numbers: Hyperparameters, tokens: int) -> None:
    writer.add_vocab_size(tokens)
    writer.add_context_length(numbers.context_length)
    writer.add_embedding_length(numbers.embedding_length)
    writer.add_block_count(numbers.block_count)
    writer.add_feed_forward_length(numbers.feed_forward_length)
    writer.add_head_count(numbers.head_count)
    writer.add_head_count_kv(numbers.head_count_kv)
    writer.add_key_length(numbers.head_dim)
    writer.add_value_length(numbers.head_dim)
    writer.add_layer_norm_rms_eps(numbers.rms_norm_eps)
    writer.add_rope_dimension_count(numbers.head_dim)
    writer.add_rope_freq_base(numbers.rope.base)
    if numbers.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(numbers.rope.scaling["factor"]))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pretokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_eot_token_id(vocabulary.eot)
    for add, token in (
        (writer.add_eom_token_id, vocabulary.eom),
        (writer.add_pad_token_id, vocabulary.pad),
        (writer.add_unk_token_id, vocabulary.unk),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
