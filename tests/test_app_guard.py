"""The guard around the app: what it lets through and what it stops, by HTTP."""

import asyncio
import sys

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from app import guard
from app.__main__ import main
from app.guard import Guard, Login, is_loopback


async def _echo(request):
    return JSONResponse({"size": len(await request.body())})


async def _open_to_all(request):
    return PlainTextResponse("x", headers={"Access-Control-Allow-Origin": "*"})


ROUTES = [
    Route("/", _open_to_all),
    Route("/config", _open_to_all),
    Route("/gradio_api/{rest:path}", _echo, methods=["GET", "POST"]),
]


def ask(path="/config", method="GET", host="127.0.0.1", login=None, **options):
    headers = {"host": "localhost:7860"} | options.pop("headers", {})
    server = Guard(Starlette(routes=ROUTES), host, login)

    async def send():
        transport = httpx.ASGITransport(app=server)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(send())


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST:1"])
def test_own_names_are_served(host):
    assert ask(headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.test", "localhost.evil.test:7860", "127.0.0.1.nip.test", "10.0.0.8", "", "[::1"]
)
def test_rebound_names_are_not_served(host):
    # DNS rebinding: the browser believes to talk to evil.test while the address is 127.0.0.1.
    assert ask(headers={"host": host}).status_code == 421


def test_lan_address_is_served_only_when_bound_to_it():
    login = Login("ada", "secret")
    reply = ask(
        host="0.0.0.0", headers={"host": "10.0.0.8:7860"}, login=login, auth=("ada", "secret")
    )
    assert reply.status_code == 200
    assert ask(host="0.0.0.0", headers={"host": "evil.test"}, login=login).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.test"},
        # Another program's page on this machine, such as a notebook server.
        {"origin": "http://localhost:8888"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_pages_are_refused(headers):
    reply = ask("/gradio_api/queue/join", "POST", headers=headers, json={})
    assert reply.status_code == 403


def test_own_page_and_links_to_it_are_served():
    own = {"origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}
    assert ask("/gradio_api/queue/join", "POST", headers=own, json={}).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask("/", headers=link | {"sec-fetch-dest": "document"}).status_code == 200
    assert ask("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403
    assert ask("/config", headers=link | {"sec-fetch-dest": "document"}).status_code == 403


def test_bodies_are_capped(monkeypatch):
    monkeypatch.setattr(guard, "BODY_LIMIT", 1000)
    monkeypatch.setattr(guard, "UPLOAD_LIMIT", 2000)
    assert ask("/gradio_api/run/predict", "POST", content=b"9" * 1000).json() == {"size": 1000}
    assert ask("/gradio_api/run/predict", "POST", content=b"9" * 1001).status_code == 413
    assert ask("/gradio_api/upload", "POST", content=b"x" * 1001).json() == {"size": 1001}

    async def chunks():
        # Without a length in the header the cap is only met on the way.
        for _ in range(3):
            yield b"x" * 1000

    assert ask("/gradio_api/upload", "POST", content=chunks()).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [{"path": "http://example.com/x", "meta": {"_type": "gradio.FileData"}}]}',
        b'{"data": [{"path": "https://example.com/x", "path": "x"}]}',
        b'{"data": [{"p\\u0061th": "\\u0068ttp://example.com/x"}]}',
        '{"data": [{"path": "http://example.com/x"}]}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"data": ',
    ],
)
def test_no_event_names_a_file_of_another_machine(body):
    async def chunks():
        yield body[:25]
        yield body[25:]

    for content in (body, chunks()):
        assert ask("/gradio_api/queue/join", "POST", content=content).status_code == 400
    said = b'{"data": ["look at https://example.com", {"path": "/tmp/x", "url": "http://x"}]}'
    reply = ask("/gradio_api/queue/join", "POST", content=said)
    assert reply.json() == {"size": len(said)}


@pytest.mark.parametrize(
    "path",
    [
        # Gradio would fetch it, edit its own code, and convert what it is sent.
        "/gradio_api/file=https://example.com/x",
        "/gradio_api/file=HTTP%3A//example.com",
        "/gradio_api/vibe-edit/",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
        "/gradio_api/dev/reload",
        "/gradio_api/openapi.json",
        "/openapi.json",
        "/docs",
        "/monitoring/summary",
        "/login",
    ],
)
def test_what_the_page_does_not_need_is_not_there(path):
    assert ask(path).status_code == 404


def test_every_answer_has_the_policy_and_none_is_for_others():
    for reply in (ask(), ask(headers={"host": "evil.test"})):
        policy = reply.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "form-action 'none'" in policy
        assert "img-src 'self' data: blob:" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in reply.headers


def test_login_is_asked_for(monkeypatch):
    monkeypatch.setattr(guard, "_SECONDS_AFTER_A_WRONG_PASSWORD", 0)
    login = Login("ada", "s:cret")
    assert ask(login=login).headers["www-authenticate"].startswith("Basic")
    for wrong in (("ada", "secret"), ("eve", "s:cret"), ("", "")):
        assert ask(login=login, auth=wrong).status_code == 401
    for header in ("Basic", "Basic %%%", "Bearer abc", "Basic YWRh"):
        assert ask(login=login, headers={"authorization": header}).status_code == 401
    assert ask(login=login, auth=("ada", "s:cret")).status_code == 200


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.0.0.2", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.com"]))


def test_incomplete_installation_and_missing_login_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--port", "0", "--no-browser"]) == 2
    assert capsys.readouterr().err.startswith("error: the installation is not complete: gradio")
    assert main(["--host", "0.0.0.0", "--no-browser"]) == 2
    assert "add --auth NAME" in capsys.readouterr().err
