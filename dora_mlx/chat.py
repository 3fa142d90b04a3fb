"""``python -m dora_mlx.chat``: talk to a trained model in the terminal."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dora_mlx.command_line import add_runs_dir_flag, parser_for, run_command
from dora_mlx.errors import UserError
from dora_mlx.run_folder import find_run

if TYPE_CHECKING:
    from dora_mlx.adapters.trained import TrainedModel
    from dora_mlx.loading import LoadedModel

DESCRIPTION = """\
Talk to a trained model. An empty line or Ctrl-D ends the chat; Ctrl-C stops an answer.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.chat --run demo
  python -m dora_mlx.chat --run demo --prompt "Tell me a story."
  python -m dora_mlx.chat --run demo --compare --prompt "What is the capital of France?"
"""

Message = dict[str, str]


def stream_answer(
    base: "LoadedModel",
    messages: list[Message],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """The answer to a conversation, piece by piece.

    Args:
        base: A loaded model, with or without adapters in it.
        messages: ``{"role": ..., "content": ...}``, the last one from the user.
        max_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        seed: Seed of the sampling.
    """
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from dora_mlx.layers.dora import hoisted_norms

    mx.random.seed(seed)
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    with hoisted_norms(base.model):
        for piece in stream_generate(
            base.model,
            base.tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(temperature),
        ):
            yield piece.text


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and chat; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _chat(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("chat", DESCRIPTION, EXAMPLES)
    parser.add_argument("--run", metavar="NAME", required=True, help="The run to talk to.")
    add_runs_dir_flag(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="Answer this one message and end.")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="Print the answers of the base model and of the adapted one.",
    )
    parser.add_argument("--system", metavar="TEXT", help="System message for the conversation.")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=256,
        help="Longest answer in tokens. Default: 256.",
    )
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, higher values vary more. Default: 0.",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Seed. Default: 0.")
    return parser


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1 but is {arguments.max_tokens}.")
    if not arguments.temperature >= 0:
        raise UserError(f"--temperature must be at least 0 but is {arguments.temperature}.")
    folder = find_run(arguments.run, arguments.runs_dir)
    from dora_mlx.adapters.trained import load_run

    trained = load_run(folder)
    history = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is not None:
        history.append({"role": "user", "content": arguments.prompt})
        _answer(trained, history, arguments)
        return 0
    if sys.stdin.isatty():
        print(f"Chat with run {folder.name}. An empty line ends it.")
    while text := _read_line():
        history.append({"role": "user", "content": text})
        answer = _answer(trained, history, arguments)
        history.append({"role": "assistant", "content": answer})
    return 0


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(trained: "TrainedModel", history: list[Message], arguments: argparse.Namespace) -> str:
    """Print the answer, or both for ``--compare``; returns that of the adapted model."""
    from dora_mlx.adapters.attach import adapters_disabled

    if not arguments.compare:
        return _print_answer(trained, history, arguments)
    with adapters_disabled(trained.base.model):
        print("base:    ", end="")
        _print_answer(trained, history, arguments)
    print("adapted: ", end="")
    return _print_answer(trained, history, arguments)


def _print_answer(
    trained: "TrainedModel", history: list[Message], arguments: argparse.Namespace
) -> str:
    pieces = []
    try:
        for piece in stream_answer(
            trained.base,
            history,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        ):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        # Stops this answer; at the prompt it ends the chat.
        print(" ...", end="")
    print()
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(main())
