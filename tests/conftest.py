"""Fixtures: importing dora_mlx first gives MLX a fast BLAS in every test process."""

import dora_mlx  # noqa: F401
