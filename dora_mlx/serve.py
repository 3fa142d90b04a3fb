"""``python -m dora_mlx.serve``: trained models behind an OpenAI-compatible address."""

import argparse
import ipaddress
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dora_mlx.command_line import (
    add_adapter_flags,
    add_option_flags,
    given_options,
    parser_for,
    run_command,
)
from dora_mlx.errors import UserError
from dora_mlx.run_folder import find_run
from dora_mlx.sampling import Sampling

DESCRIPTION = """\
Serve trained models to other programs on this machine, by OpenAI's protocol (mlx-lm's server).
A request names a run, or the base model, in its field "model"; without one the first run answers.
Ctrl-C ends the server.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.serve --run demo
  python -m dora_mlx.serve --run first second --port 9000 --temperature 0.7
  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""

# What can be set for requests that do not say; they can say more.
_DEFAULTS = ("max_tokens", "temperature", "top_p", "top_k", "min_p")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and serve; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _serve(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("serve", DESCRIPTION, EXAMPLES)
    add_adapter_flags(parser)
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="Address to listen on. Default: 127.0.0.1, for programs on this machine.",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=8080, help="Port. Default: 8080; 0: a free one."
    )
    parser.add_argument(
        "--allow-network",
        action="store_true",
        help="Allow a --host that other machines reach. There is no password and no encryption.",
    )
    parser.add_argument(
        "--allow-origin",
        metavar="URL",
        nargs="+",
        default=[],
        help="Web pages that may use the server from a browser, such as http://localhost:3000.",
    )
    add_option_flags(
        parser, only=_DEFAULTS, options=Sampling, title="answers, unless a request says otherwise"
    )
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    sampling = Sampling(**given_options(arguments, Sampling))
    _check_address(arguments)
    runs = [find_run(name, arguments.runs_dir) for name in arguments.run]
    from dora_mlx.adapters.swapping import load_swappable
    from dora_mlx.server import AdapterServer

    adapters = load_swappable(runs, arguments.model, arguments.adapter, arguments.checkpoint)
    base_name = arguments.model or runs[0].read_config()["options"]["model"]
    server = AdapterServer(
        adapters,
        base_name,
        arguments.host,
        arguments.port,
        sampling,
        arguments.allow_origin,
    )
    print(f"Serving {', '.join(server.names)} at {server.url}", flush=True)
    with _interrupted_by(signal.SIGTERM), suppress(KeyboardInterrupt):
        server.run()
    print("Stopped.", flush=True)
    # Threads of connections that are still open cannot be joined, and an interpreter that ends
    # under one of them has been seen to abort. Everything is closed, so the process just ends.
    os._exit(0)


def _check_address(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port must be between 0 and 65535 but is {arguments.port}.")
    if not _is_loopback(arguments.host) and not arguments.allow_network:
        raise UserError(
            f"--host {arguments.host} lets other machines use this one's models, without a "
            "password. Say --allow-network as well if that is what you want."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, which may stand for any address.
        return False


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Within the block, a signal does what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


if __name__ == "__main__":
    sys.exit(main())
