"""What a memory plan says. Without MLX, so that a program that only shows it need not load it."""

from dataclasses import dataclass
from typing import Literal

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
        rows, width: The batch it is for: rows, and tokens of each.
        grad_checkpoint: Whether it is for a step with gradient checkpointing.
    """

    parts: dict[str, int]
    peak: int
    limit: int
    verdict: Verdict
    advice: tuple[str, ...]
    rows: int
    width: int
    grad_checkpoint: bool

    @property
    def counted(self) -> int:
        """The peak without operations that MLX begins before it has to."""
        return self.peak - self.parts["in flight"]
