"""Tiny models with the files of a base checkpoint, for the tests of exporting."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from dora_mlx.exporting.gguf_file import GgufWriter
from dora_mlx.exporting.logits import check_rounding, coarser, compare_logits, logits_of
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.safetensors import SafetensorsWriter
from dora_mlx.exporting.stored import MAX_SHARD_BYTES
from dora_mlx.exporting.writer import ExportSource
from dora_mlx.layers import DoRALinear
from dora_mlx.loading import LoadedModel
from dora_mlx.model_config import read_json

STARTER = Path(__file__).parents[1] / "models" / "starter"
# More rows than the 2048 tokens of the starter's tokenizer, as many checkpoints have.
ROWS = 2080
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_base(folder: Path, tokenizer: Path = STARTER, seed: int = 0, **options) -> llama.Model:
    """A random llama in memory, and its config.json and tokenizer in ``folder``.

    Sharp queries and keys make the attention, and so the rotary embedding, matter.
    """
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": ROWS,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    sharp = [
        (name, 3 * value if "q_proj" in name or "k_proj" in name else _off_one(name, value))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(sharp))
    mx.eval(model.parameters())
    return model.eval()


def _off_one(name: str, value: mx.array) -> mx.array:
    return value + mx.random.normal(value.shape) * 0.2 if "norm" in name else value


def quantize(model: nn.Module, bits: int = 4) -> nn.Module:
    nn.quantize(model, group_size=32, bits=bits)
    return model.eval()


def adapt(model: nn.Module) -> nn.Module:
    """DoRA, moved well away from its start, on some layers of every block."""
    for block in model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            layer = DoRALinear.from_base(getattr(parent, name), rank=4, alpha=8)
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.3
            layer.magnitude = layer.magnitude * (1 + 0.3 * mx.random.normal(layer.magnitude.shape))
            parent[name] = layer
    mx.eval(model.parameters())
    return model.eval()


def some_tokens(rows: int = 2, length: int = 48) -> mx.array:
    return mx.random.randint(3, 2048, (rows, length), key=mx.random.key(7))


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def source_of(weights, base: Path, model: nn.Module | None = None) -> ExportSource:
    config = read_json(base / "config.json")
    return ExportSource(LoadedModel(model, None, config, base), weights)


def write_safetensors(
    weights,
    base: Path,
    output: Path,
    quant: str = "bf16",
    progress=None,
    *,
    overwrite=False,
    check=None,
    max_shard_bytes=MAX_SHARD_BYTES,
):
    SafetensorsWriter(max_shard_bytes).write(
        source_of(weights, base), output, quant, progress, overwrite=overwrite, check=check
    )


def verify_safetensors(folder: Path, model: nn.Module, tokens: mx.array):
    """Read ``folder`` back and compare it with ``model`` as the command does."""
    quant = {"bfloat16": "bf16", "float16": "f16"}[read_json(folder / "config.json")["torch_dtype"]]
    source = source_of(MergedWeights(model), folder)
    reading = SafetensorsWriter().read(source, folder, quant, tokens)
    return _compared(reading, model, tokens, folder)


def verify_gguf(file: Path, model: nn.Module, base: Path, quant: str, tokens: mx.array):
    """Read ``file`` back and compare it with ``model`` as the command does; both are returned."""
    reading = GgufWriter().read(source_of(MergedWeights(model), base), file, quant, tokens)
    return reading, _compared(reading, model, tokens, file)


def _compared(reading, model: nn.Module, tokens: mx.array, place: Path):
    reference, computed_in = logits_of(model, tokens)
    report = compare_logits(reference, reading.logits)
    check_rounding(report, coarser(reading.precision, computed_in), place)
    return report
