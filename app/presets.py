"""Sets of options for a purpose, as changes to the defaults of ``TrainConfig``."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "Balanced": {},
    "Quick look": {"epochs": 1.0, "rank": 4, "steps_per_eval": 10},
    "Thorough": {"epochs": 5.0, "rank": 16, "alpha": 32.0, "patience": 6},
    "Little memory": {
        "rank": 4,
        "batch_size": 1,
        "grad_accumulation_steps": 4,
        "grad_checkpoint": True,
    },
}
