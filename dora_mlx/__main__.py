"""``dora-mlx VERB ...`` and ``python -m dora_mlx VERB ...``: one console command for all verbs."""

import sys
from importlib import import_module

VERBS = {
    "train": "fine-tune a model on a chat file",
    "plan": "say whether a training fits into memory before it starts",
    "check": "look for mistakes in a data file and show what will be learned",
    "chat": "talk to a trained model in the terminal",
    "serve": "serve trained models to other programs on this machine",
    "export": "write the trained model for other programs, and measure it",
    "compare": "train by several methods and say what each cost and gave",
    "merge": "merge several adapters on one base model into one model",
    "inspect": "show how far a run moved each weight",
    "models": "list the models known by a short name",
}

USAGE = (
    "usage: dora-mlx VERB [options]\n\n"
    + "\n".join(f"  {verb:<8} {help_text}" for verb, help_text in VERBS.items())
    + "\n\n`dora-mlx VERB --help` explains a verb. Start with: dora-mlx train\n"
)


def main(argv: list[str] | None = None) -> int:
    """Hand over to the module of the verb; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    verb, *rest = arguments
    if verb == "--version":
        from dora_mlx import __version__

        print(f"dora-mlx {__version__}")
        return 0
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}.\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    code: int = import_module(f"dora_mlx.{verb}").main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
