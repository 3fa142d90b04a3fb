"""Adam with a learning rate of its own for each part of an adapter."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim


class AdapterAdam:
    """Adam (arXiv 1412.6980, with bias correction) in groups of parameters.

    Adam moves a parameter by about its learning rate per step whatever the parameter's size, so
    magnitudes (in the order of 1) and B (starts at zero) may want other rates than A.

    Args:
        parameters: The trainable parameters, a tree.
        magnitude_lr_ratio: Rate of the DoRA magnitudes as a multiple of the common one.
        lora_b_lr_ratio: The same for B; LoRA+ (arXiv 2402.12354) advises 16.
    """

    def __init__(self, parameters: Any, magnitude_lr_ratio: float, lora_b_lr_ratio: float):
        ratios = {".magnitude": magnitude_lr_ratio, ".lora_b": lora_b_lr_ratio, "": 1.0}
        self._ratios = list(ratios.values())
        groups = [optim.Adam(learning_rate=0.0, bias_correction=True) for _ in ratios]
        filters = [lambda path, _, end=end: path.endswith(end) for end in ratios if end]
        self._groups = optim.MultiOptimizer(groups, filters)
        self._groups.init(parameters)

    @property
    def state(self) -> Any:
        """Moments and step counts, a tree of arrays; assign it to go back to it."""
        return self._groups.state

    @state.setter
    def state(self, state: Any) -> None:
        self._groups.state = state

    def update(self, model: nn.Module, gradients: Any, learning_rate: float) -> None:
        """One step with the common rate ``learning_rate``."""
        for group, ratio in zip(self._groups.optimizers, self._ratios, strict=True):
            group.learning_rate = mx.array(learning_rate * ratio)
        self._groups.update(model, gradients)
