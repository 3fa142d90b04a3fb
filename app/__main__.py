"""``python -m app``: the whole job in a browser, from a data file to an exported model."""

import argparse
import getpass
import os
import socket
import sys
import tempfile
import webbrowser
from contextlib import ExitStack
from pathlib import Path

from app.guard import Login, is_loopback
from dora_mlx import UserError, run_command

DEFAULT_PORT = 7860
_PORTS_TRIED = 20

DESCRIPTION = """\
Fine-tune in the browser: check data, train with live charts, chat, export.

The page is served to this machine alone. To open it from another one, name an address of this
machine by --host; everyone who asks for the page then has to log in.
"""

EXAMPLES = """\
examples:
  python -m app
  python -m app --runs-dir ~/runs --port 8000
  python -m app --host 0.0.0.0 --auth ada
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and serve until Ctrl-C; returns the exit code."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        login = _login(arguments.auth, arguments.host)
        return _serve(arguments, login, _listen(arguments.host, arguments.port))

    return run_command(body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="Address to serve at. Default: 127.0.0.1, this machine alone.",
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=int,
        help=f"Port to serve at. Default: {DEFAULT_PORT}, or the next free one.",
    )
    parser.add_argument(
        "--auth",
        metavar="NAME[:PASSWORD]",
        help="Ask for this name and password; without one here it is asked for now.",
    )
    parser.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="Folder that holds the runs. Default: runs.",
    )
    parser.add_argument(
        "--exports-dir",
        metavar="DIR",
        type=Path,
        default=Path("exports"),
        help="Folder that exported models go to. Default: exports.",
    )
    parser.add_argument("--no-browser", action="store_true", help="Open no browser window.")
    return parser


def _login(given: str | None, host: str) -> Login | None:
    """The login to ask for.

    Raises:
        UserError: If other machines could use the app without one.
    """
    if given is None:
        if is_loopback(host):
            return None
        raise UserError(
            f"--host {host} opens the app to other machines, so it needs a password: add "
            "--auth NAME."
        )
    name, _, password = given.partition(":")
    if name and not password:
        password = getpass.getpass(f"Password for {name}: ")
    if not name or not password:
        raise UserError("--auth needs a name and a password.")
    return Login(name, password)


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; without a port of one's own, at the first free one.

    Raises:
        UserError: If the address cannot be served at.
    """
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem = ""
    for candidate in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen()
            return listener
        except (OSError, OverflowError) as error:
            listener.close()
            problem = getattr(error, "strerror", None) or str(error)
    which = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise UserError(f"Cannot serve at {host}, {which}: {problem}. Choose another by --port.")


def _serve(arguments: argparse.Namespace, login: Login | None, listener: socket.socket) -> int:
    from app.server import build_server, serve

    host, port = arguments.host, listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else "localhost" if is_loopback(host) else host
    url = f"http://{shown}:{port}"
    print("Starting ...", flush=True)
    with ExitStack() as ending:
        temporary = ending.enter_context(tempfile.TemporaryDirectory(prefix="dora_mlx-"))
        server, context = build_server(
            arguments.runs_dir.expanduser().absolute(),
            arguments.exports_dir.expanduser().absolute(),
            Path(temporary),
            host,
            login,
        )
        ending.callback(context.close)
        print(f"dora_mlx is at {url}  (Ctrl-C ends it; a training goes on)", flush=True)
        if not arguments.no_browser and _has_display():
            webbrowser.open(url)
        serve(server, listener, ending.close)
    return 1


def _has_display() -> bool:
    """Whether a browser can be opened beside the terminal and not inside it."""
    return sys.platform == "darwin" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


if __name__ == "__main__":
    sys.exit(main())
