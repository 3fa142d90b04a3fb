"""The web server: guard, downloads and the page, in this order."""

import logging
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.guard import UPLOAD_LIMIT, Guard, Login, is_loopback

if TYPE_CHECKING:
    from app.context import Context


def build_server(
    runs_dir: Path, exports_dir: Path, temporary: Path, host: str, login: Login | None
) -> "tuple[Any, Context]":
    """The ASGI application, and what has to be closed at its end.

    Args:
        runs_dir: Where runs are and go.
        exports_dir: Where exports go and are served from.
        temporary: An empty folder of its own for uploads in passing.
        host: The address it will be bound to.
        login: The login to ask for, if any.
    """
    _tame_gradio(temporary)
    import gradio as gr
    from fastapi import FastAPI

    from app.context import Context
    from app.files import add_downloads
    from app.layout import build_page
    from app.run_watch import RunWatch
    from app.theme import head, theme
    from app.trainings import Trainings

    server = FastAPI(openapi_url=None)
    add_downloads(server, exports_dir)
    trainings = Trainings(runs_dir)
    context = Context(runs_dir, exports_dir, is_loopback(host), trainings, RunWatch(trainings))
    page = build_page(context)
    gr.mount_gradio_app(
        server,
        page,
        path="/",
        theme=theme(),
        head=head(),
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=UPLOAD_LIMIT,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    # Gradio's ``launch`` sets this, mounting does not, and without it every path of this machine
    # that a browser sends as a file is taken for an upload.
    page.has_launched = True
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return Guard(server, host, login), context


def serve(server: Any, listener: socket.socket, close: Callable[[], object]) -> None:
    """Serve until Ctrl-C or SIGTERM, which end this process; returns if it could not begin.

    Args:
        server: The ASGI application.
        listener: A listening socket.
        close: Called at the end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # A page keeps a connection open as long as it is shown, and a thread that answers one
            # cannot be interrupted: nothing would end in time that is waited for.
            close()
            print("Stopped.", flush=True)
            os._exit(0)

    Server(uvicorn.Config(server, log_level="warning", server_header=False)).run([listener])


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than that a page was reloaded in the middle of an event.

    Gradio refuses such a page's connection after it has begun to answer it, or forgets the page
    twice when both of its connections end.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, RuntimeError):
        return "response already started" not in str(error)
    if isinstance(error, KeyError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return frame.f_code.co_name != "sse_stream"
    return True


def _tame_gradio(temporary: Path) -> None:
    """Set what Gradio reads from the environment when it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
