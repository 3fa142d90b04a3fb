"""Adapter layers: DoRA and LoRA around a frozen layer. The formula is in ``dora.py``."""

from dora_mlx.layers.dora import DoRALinear, hoisted_norms
from dora_mlx.layers.lora import LoRALinear

__all__ = ["DoRALinear", "LoRALinear", "hoisted_norms"]
