"""``dora-mlx models``: list the models known by a short name."""

import argparse
import sys

from dora_mlx.command_line import parser_for, run_command

DESCRIPTION = """\
List the models that --model knows by a short name.

Any folder with an MLX model and any Hub name (owner/name) of one work as well.
"""


def main(argv: list[str] | None = None) -> int:
    """Print the list; returns the exit code."""
    build_parser().parse_args(argv)
    return run_command(_list)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    return parser_for("models", DESCRIPTION)


def _list() -> int:
    from dora_mlx.registry import list_models

    print(f"{'alias':<22} {'size':>6} {'download':>9} {'to train*':>9}  licence, Hub name")
    for entry in list_models():
        millions = entry.parameters / 1e6
        size = f"{millions / 1000:.1f}B" if millions >= 100 else f"{millions:.0f}M"
        print(
            f"{entry.alias:<22} {size:>6} {entry.download_gb:>6.1f} GB "
            f"{entry.train_memory_gb:>6.1f} GB  {entry.license}, {entry.hub or 'embedded'}"
        )
    print("\n* Planned for 4 examples of 512 tokens, not measured; see dora-mlx plan.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
