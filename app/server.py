"""The web server: guard, downloads and the page, in this order."""

import logging
import os
from pathlib import Path
from typing import Any

from app.guard import UPLOAD_LIMIT, Guard, Login, is_loopback


def build_server(
    runs_dir: Path, exports_dir: Path, temporary: Path, host: str, login: Login | None
) -> Any:
    """The ASGI application.

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
    return Guard(server, host, login)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than that a page was reloaded in the middle of an event.

    Gradio refuses such a page's connection after it has begun to answer it.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, RuntimeError) and "response already started" in str(error))


def _tame_gradio(temporary: Path) -> None:
    """Set what Gradio reads from the environment when it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
