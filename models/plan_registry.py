"""Write the planned memory of every model into ``registry.toml``, and of some into the README.

    python models/plan_registry.py

Models whose configuration is neither on this machine nor to be had from the Hub are planned as a
llama of the sizes that the registry gives.
"""

import re
from pathlib import Path

from dora_mlx.config import TrainConfig
from dora_mlx.registry import list_models
from dora_mlx.skeleton import find_facts
from dora_mlx.training.memory_figures import MemoryPlan
from dora_mlx.training.memory_plan import Machine, plan_for

REGISTRY = Path(__file__).parent / "registry.toml"
README = Path(__file__).parent.parent / "README.md"
# Inputs of 512 tokens: the last token of a row is only a target.
TYPICAL_LENGTH = 513
README_MACS = (16, 24, 32)
README_LENGTHS = (512, 2048)


def planned(alias: str, length: int, mac: float = 512) -> MemoryPlan:
    """A training step with the default options and rows of ``length`` tokens on a Mac."""
    facts = find_facts(alias, ask_hub=False)
    return plan_for(TrainConfig(model=alias, max_seq_length=length), facts, None, Machine.mac(mac))


def readme_row(alias: str) -> str:
    """A model's line of the memory table in the README."""
    sizes = [f"{planned(alias, length).peak / 1e9:.1f} GB" for length in README_LENGTHS]
    longest = README_LENGTHS[-1]
    verdicts = [planned(alias, longest, mac).verdict for mac in README_MACS]
    words = ["no" if verdict == "does not fit" else verdict for verdict in verdicts]
    return f"| {' | '.join([alias, *sizes, *words])} |"


def main() -> None:
    """Replace every ``train_memory_gb``, and the rows that the README has."""
    registry, readme = REGISTRY.read_text(), README.read_text()
    for entry in list_models():
        table = re.compile(
            rf'(\[models\."?{re.escape(entry.alias)}"?\].*?train_memory_gb = )[\d.]+', re.DOTALL
        )
        peak = planned(entry.alias, TYPICAL_LENGTH).peak
        registry, _ = table.subn(rf"\g<1>{round(peak / 1e9, 1)}", registry, count=1)
        row = re.compile(rf"^\| {re.escape(entry.alias)} \|.*\|$", re.MULTILINE)
        if row.search(readme):
            readme = row.sub(readme_row(entry.alias), readme)
    REGISTRY.write_text(registry)
    README.write_text(readme)


if __name__ == "__main__":
    main()
