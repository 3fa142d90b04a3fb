"""What a request has to pass before Gradio sees it.

Gradio trusts every page that is open in a browser on this machine: another port of localhost is a
friend to it, and a foreign name that resolves to 127.0.0.1 (DNS rebinding) too. This middleware
goes around the whole application, outside Gradio's own CORS handling.
"""

import asyncio
import base64
import binascii
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

# The types of ASGI are open dictionaries; spelled out they would say no more than this.
Scope = dict[str, Any]
Message = dict[str, Any]

UPLOAD_PATH = "/gradio_api/upload"
UPLOAD_LIMIT = 500_000_000
BODY_LIMIT = 4_000_000

# What the page needs. Gradio serves more: its own API description, an editor that writes code, a
# converter of recordings, a fetcher of other machines' files.
_OWN_PATHS = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(assets|static|svelte|exports)/.*"
    r"|gradio_api/(info|app_id|startup-events|theme\.css|upload|upload_progress|cancel|reset"
    r"|(run|queue|heartbeat)/.*|file=(?!https?:).*))"
)

# Gradio's page starts from inline scripts, and its HTML component compiles templates (eval).
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# CORS is nobody's here: a page of another origin has nothing to read.
_DROPPED_HEADERS = (b"access-control-allow-origin", b"access-control-allow-credentials")

_SECONDS_AFTER_A_WRONG_PASSWORD = 1.0


@dataclass(frozen=True)
class Login:
    """The one name and password that open the app."""

    user: str
    password: str

    def accepts(self, header: str) -> bool:
        """Whether an ``Authorization`` header carries this login (HTTP Basic)."""
        scheme, _, encoded = header.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return secrets.compare_digest(given, f"{self.user}:{self.password}".encode())


class _Refused(Exception):
    """A request that ends here, with a status and a sentence."""

    def __init__(self, status: int, reason: str, headers: Iterable[tuple[bytes, bytes]] = ()):
        super().__init__(reason)
        self.status = status
        self.headers = list(headers)


class _Exchange:
    """One request and its answer: counts the bytes of the one, sets the headers of the other."""

    def __init__(self, scope: Scope, receive: Any, send: Any):
        self._receive, self._send = receive, send
        self._uploads = scope["path"] == UPLOAD_PATH
        self._limit = UPLOAD_LIMIT if self._uploads else BODY_LIMIT
        self._received = 0
        self._answered = False
        self.refusal: _Refused | None = None

    def check_length(self, headers: dict[str, bytes]) -> None:
        """Refuse a body that is announced as too large."""
        if int(headers.get("content-length", b"0")) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of an upload, or any other body as a whole when it was looked at."""
        message = await self._part()
        if self._uploads:
            return message
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await self._part()
            body += message.get("body", b"")
        if body and not _is_harmless(body):
            self._refuse(_Refused(400, "This is no request of the app's page."))
        return {**message, "body": body} if message["type"] == "http.request" else message

    async def _part(self) -> Message:
        """The next message, as long as all parts of the body stay within the limit."""
        message: Message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            self._refuse(self._too_large())
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer; what the application says to a refused body is dropped."""
        if self.refusal is not None and not self._answered:
            return
        if message["type"] == "http.response.start":
            self._answered = True
            message = {**message, "headers": _own_headers(message.get("headers", []))}
        await self._send(message)

    async def close(self) -> None:
        """Answer a request that was refused."""
        refusal, self.refusal = self.refusal, None
        if refusal is None or self._answered:
            return
        body = f"{refusal}\n".encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            *refusal.headers,
        ]
        await self.send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})

    def _refuse(self, refusal: _Refused) -> NoReturn:
        # Remembered, because what reads the body may answer the error in its own way.
        self.refusal = refusal
        raise refusal

    def _too_large(self) -> _Refused:
        return _Refused(413, f"At most {self._limit / 1e6:.0f} MB can be sent at once.")


class Guard:
    """ASGI middleware: own host names and own origin only, bounded bodies, a strict policy.

    Args:
        app: The application to protect.
        host: The address the server is bound to.
        login: Asked from every request when it is set.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", login: Login | None = None):
        self._app = app
        self._local = is_loopback(host)
        self._names = {"localhost", host.lower()}
        if not self._local:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name.split('.')[0]}.local"}
        self._login = login
        self._one_guess = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # The app has no websocket.
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = _Exchange(scope, receive, send)
        try:
            headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
            self._check_origin(scope, headers)
            _check_path(scope["path"])
            exchange.check_length(headers)
            await self._check_login(headers)
            await self._app(scope, exchange.receive, exchange.send)
        except _Refused as refusal:
            exchange.refusal = refusal
        await exchange.close()

    def _check_origin(self, scope: Scope, headers: dict[str, bytes]) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if not self._is_own(host):
            raise _Refused(421, "This address is not one of the app's.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            raise _Refused(403, "Requests from other pages are refused.")
        site = headers.get("sec-fetch-site", b"none")
        if site not in (b"none", b"same-origin") and not _opens_the_page(scope, headers):
            raise _Refused(403, "Requests from other pages are refused.")

    def _is_own(self, host: str) -> bool:
        """Whether a ``Host`` header names this server; a rebound name is never an IP address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._local

    async def _check_login(self, headers: dict[str, bytes]) -> None:
        if self._login is None:
            return
        given = headers.get("authorization", b"").decode("latin-1")
        if self._login.accepts(given):
            return
        if given:
            # One wrong password a second in all, however many connections are open.
            async with self._one_guess:
                await asyncio.sleep(_SECONDS_AFTER_A_WRONG_PASSWORD)
        ask = (b"www-authenticate", b'Basic realm="dora_mlx", charset="UTF-8"')
        raise _Refused(401, "Log in with the name and password given by --auth.", [ask])


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _opens_the_page(scope: Scope, headers: dict[str, bytes]) -> bool:
    """Whether this is a link on another page that leads here, which shows it nothing."""
    return (
        scope["method"] == "GET"
        and scope["path"] == "/"
        and headers.get("sec-fetch-mode") == b"navigate"
        and headers.get("sec-fetch-dest") == b"document"
    )


def _check_path(path: str) -> None:
    if not _OWN_PATHS.fullmatch(unquote(path).lower()):
        raise _Refused(404, "There is no such page.")


def _is_harmless(body: bytes) -> bool:
    """Whether a body is JSON in which no file is one of another machine.

    Gradio loads a file that is named by an address, whatever component it is sent for.
    """

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Every pair, because parsers differ in which of two equal keys they take.
        for key, value in pairs:
            if key == "path" and isinstance(value, str) and "://" in value:
                raise ValueError(value)
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=check)
    except (ValueError, RecursionError):
        return False
    return True


def _own_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    own = {name.encode(): value.encode() for name, value in SECURITY_HEADERS.items()}
    passed = [
        (name, value)
        for name, value in headers
        if name.lower() not in own and name.lower() not in _DROPPED_HEADERS
    ]
    return [*passed, *own.items()]
