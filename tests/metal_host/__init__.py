"""Runs the Metal source that MLX generates on the host CPU, one fiber per GPU thread."""
