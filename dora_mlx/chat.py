"""``python -m dora_mlx.chat``: talk to a trained model in the terminal."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dora_mlx.command_line import (
    INTERRUPTED,
    add_adapter_flags,
    add_option_flags,
    given_options,
    parser_for,
    run_command,
)
from dora_mlx.errors import UserError
from dora_mlx.run_folder import find_run
from dora_mlx.sampling import Sampling

if TYPE_CHECKING:
    from dora_mlx.chat_model import ChatModel

DESCRIPTION = """\
Talk to trained models in the terminal. Several adapters may share one base model in memory: the
first one answers until you choose another.
An empty line or Ctrl-D ends the chat; Ctrl-C stops an answer; /help lists what else there is.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.chat --run demo
  python -m dora_mlx.chat --run demo --prompt "Tell me a story." --temperature 0.8
  python -m dora_mlx.chat --run demo --compare --prompt "What is the capital of France?"
  python -m dora_mlx.chat --run first second
  python -m dora_mlx.chat --model mistral-7b-4bit --adapter path/to/an/adapter
"""

HELP = """\
/adapter NAME   answer with that adapter: one that is loaded, a run, or an adapter's folder
/base           answer with the base model
/adapters       list what is loaded
/compare        print the answers of all that is loaded, or stop doing so
/system TEXT    begin again with that system message; without a text, with none
/reset          begin again
/help           this list
An empty line or Ctrl-D ends the chat. Ctrl-C stops an answer."""


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and chat; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _chat(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("chat", DESCRIPTION, EXAMPLES)
    add_adapter_flags(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="Answer this one message and end.")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="Print the answers of the base model and of every adapter.",
    )
    parser.add_argument("--system", metavar="TEXT", help="System message for the conversation.")
    add_option_flags(parser, options=Sampling, title="the answer")
    return parser


def _chat(arguments: argparse.Namespace) -> int:
    sampling = Sampling(**given_options(arguments, Sampling))
    runs = [find_run(name, arguments.runs_dir) for name in arguments.run]
    from dora_mlx.adapters.swapping import load_swappable
    from dora_mlx.chat_model import ChatModel

    chat = ChatModel(load_swappable(runs, arguments.model, arguments.adapter, arguments.checkpoint))
    session = Session(chat, sampling, arguments.runs_dir, arguments.system, arguments.compare)
    # What a terminal cannot show, and what it sends that is no text, ends no chat.
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if arguments.prompt is not None:
        return 0 if session.say(arguments.prompt) else INTERRUPTED
    if sys.stdin.isatty():
        _prepare_terminal()
        print(f"Chat with {session.who}. /help lists what you can do, an empty line ends it.")
    session.run()
    return 0


def _prepare_terminal() -> None:
    # Editing and recalling lines; some builds of Python lack it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


class Session:
    """A conversation in the terminal: what was said, who answers, and the commands.

    Args:
        chat: The model with its adapters.
        sampling: How answers are drawn.
        runs_dir: Where ``/adapter`` finds runs.
        system: System message, or ``None``.
        compare: Whether the base model and every adapter answer.
    """

    def __init__(
        self,
        chat: "ChatModel",
        sampling: Sampling,
        runs_dir: Path,
        system: str | None,
        compare: bool,
    ):
        if compare and not chat.adapters:
            raise UserError("--compare needs an adapter to compare with: name one by --adapter.")
        self._chat, self._sampling, self._runs_dir = chat, sampling, runs_dir
        self._system, self._compare = system, compare
        self._history: list[dict[str, str]] = []
        self._commands = {
            "/adapter": self._use,
            "/base": lambda _: self._use(None),
            "/adapters": lambda _: self._list(),
            "/compare": lambda _: self._toggle_compare(),
            "/system": self._begin_again,
            "/reset": lambda _: self._begin_again(self._system),
            "/help": lambda _: print(HELP),
        }

    @property
    def who(self) -> str:
        """Who answers, in words."""
        return f"adapter {self._chat.active}" if self._chat.active else "the base model"

    def run(self) -> None:
        """Read and answer until an empty line or the end of the input."""
        while text := self._read_line():
            word, _, rest = text.partition(" ")
            try:
                if not text.startswith("/"):
                    self.say(text)
                elif word in self._commands:
                    self._commands[word](rest.strip())
                else:
                    print(f"There is no {word}; /help lists what there is.")
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def say(self, text: str) -> bool:
        """Answer a message, as all who are compared or as the one in use; false after Ctrl-C."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._history, {"role": "user", "content": text}]
        speakers = [None, *self._chat.adapters] if self._compare else [self._chat.active]
        answers = {}
        for speaker in speakers:
            if self._compare:
                print(f"{self._label(speaker)} ", end="", flush=True)
            answers[speaker], complete = self._print_answer(messages, speaker)
            if not complete:
                break
        # The conversation goes on from what the one in use said.
        if answer := answers.get(self._chat.active):
            self._history += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]
        return complete

    def _print_answer(
        self, messages: list[dict[str, str]], speaker: str | None
    ) -> tuple[str, bool]:
        """Print an answer as it comes; returns it, and whether Ctrl-C left it whole."""
        pieces = []
        answer = self._chat.stream(messages, self._sampling, adapter=speaker)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            print(" ...")
            return "".join(pieces), False
        print()
        return "".join(pieces), True

    def _label(self, speaker: str | None) -> str:
        names = ["base", *(self._chat.adapters if len(self._chat.adapters) > 1 else ["adapted"])]
        name = names[0] if speaker is None else names[1 + self._chat.adapters.index(speaker)]
        return f"{name}:".ljust(max(map(len, names)) + 1)

    def _read_line(self) -> str:
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return ""
            except KeyboardInterrupt:
                print("\nAn empty line or Ctrl-D ends the chat.")

    def _use(self, name: str | None) -> None:
        if name == "":
            raise UserError("Say which: /adapter NAME. /adapters lists those that are loaded.")
        if name is not None and name not in self._chat.adapters:
            name = self._load(name)
        self._chat.use(name)
        print(f"Now {self.who} answers.")

    def _load(self, name: str) -> str:
        """Load a run or an adapter's folder; returns what it is called from then on."""
        from dora_mlx.adapters.swapping import name_of

        if Path(name).is_dir():
            folder, name = Path(name), name_of(Path(name), self._chat.adapters)
            self._chat.add_adapter(name, folder)
        else:
            self._chat.add_adapter(name, find_run(name, self._runs_dir))
        return name

    def _list(self) -> None:
        for name in (None, *self._chat.adapters):
            print(f"{'*' if name == self._chat.active else ' '} {name or 'base model'}")

    def _toggle_compare(self) -> None:
        if not self._chat.adapters:
            raise UserError("There is no adapter to compare with: load one by /adapter NAME.")
        self._compare = not self._compare
        print("Comparing." if self._compare else "No longer comparing.")

    def _begin_again(self, system: str | None) -> None:
        self._system, self._history = system or None, []
        print("A new conversation" + (f", with system message: {system}" if system else "."))


if __name__ == "__main__":
    sys.exit(main())
