"""``python -m dora_mlx.check``: what is wrong with a data file, and what of it is learned."""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dora_mlx.command_line import (
    USER_ERROR,
    add_option_flags,
    given_options,
    parser_for,
    run_command,
)
from dora_mlx.config import TrainConfig

if TYPE_CHECKING:
    from dora_mlx.data.examples import Example
    from dora_mlx.data.records import Source
    from dora_mlx.data.tokenized import TokenizedSource

DESCRIPTION = """\
Look for mistakes in a data file, folder or Hub data set, and show what a training would learn.

Every mistake is named with its line. The exit code is 2 if there are errors; warnings are no
errors. Lengths are tokens of the model's tokenizer.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.check chat.jsonl
  python -m dora_mlx.check chat.csv --columns prompt=question completion=answer
  python -m dora_mlx.check chat.jsonl --model mistral-7b-4bit --show 3
"""

_OPTIONS = (
    "model",
    "data_form",
    "columns",
    "skip_bad_rows",
    "train_on",
    "mask_prompt",
    "max_seq_length",
    "long_examples",
)
_TRAINED, _MASKED, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and check; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _check(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("check", DESCRIPTION, EXAMPLES)
    parser.add_argument("data", metavar="FILE", help="File, folder or hub:owner/name to check.")
    parser.add_argument(
        "--show",
        metavar="N",
        type=int,
        default=0,
        help="Print the first N examples: what is learned in green or, without colour, between "
        ">> and <<. Default: 0.",
    )
    add_option_flags(parser, _OPTIONS)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    config = TrainConfig.from_dict(given_options(arguments))
    # Heavy imports only now, so that help answers at once.
    from dora_mlx.data.forms import parse_columns
    from dora_mlx.data.preparation import source_of, tokenize
    from dora_mlx.data.records import find_data
    from dora_mlx.loading import load_tokenizer
    from dora_mlx.registry import resolve

    parse_columns(config.columns)
    files = find_data(source_of(arguments.data))
    tokenizer = load_tokenizer(resolve(config.model))
    bad = 0
    for source in files.all():
        began = time.perf_counter()
        tokenized = tokenize(config, source, tokenizer)
        _print_report(source, tokenized)
        _print_statistics(tokenized, time.perf_counter() - began)
        for example in tokenized.examples[: max(0, arguments.show)]:
            print()
            print(_drawn(example, tokenizer, _coloured()))
        bad += tokenized.report.bad_rows
    return USER_ERROR if bad and not config.skip_bad_rows else 0


def _print_report(source: "Source", tokenized: "TokenizedSource") -> None:
    report = tokenized.report
    print(f"{source}: {report.rows:,} rows, {report.bad_rows:,} bad")
    if report.bad_rows:
        bad = f"{report.bad_rows:,} bad {report.unit}{'s'[: report.bad_rows > 1]}"
        print(f"\nerrors ({bad}):\n{report.listing('error')}")
    if report.count("warning"):
        print(f"\nwarnings ({report.summary('warning')}):\n{report.listing('warning')}")
    for notice in report.notices:
        print(f"\nnote: {notice}")


def _print_statistics(tokenized: "TokenizedSource", seconds: float) -> None:
    from dora_mlx.data.statistics import PERCENTILES, histogram, length_statistics

    examples = tokenized.all()
    numbers = length_statistics(examples)
    print(
        f"\n{numbers.examples:,} examples, {numbers.tokens:,} tokens, {numbers.trained:,} of them "
        f"trained ({numbers.share_trained:.1%})"
        if numbers.examples
        else "\nno example is left"
    )
    if treated := ", ".join(f"{number:,} {how}" for how, number in examples.counts.items()):
        print(f"long or empty: {treated}")
    if not numbers.examples:
        return
    shortest, *between, longest = numbers.percentiles
    shares = [
        f"{length:,} for {percent} %"
        for percent, length in zip(PERCENTILES[1:-1], between, strict=True)
    ]
    shares[0] += " of the examples"
    print(f"length in tokens: {shortest:,} to {longest:,}; at most {', '.join(shares)}\n")
    print("\n".join(histogram(examples.examples.lengths)))
    if tokenized.kept:
        print(f"\nread in {seconds:.1f} s from what was tokenized before")
    else:
        print(f"\nprepared in {seconds:.1f} s: {numbers.tokens / seconds:,.0f} tokens/s")


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _drawn(example: "Example", tokenizer: Any, coloured: bool) -> str:
    """The text of an example with what is trained marked."""
    begin, end, masked = (_TRAINED, _PLAIN, _MASKED) if coloured else (">>", "<<", "")
    pieces: list[str] = []
    start = 0
    tokens, trained = example.tokens.tolist(), example.trained.tolist()
    for place in range(1, len(tokens) + 1):
        if place < len(tokens) and trained[place] == trained[start]:
            continue
        text = _printable(tokenizer.decode(tokens[start:place]))
        if trained[start]:
            pieces.append(begin + text + end)
        else:
            pieces.append(masked + text + (end if coloured else ""))
        start = place
    return "".join(pieces)


def _printable(text: str) -> str:
    """Text that cannot give orders to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main())
