"""Write the planned memory of every model into ``registry.toml``.

    python models/plan_registry.py

Models whose configuration is neither on this machine nor to be had from the Hub are planned as a
llama of the sizes that the registry gives.
"""

import re
from dataclasses import replace
from pathlib import Path

from dora_mlx.config import TrainConfig
from dora_mlx.registry import list_models
from dora_mlx.skeleton import find_facts
from dora_mlx.training.memory_plan import Machine, plan_for

REGISTRY = Path(__file__).parent / "registry.toml"
TYPICAL = TrainConfig(max_seq_length=513)


def planned_gb(alias: str) -> float:
    """Peak of a training step with the default options on a Mac, in GB of 10^9 bytes."""
    facts = find_facts(alias, ask_hub=False)
    return round(
        plan_for(replace(TYPICAL, model=alias), facts, None, Machine.mac(512)).peak / 1e9, 1
    )


def main() -> None:
    """Replace every ``train_memory_gb``."""
    text = REGISTRY.read_text()
    for entry in list_models():
        table = re.compile(
            rf'(\[models\."?{re.escape(entry.alias)}"?\].*?train_memory_gb = )[\d.]+', re.DOTALL
        )
        text, _ = table.subn(rf"\g<1>{planned_gb(entry.alias)}", text, count=1)
    REGISTRY.write_text(text)


if __name__ == "__main__":
    main()
