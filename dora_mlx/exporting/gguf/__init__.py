"""GGUF files for llama.cpp and everything built on it."""

from dora_mlx.exporting.gguf.quants import LLAMA_QUANTIZE_QUANTS, QUANTS
from dora_mlx.exporting.gguf.read import WrittenTensors
from dora_mlx.exporting.gguf.write import check_gguf_base, gguf_size, plan_file, write_gguf

__all__ = [
    "LLAMA_QUANTIZE_QUANTS",
    "QUANTS",
    "WrittenTensors",
    "check_gguf_base",
    "gguf_size",
    "plan_file",
    "write_gguf",
]
