"""Turns a checkpoint into a 4-bit MLX model folder, measures it and writes its card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from starter_corpus.example import FAMILIES

from starter_training.card import write_card

# Loads OpenBLAS, which has to be there before mlx.core is imported.
from starter_training.evaluation import GROUPS, family_scores, grouped
from starter_training.network import BITS, GROUP_SIZE, SHAPE

# isort: split
import mlx.core as mx

QUANTIZATION = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
END_ID, PAD_ID = 2, 0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SHAPE,
    # Newer readers look for the rotary base here, older ones above.
    "rope_parameters": {"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
    "rope_traditional": False,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
    "torch_dtype": "float32",
    "quantization": QUANTIZATION,
    "quantization_config": QUANTIZATION,
}
GENERATION = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False}


def quantized(state: dict[str, torch.Tensor]) -> dict[str, mx.array]:
    """Every matrix in 4 bits, the norms as they are."""
    arrays = {}
    for name, weight in state.items():
        array = mx.array(weight.numpy())
        if array.ndim != 2:
            arrays[name] = array
            continue
        packed, scales, biases = mx.quantize(array, GROUP_SIZE, BITS)
        stem = name.removesuffix(".weight")
        arrays |= {name: packed, f"{stem}.scales": scales, f"{stem}.biases": biases}
    return arrays


def publish(
    checkpoint: Path, tokenizer_folder: Path, folder: Path, report: Callable[[str], None]
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    weights = quantized(saved["network"])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    scores, wrong = family_scores(folder)
    for line in wrong:
        report(f"wrong: {line}")
    for name, score in scores.items():
        report(f"{name}: {score}")
    closed = {
        title for title, names in GROUPS.items() if any(FAMILIES[name].closed for name in names)
    }
    size = sum(weight.numel() for weight in saved["network"].values())
    write_card(
        folder / "README.md", grouped(scores), closed, saved["progress"], f"{size / 1e6:.2f} M"
    )
