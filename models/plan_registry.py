"""Write the planned memory of every model into ``registry.toml``, and of some into two pages.

    python models/plan_registry.py

Models whose configuration is neither on this machine nor to be had from the Hub are planned as a
llama of the sizes that the registry gives.
"""

import functools
import re
from pathlib import Path

from dora_mlx.config import TrainConfig
from dora_mlx.registry import list_models
from dora_mlx.skeleton import find_facts
from dora_mlx.training.memory_figures import MemoryPlan
from dora_mlx.training.memory_plan import Machine, plan_for

REGISTRY = Path(__file__).parent / "registry.toml"
ROOT = Path(__file__).parent.parent
# Pages with a table of models, and the Macs that it has, by GB.
PAGES = {ROOT / "README.md": (16, 24, 32), ROOT / "docs" / "memory.md": (16, 24, 32, 64)}
# Inputs of 512 and 2048 tokens: the last token of a row is only a target.
TYPICAL_LENGTH, LONG = 513, 2049


@functools.cache
def planned(alias: str, length: int, checkpoint: bool = True, mac: float = 512) -> MemoryPlan:
    """A training step with rows of ``length`` tokens on a Mac."""
    config = TrainConfig(model=alias, max_seq_length=length, grad_checkpoint=checkpoint)
    return plan_for(config, find_facts(alias, ask_hub=False), None, Machine.mac(mac))


def table_row(alias: str, macs: tuple[int, ...]) -> str:
    """A model's line in the table of a page."""
    plans = [planned(alias, TYPICAL_LENGTH, checkpoint=False)]
    plans += [planned(alias, length) for length in (TYPICAL_LENGTH, LONG)]
    sizes = [f"{plan.peak / 1e9:.1f} GB" for plan in plans]
    verdicts = [planned(alias, LONG, mac=mac).verdict for mac in macs]
    words = ["no" if verdict == "does not fit" else verdict for verdict in verdicts]
    return f"| {' | '.join([alias, *sizes, *words])} |"


def main() -> None:
    """Replace every ``train_memory_gb``, and the rows that the pages have."""
    registry = REGISTRY.read_text()
    pages = {page: page.read_text() for page in PAGES}
    for entry in list_models():
        table = re.compile(
            rf'(\[models\."?{re.escape(entry.alias)}"?\].*?train_memory_gb = )[\d.]+', re.DOTALL
        )
        peak = planned(entry.alias, TYPICAL_LENGTH).peak
        registry, _ = table.subn(rf"\g<1>{round(peak / 1e9, 1)}", registry, count=1)
        row = re.compile(rf"^\| {re.escape(entry.alias)} \|.*\|$", re.MULTILINE)
        for page, macs in PAGES.items():
            if row.search(pages[page]):
                pages[page] = row.sub(table_row(entry.alias, macs), pages[page])
    REGISTRY.write_text(registry)
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
