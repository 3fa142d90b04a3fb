"""Adapter layers: DoRA and LoRA around a frozen layer. The formula is in ``dora.py``."""

from dora_mlx.layers.conv import DoRAConv1d, DoRAConv2d, LoRAConv1d, LoRAConv2d
from dora_mlx.layers.dora import hoisted_norms
from dora_mlx.layers.embedding import DoRAEmbedding, LoRAEmbedding
from dora_mlx.layers.linear import DoRALinear, LoRALinear
from dora_mlx.layers.switch import DoRASwitchLinear, LoRASwitchLinear

__all__ = [
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAEmbedding",
    "DoRALinear",
    "DoRASwitchLinear",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "hoisted_norms",
]
