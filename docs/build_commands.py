"""Write ``docs/commands.md`` from the commands' own options: ``python docs/build_commands.py``."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dora_mlx.__main__ import VERBS

PAGE = Path(__file__).parent / "commands.md"
HEAD = """\
# Commands

Every verb is `dora-mlx VERB` and `python -m dora_mlx.VERB`. This page is written by
`python docs/build_commands.py` from the options themselves; `--help` shows the same.
"""


def main() -> int:
    """Write the page."""
    PAGE.write_text(commands_page(), encoding="utf-8")
    return 0


def commands_page() -> str:
    """The page as it should be now."""
    parts = [HEAD]
    for verb in VERBS:
        parser = import_module(f"dora_mlx.{verb}").build_parser()
        parts.append(f"## {verb}\n\n{parser.description.strip()}\n")
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                title = group.title[:1].upper() + group.title[1:]
                table = "\n".join(["| | |", "| --- | --- |", *rows])
                parts.append(f"{title}:\n\n{table}\n")
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def _row(action: argparse.Action) -> str:
    name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
    if action.option_strings and action.nargs != 0:
        value = action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
        name = name.removesuffix("`") + f" {value}`"
    cells = [name, (action.help or "").replace("%%", "%")]
    # A bar would end the cell, also within code.
    return " | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip()


if __name__ == "__main__":
    sys.exit(main())
