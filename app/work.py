"""What worker processes do. Imports of heavy parts happen inside, in the worker."""

from dora_mlx import TrainConfig


def plan(config: TrainConfig) -> object:
    """The memory plan of a training."""
    from dora_mlx import plan_memory

    return plan_memory(config)
