"""A folder in the layout of Hugging Face, loaded by Transformers, mlx-lm and others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.exporting.logits import coarser
from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.precision import encode
from dora_mlx.exporting.reload import logits_of_folder
from dora_mlx.exporting.rope import read_rope
from dora_mlx.exporting.staging import Progress, byte_counter, staged_folder
from dora_mlx.exporting.verify import check_folder
from dora_mlx.exporting.writer import ExportSource, Reading
from dora_mlx.model_config import read_json

MAX_SHARD_BYTES = 4 * 10**9
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
# Architectures whose parameters mlx-lm names as Transformers does.
MODEL_TYPES = ("llama", "mistral")
# What --quant calls them.
QUANTS = {"bf16": "bfloat16", "f16": "float16"}

_FORMAT_NAMES = {"bfloat16": "BF16", "float16": "F16"}
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
class _Shard:
    file: str
    names: list[str]


def check_safetensors_base(base_dir: Path) -> None:
    """Refuse a base model that cannot be exported, from its files alone.

    Raises:
        UserError: When the architecture is not in ``MODEL_TYPES`` or its config is not usable.
    """
    _plain_config(base_dir, "bfloat16")


def write_safetensors(
    weights: Weights,
    base_dir: Path,
    output_dir: Path,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``weights`` with the config and the tokenizer of ``base_dir`` to a new folder.

    Args:
        weights: The merged model.
        base_dir: Folder of the base model: ``config.json`` and the tokenizer's files.
        output_dir: Folder to write; complete when this returns, untouched when it raises.
        dtype: ``bfloat16`` or ``float16``, for every tensor.
        progress: Called with bytes done and bytes in total.
        overwrite: Replace a model folder that exists.
        check: Called with the complete output while it still has a temporary name; what it
            raises discards the output and keeps the one that was there before.
        max_shard_bytes: Largest size of one file; a larger tensor gets a file of its own.

    Raises:
        UserError: When this model cannot be exported, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    config = _plain_config(base_dir, dtype)
    # Transformers and mlx-lm take different defaults where the base model's config is silent.
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    base, output = base_dir.resolve(), output_dir.resolve()
    if output == base or output in base.parents:
        raise UserError(f"{output_dir} holds the base model. Choose another folder.")
    sizes = {name: prod(shape) * DTYPES[dtype].size for name, shape in weights.shapes().items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    copied = [path for pattern in _COPIED for path in sorted(base.glob(pattern)) if path.is_file()]
    total = sum(sizes.values())
    headers = 200 * len(sizes) + sum(path.stat().st_size for path in copied) + 10**6
    report = byte_counter(total, progress)
    with staged_folder(output_dir, total + headers, overwrite) as folder:
        for shard in shards:
            with open(folder / shard.file, "wb") as file:
                _write_shard(file, shard, weights, dtype, report)
        if len(shards) > 1:
            _write_json(folder / "model.safetensors.index.json", _index(shards, total))
        _write_json(folder / "config.json", config)
        for path in copied:
            shutil.copyfile(path, folder / path.name)
        if check is not None:
            check(folder)


def _plain_config(base_dir: Path, dtype: str) -> dict[str, Any]:
    config = read_json(base_dir / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"Models of type {config.get('model_type')!r} cannot be exported to safetensors yet; "
            f"these can: {', '.join(MODEL_TYPES)}."
        )
    if config.get("rope_traditional"):
        raise UserError(
            "This model rotates neighbouring channels (rope_traditional), which Transformers "
            "does not do for its architecture, so it cannot be exported."
        )
    rope = read_rope(config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    # Transformers 5 writes rope_parameters only, and mlx-lm reads the older names only.
    config["rope_theta"] = rope.base
    if rope.kind != "default":
        config["rope_scaling"] = {"rope_type": rope.kind, **rope.scaling}
    config["torch_dtype"] = dtype
    if "dtype" in config:
        config["dtype"] = dtype
    return config


def _plan_shards(sizes: dict[str, int], limit: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [_Shard("model.safetensors", groups[0])]
    count = len(groups)
    return [
        _Shard(f"model-{number:05d}-of-{count:05d}.safetensors", names)
        for number, names in enumerate(groups, start=1)
    ]


def _write_shard(
    file: BinaryIO,
    shard: _Shard,
    weights: Weights,
    dtype: str,
    report: Callable[[int], None],
) -> None:
    """Eight bytes of header length, a JSON header, then the tensors end to end."""
    shapes = weights.shapes()
    # Transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in shard.names:
        start, end = end, end + prod(shapes[name]) * DTYPES[dtype].size
        header[name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": shapes[name],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in shard.names:
        report(file.write(encode(weights[name], DTYPES[dtype], name).data))


def _index(shards: list[_Shard], total: int) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class SafetensorsWriter:
    """See ``Writer``."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse a model that has no Hugging Face form here."""
        check_safetensors_base(source.base_dir)

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the tensors."""
        return sum(prod(shape) * 2 for shape in source.weights.shapes().values())

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
        write_safetensors(
            source.weights,
            source.base_dir,
            output,
            QUANTS[quant],
            progress,
            overwrite=overwrite,
            check=check,
        )

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Compare every tensor bit for bit, and run the folder in mlx-lm."""
        check_folder(written, source.weights)
        logits, computed_in = logits_of_folder(written, tokens)
        precision = coarser(DTYPES[QUANTS[quant]], computed_in)
        return Reading("mlx-lm", len(source.weights), logits, precision)


WRITER = SafetensorsWriter()
