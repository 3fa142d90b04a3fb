"""What other pages, other users and evil input try, against the app as it runs."""

import contextlib
import functools
import http.server
import itertools
import json
import re
import threading
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Server

SECRET = "TOP-SECRET-7f3a"

# A page on another port of this machine, such as one that a notebook server shows.
EVIL_PAGE = """
<form id=form method=post enctype=multipart/form-data action="{url}/gradio_api/upload">
  <input name=files value=x></form>
<iframe src="{url}/"></iframe>
<script>
const tell = (name, value) => (document.title += ` ${{name}}=${{value}}`);
const attempt = (name, promise) =>
  promise.then((r) => tell(name, r.type), () => tell(name, "failed"));
const data = new FormData();
data.append("files", new Blob(["x".repeat(1000)]), "evil.jsonl");
Promise.all([
  attempt("read", fetch("{url}/config", {{credentials: "include"}})),
  attempt("join", fetch("{url}/gradio_api/queue/join",
    {{method: "POST", mode: "no-cors", body: '{{"fn_index": 0, "data": []}}'}})),
  attempt("upload", fetch("{url}/gradio_api/upload",
    {{method: "POST", mode: "no-cors", body: data}})),
]).then(() => tell("all", "done"));
</script>
"""


@pytest.fixture
def evil_page(server, tmp_path):
    """The address of another program's page, which attacks the app."""
    (tmp_path / "index.html").write_text(EVIL_PAGE.format(url=server.url))
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://localhost:{other.server_port}/"
        other.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_page_of_another_port_can_neither_read_nor_write_nor_frame(browser, server, evil_page):
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        answers = {}
        page.on("response", lambda r: answers.setdefault(r.url.removeprefix(server.url), r.status))
        page.goto(evil_page)
        expect(page).to_have_title(re.compile("all=done"))
        for attempt in ("read", "join", "upload"):
            assert f"{attempt}=failed" in page.title()
        assert answers["/"] == 403
        with page.expect_response(f"{server.url}/gradio_api/upload") as sent:
            page.locator("#form").evaluate("form => form.submit()")
        assert sent.value.status == 403


def test_rebound_name_gets_nothing(server):
    for path in ("/", "/config", "/gradio_api/queue/data", "/exports/x"):
        assert httpx.get(server.url + path, headers={"host": "evil.test"}).status_code == 421


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={secret}",
        "/gradio_api/file=..{secret}",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=https://example.com/",
        "/file={secret}",
        "/exports/{secret}",
        "/exports/..%2f..%2fsecret.txt",
        "/exports/../secret.txt",
        "/exports/%2e%2e/secret.txt",
        "/exports/link.gguf",
        "/exports/linked/secret.txt",
        "/exports/.hidden",
        "/exports/folder/sub/deep.txt",
        "/exports/",
        "/monitoring",
        "/monitoring/summary",
        "/openapi.json",
        "/docs",
        "/static/..%2f..%2f..%2fpyproject.toml",
    ],
)
def test_no_path_leads_out_of_the_exports(server, secret, path):
    exports = server.exports_dir
    exports.mkdir(exist_ok=True)
    (exports / ".hidden").write_text(SECRET)
    (exports / "folder" / "sub").mkdir(parents=True, exist_ok=True)
    (exports / "folder" / "sub" / "deep.txt").write_text(SECRET)
    for link, target in (("link.gguf", secret), ("linked", secret.parent)):
        with contextlib.suppress(FileExistsError):
            (exports / link).symlink_to(target)
    with httpx.Client(base_url=server.url) as client:
        request = client.build_request("GET", "/")
        # As it is: a client would tidy the dots away.
        request.url = request.url.copy_with(raw_path=path.format(secret=secret).encode())
        reply = client.send(request)
    assert reply.status_code in (403, 404), reply.text
    assert SECRET not in reply.text


@pytest.fixture
def secret(server):
    path = server.runs_dir.parent / "secret.txt"
    path.write_text(SECRET)
    return path


