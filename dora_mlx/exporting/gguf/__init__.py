"""GGUF files for llama.cpp and everything built on it."""

from dora_mlx.exporting.gguf.write import check_gguf_base, write_gguf

__all__ = ["check_gguf_base", "write_gguf"]
