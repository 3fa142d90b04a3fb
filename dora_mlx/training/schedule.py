"""Learning rate as a function of the step, so that a resumed run needs no state for it."""

import math
from typing import Literal

# Fraction of the peak that the cosine and linear schedules end at.
FLOOR = 0.1


def learning_rate_at(
    step: int,
    steps: int,
    peak: float,
    warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """Learning rate of optimizer step ``step`` (1 to ``steps``).

    It rises linearly to ``peak`` over the first ``warmup_steps`` steps, then falls to a tenth of
    it, or stays.
    """
    warmup_steps = min(warmup_steps, steps // 2)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps - 1) / max(1, steps - warmup_steps - 1)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (FLOOR + (1 - FLOOR) * remaining)