def test_exports_are_downloaded_as_they_lie(server):
    folder = server.exports_dir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "<b>.html").write_bytes(b"<script>alert(1)</script>")
    reply = httpx.get(f"{server.url}/exports/model/%3Cb%3E.html")
    assert reply.content == b"<script>alert(1)</script>"
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"].startswith("attachment")
    part = httpx.get(f"{server.url}/exports/model/%3Cb%3E.html", headers={"range": "bytes=1-6"})
    assert (part.status_code, part.content) == (206, b"script")


def test_large_exports_are_streamed_from_the_disk(server):
    """Neither in memory nor in a temporary file is there ever a copy of one."""
    size, end = 3_000_000_000, b"the end"
    server.exports_dir.mkdir(exist_ok=True)
    file = server.exports_dir / "huge.gguf"
    with file.open("wb") as sparse:
        sparse.seek(size - len(end))
        sparse.write(end)
    url = f"{server.url}/exports/huge.gguf"
    before = server.resident_bytes()
    part = httpx.get(url, headers={"range": f"bytes={size - len(end)}-"})
    assert (part.status_code, part.content) == (206, end)
    with httpx.stream("GET", url) as reply:
        assert reply.headers["content-length"] == str(size)
        read = 0
        for piece in reply.iter_raw():
            read += len(piece)
            if read > 200_000_000:
                break
    file.unlink()
    assert server.resident_bytes() - before < 50_000_000
    kept = sum(path.stat().st_size for path in server.temporary.rglob("*") if path.is_file())
    assert kept < 1_000_000


def test_large_bodies_are_refused_before_they_are_read(server):
    reply = httpx.post(f"{server.url}/gradio_api/queue/join", content=b"[" + b" " * 5_000_000)
    assert reply.status_code == 413


def test_every_event_survives_evil_input_and_gives_nothing_away(tmp_path):
    """All that a browser can call, called by hand: hidden events are no secret."""
    # A server of its own: the runs of other tests could be resumed, renamed and deleted here.
    server = Server(tmp_path).start()
    try:
        _call_every_event(server)
    finally:
        server.kill()


def _call_every_event(server):
    secret = server.runs_dir.parent / "secret.txt"
    secret.write_text(SECRET)
    evil = (
        str(secret),
        "../../secret.txt",
        "\N{SNOWMAN}<img src=x onerror=alert(1)>",
        {"path": str(secret), "meta": {"_type": "gradio.FileData"}},
    )
    with httpx.Client(base_url=server.url, timeout=60) as client:
        config = client.get("/config").json()
        kinds = {component["id"]: component["type"] for component in config["components"]}
        before = _tree(server)
        for dependency, value in itertools.product(config["dependencies"], evil):
            data = [None if kinds[to] == "state" else value for to in dependency["inputs"]]
            assert SECRET not in _call(client, dependency["id"], data)
        assert _tree(server) == before
        assert client.get(f"/gradio_api/file={secret}").status_code == 403


def _call(client, number: int, data) -> str:
    """Everything that an event answers, as text."""
    call = {"fn_index": number, "data": data, "session_hash": "evil", "event_data": {"run": "../x"}}
    reply = client.post("/gradio_api/run/predict", json=call)
    joined = client.post("/gradio_api/queue/join", json=call)
    if joined.status_code != 200:
        return reply.text + joined.text
    said = [reply.text]
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "evil"}) as events:
        for line in events.iter_lines():
            said.append(line)
            if line.startswith("data:") and json.loads(line[5:]).get("msg") in (
                "process_completed", "close_stream", "unexpected_error",
            ):  # fmt: skip
                break
    return "".join(said)


def _tree(server) -> dict[Path, bytes]:
    """Every file that the app could have written, and what is in it."""
    files = {path for path in server.runs_dir.parent.rglob("*") if path.is_file()}
    return {path: path.read_bytes() for path in files - {server.terminal}}


def test_browser_keeps_no_history(page):
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-name :is(input, textarea)").fill("my-private-name")
    page.locator("#train-name :is(input, textarea)").blur()
    expect(page.locator("#train-start")).to_be_visible()
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )
    assert "private" not in kept


def test_theme_is_chosen_and_kept(page):
    dark = page.locator("body.dark")
    expect(dark).to_have_count(0)
    page.get_by_role("button", name="Switch between light and dark").click()
    expect(dark).to_have_count(1)
    page.reload()
    expect(dark).to_have_count(1)
