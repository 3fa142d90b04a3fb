"""The app in headless Chromium: a real server, a real browser, real trainings of the starter."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Long enough for a machine that is busy with other things; nothing waits so long when all is well.
PATIENCE_MS = 180_000

playwright.expect.set_options(timeout=PATIENCE_MS)


class Server:
    """``python -m app`` on a port of its own; ``restart`` keeps its folders."""

    def __init__(self, place: Path):
        self.runs_dir, self.exports_dir = place / "runs", place / "exports"
        self.temporary = place / "temporary"
        self.url = ""
        self.terminal = place / "terminal.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self, port: int = 0) -> "Server":
        words = ["--no-browser", "--port", str(port)]
        words += ["--runs-dir", str(self.runs_dir), "--exports-dir", str(self.exports_dir)]
        self.temporary.mkdir(parents=True, exist_ok=True)
        with self.terminal.open("a") as terminal:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", *words],
                stdout=subprocess.PIPE,
                stderr=terminal,
                text=True,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )
        for line in self._process.stdout:
            if " is at http" in line:
                self.url = line.split(" is at ")[1].split()[0]
                return self
        raise RuntimeError(f"the app did not start: {self.terminal.read_text()}")

    def resident_bytes(self) -> int:
        """Memory that the server's own process holds."""
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self._process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        return 1024 * int(shown.stdout)

    def kill(self) -> None:
        """As a crash would end it."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.start(int(self.url.rsplit(":", 1)[1]))

    def stop(self) -> None:
        """As Ctrl-C ends it: with all its workers, whatever they do and whoever looks."""
        workers = self._workers("--parent", str(self._process.pid))
        self._process.send_signal(signal.SIGINT)
        try:
            assert self._process.wait(PATIENCE_MS / 1000) == 0
        finally:
            self.kill()
        assert not workers & self._workers()

    def _workers(self, *of: str) -> set[str]:
        listed = subprocess.run(
            ["pgrep", *of, "--full", "multiprocessing-fork"],
            capture_output=True,
            text=True,
            check=False,
        )
        return set(listed.stdout.split())


# Playwright keeps an event loop running in this thread, in which no other test could run its own:
# it ends with this package, not with the session.
@pytest.fixture(scope="package")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install it, or name one in the variable CHROMIUM")
    with playwright.sync_playwright() as tool:
        # Without a sandbox, because tests run as root in containers; only our own page is opened.
        chromium = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def server(browser, tmp_path_factory):
    """One app for all tests: its start and its first look at a model cost seconds."""
    running = Server(tmp_path_factory.mktemp("app")).start()
    yield running
    page = browser.new_page()
    page.goto(running.url)
    page.locator('#tabs [role="tab"]').first.wait_for()
    running.stop()
    page.close()
    assert "Traceback" not in running.terminal.read_text()


@pytest.fixture
def open_page(browser, server):
    """Opens the app in windows of their own; fails if one asks another machine or complains."""
    faults: list[str] = []
    contexts = []

    def open_one(tab: str = "", **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: faults.append(f"error on the page: {error}"))
        page.on("console", lambda message: _note(faults, message))
        page.on("request", lambda request: _check(faults, request, server.url))
        page.goto(f"{server.url}/#{tab}")
        page.locator('#tabs [role="tab"]').first.wait_for()
        return page

    open_one.faults = faults
    yield open_one
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(open_page):
    """One window with the app."""
    return open_page()


# Gradio's own: when a page is left in the middle of an event, and when its chat is shown.
_HARMLESS = (
    "signal is aborted without reason",
    "Connection errored out",
    "Method not implemented.",
)


def _note(faults: list[str], message) -> None:
    harmless = any(text in message.text for text in _HARMLESS)
    if message.type in ("error", "warning") and not harmless:
        faults.append(f"{message.type} in the console: {message.text}")


def _check(faults: list[str], request, own: str) -> None:
    if not request.url.startswith((own, "data:", "blob:")):
        faults.append(f"asked another machine: {request.url}")
