"""The optimizer, in groups of parameters with a learning rate and a weight decay of their own."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from dora_mlx.errors import UserError

# Name to MLX's optimizer for a weight decay. The learning rate is set before every step.
_KINDS: dict[str, Callable[[float], optim.Optimizer]] = {
    "adam": lambda _: optim.Adam(0.0, bias_correction=True),
    "adamw": lambda decay: optim.AdamW(0.0, weight_decay=decay, bias_correction=True),
    "adafactor": lambda decay: optim.Adafactor(
        0.0, weight_decay=decay, relative_step=False, scale_parameter=False, warmup_init=False
    ),
    "lion": lambda decay: optim.Lion(0.0, weight_decay=decay),
    "muon": lambda decay: optim.Muon(0.0, weight_decay=decay),
    "sgd": lambda decay: optim.SGD(0.0, momentum=0.9, weight_decay=decay),
}


class GroupedOptimizer:
    """One of MLX's optimizers over groups of trainable parameters.

    Adam moves a parameter by about its learning rate per step whatever the parameter's size, so
    magnitudes (in the order of 1) and B (starts at zero) may want other rates than A. Weight
    decay pulls matrices towards zero and spares vectors: a magnitude or a norm that decays would
    scale the model's outputs down.

    Args:
        kind: ``adam``, ``adamw``, ``adafactor``, ``lion``, ``muon`` or ``sgd``. Muon is made for
            matrices; vectors get AdamW beside it.
        parameters: The trainable parameters, a tree.
        weight_decay: Share of a matrix removed per step, times its learning rate.
        magnitude_lr_ratio: Rate of the DoRA magnitudes as a multiple of the common one.
        lora_b_lr_ratio: The same for B; LoRA+ (arXiv 2402.12354) advises 16.

    Raises:
        UserError: For a weight decay with ``adam``, which has none.
    """

    def __init__(
        self,
        kind: str,
        parameters: Any,
        weight_decay: float = 0.0,
        magnitude_lr_ratio: float = 1.0,
        lora_b_lr_ratio: float = 1.0,
    ):
        if kind == "adam" and weight_decay:
            raise UserError("--weight-decay has no effect with --optimizer adam; use adamw.")
        make, for_vectors = _KINDS[kind], _KINDS["adamw" if kind == "muon" else kind]
        groups: list[tuple[Callable[[str, mx.array], bool], float, optim.Optimizer]] = [
            (lambda path, _: path.endswith(".magnitude"), magnitude_lr_ratio, for_vectors(0.0)),
            (lambda _, array: array.ndim < 2, 1.0, for_vectors(0.0)),
            (lambda path, _: path.endswith(".lora_b"), lora_b_lr_ratio, make(weight_decay)),
            (lambda *_: True, 1.0, make(weight_decay)),
        ]
        filters, self._ratios, optimizers = zip(*groups, strict=True)
        # MLX takes no filter for the last group, which gets what is left.
        self._groups = optim.MultiOptimizer(list(optimizers), list(filters[:-1]))
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
