"""The explorer's server: the documents in an atlas, shown to one browser on this machine. No torch.

Nothing from a request becomes part of a path. What can be asked for is a table that is made when the server starts, and
a document is sent only if it still has the size and the sha256 that the index gave it then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from virtual_weights.errors import RecordError, UsageError, VirtualWeightsError
from virtual_weights.record.durable import reading
from virtual_weights.report.format import FOLDER, FORMAT, INDEX

LOOPBACK = "127.0.0.1"
MAX_INDEX = 4 << 20
MAX_DOCUMENT = 1 << 30
MAX_DOCUMENTS = 10_000
PAGES = {
    "/": ("explorer.html", "text/html; charset=utf-8"),
    "/explorer.js": ("explorer.js", "text/javascript; charset=utf-8"),
    "/explorer.css": ("explorer.css", "text/css; charset=utf-8"),
    "/explorer.svg": ("explorer.svg", "image/svg+xml"),
    "/api/schema": ("explorer.schema.json", "application/schema+json"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every response."""

_JSON = "application/json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE = re.compile(r"[a-z0-9.-]{1,123}\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALLEST_COMPRESSED = 1024  # bytes
_GRACE = 2  # seconds that responses may still take after Ctrl-C


@final
@dataclass(frozen=True)
class Document:
    """A file of the explorer as its index describes it.

    Attributes:
        file: its bare name.
        size: its length in bytes.
        sha256: of its content, in hex.
    """

    file: str
    size: int
    sha256: str


@final
@dataclass(frozen=True)
class Index:
    """What the explorer of an atlas consists of.

    Attributes:
        content: of the index, as it is stored.
        documents: by name.
    """

    content: bytes
    documents: Mapping[str, Document]


def read_index(folder: Path) -> Index:
    """Read which documents the explorer of an atlas has.

    Args:
        folder: the atlas.

    Raises:
        UsageError: there is no such folder.
        RecordError: it has no explorer, or the index is not one that this version reads.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}",
            expected="an atlas with an explorer",
            do="make one with vweights map MODEL -o DIR",
        )
    if not os.path.lexists(folder / FOLDER):
        raise RecordError(
            f"{folder} has no explorer",
            expected=f"an atlas with a folder {FOLDER!r} in it",
            do=f"run vweights report {folder} to write it",
        )
    try:
        content = _read(folder, INDEX, MAX_INDEX)
        stored = json.loads(content)
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']!r:.80}")
        return Index(content, _documents(stored["documents"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"{folder / FOLDER / INDEX} cannot be used: {_reason(error)}",
            expected=f"an index of the format {FORMAT!r}, and regular files, no links",
            do=f"run vweights report {folder} to write it again",
        ) from error


def bundle() -> dict[str, bytes]:
    """The files of the page, as they are installed with the package.

    Raises:
        VirtualWeightsError: one is missing.
    """
    static = files("virtual_weights") / "report" / "static"
    try:
        return {name: (static / name).read_bytes() for name, _ in PAGES.values()}
    except OSError as error:
        raise VirtualWeightsError(
            f"the explorer's page cannot be read: {error}",
            expected="explorer.html, .js, .css, .svg and .schema.json in the installed package",
            do="install virtual-weights again",
        ) from error


def application(folder: Path, static: Mapping[str, bytes], token: str, hosts: frozenset[str]) -> ASGIApp:
    """The explorer of an atlas as an ASGI application.

    Args:
        folder: the atlas.
        static: content of the files that ``PAGES`` names, by name.
        token: what ``/?token=...`` must say, once, to open a session.
        hosts: values of the Host header that are answered, each with its port.

    Raises:
        UsageError: there is no such folder.
        RecordError: it has no explorer, or the index is not one that this version reads.
    """
    index = read_index(folder)
    table: dict[str, tuple[str, bytes | Document]] = {
        path: (media_type, static[name]) for path, (name, media_type) in PAGES.items()
    }
    table["/api/index"] = _JSON, index.content
    table |= {f"/api/documents/{name}": (_JSON, document) for name, document in index.documents.items()}
    door = _Door(token, hosts)
    return GZipMiddleware(_Explorer(folder, table, door), minimum_size=_SMALLEST_COMPRESSED, compresslevel=5)


def serve(
    folder: Path, port: int = 0, open_browser: bool = True, *, announce: Callable[[str], object] | None = None
) -> None:
    """Show the explorer of an atlas to one browser on this machine, until interrupted.

    Args:
        folder: the atlas.
        port: of 127.0.0.1; 0 takes any that is free.
        open_browser: whether to open the address in the default browser.
        announce: receives the address, which opens the explorer once, as soon as it answers.

    Raises:
        UsageError: there is no such folder, or the port is taken.
        RecordError: the atlas has no explorer, or one that this version does not read.
        VirtualWeightsError: the page is missing in this installation.
        KeyboardInterrupt: at the end.
    """
    static, token = bundle(), secrets.token_urlsafe(32)
    read_index(folder)  # before a port is taken
    with _listening(port) as listener:
        port = listener.getsockname()[1]
        hosts = frozenset({f"{LOOPBACK}:{port}", f"localhost:{port}"})
        # uvicorn chooses nothing by what else is installed, configures no logging, and believes no proxy
        config = uvicorn.Config(
            application(folder, static, token, hosts),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        address = f"http://{LOOPBACK}:{port}/?token={token}"
        if announce is not None:
            announce(address)
        if open_browser:  # in a thread, since some browsers return only when they are closed
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])


@final
class _Door:
    """Who is let in: requests to one address, from its own pages, of the session that the token opened."""

    def __init__(self, token: str, hosts: frozenset[str]) -> None:
        self._token: bytes | None = token.encode()
        self._session: bytes | None = None
        self._hosts = {host.encode() for host in hosts}
        # browsers keep the cookies of all ports of a host together, and two explorers may be open
        self._cookie = b"vweights-" + min(self._hosts).rpartition(b":")[2]

    def refusal(self, scope: Scope) -> Response | None:
        """Why a request is refused whoever sent it; None where it is not."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return _sentence(421, "This server answers only at the address that vweights serve printed.")
        if scope["method"] not in ("GET", "HEAD"):
            return _sentence(405, "This server only shows: it answers GET and HEAD.", Allow="GET, HEAD")
        sites, origins = _values(scope, b"sec-fetch-site"), _values(scope, b"origin")
        if any(site not in (b"same-origin", b"none") for site in sites) or any(
            origin != b"http://" + hosts[0] for origin in origins
        ):
            return _sentence(403, "This server answers only requests of its own pages.")
        return None

    def admits(self, scope: Scope) -> bool:
        """Whether a request has the cookie of the session."""
        cookies = b";".join(_values(scope, b"cookie")).split(b";")
        given = [
            value for name, _, value in (cookie.strip().partition(b"=") for cookie in cookies) if name == self._cookie
        ]
        session = self._session
        return session is not None and any(secrets.compare_digest(value, session) for value in given)

    def opened(self, scope: Scope) -> str | None:
        """The cookie of a new session, where a request has the token, which is spent then; else None."""
        prefix, said, given = scope["query_string"].partition(b"token=")
        if self._token is None or prefix or not said or not secrets.compare_digest(given, self._token):
            return None
        self._token, self._session = None, secrets.token_urlsafe(32).encode()
        return f"{self._cookie.decode()}={self._session.decode()}; HttpOnly; SameSite=Strict; Path=/"


@final
class _Explorer:
    """The application: a table from paths to what is sent, behind a door."""

    def __init__(self, folder: Path, table: Mapping[str, tuple[str, bytes | Document]], door: _Door) -> None:
        self._folder, self._table, self._door = folder, table, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            response = await self._answer(scope)
            if scope["method"] == "HEAD":
                response.body = b""
            await response(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response:
        if (refusal := self._door.refusal(scope)) is not None:
            return refusal
        path, at_token = scope["path"], scope["path"] == "/" and b"token=" in scope["query_string"]
        cookie = self._door.opened(scope) if at_token and scope["method"] == "GET" else None
        if cookie is not None:
            return _response(303, b"", Location="/", **{"Set-Cookie": cookie})
        if not self._door.admits(scope):
            what = "The token is wrong or was used before" if at_token else "This browser has no session"
            return _sentence(
                401, f"{what}. Start vweights serve again and open the address that it prints; it works once."
            )
        if at_token:
            return _response(303, b"", Location="/")
        # another spelling of a path, such as one with %61 for a, is another path
        if path not in self._table or (scope.get("raw_path") or path.encode()) != path.encode():
            return _sentence(404, "There is nothing here.")
        media_type, content = self._table[path]
        if isinstance(content, Document):
            try:
                content = await run_in_threadpool(_verified, self._folder, content)
            except (OSError, ValueError):
                return _sentence(
                    500,
                    f"The document {content.file} is not what it was when the server started. Write it again with "
                    "vweights report ATLAS, and start vweights serve again.",
                )
        return _response(200, content, **{"Content-Type": media_type})


def _documents(stored: Mapping[str, Any]) -> dict[str, Document]:
    if len(stored) > MAX_DOCUMENTS:
        raise ValueError(f"it has {len(stored):,} documents, more than {MAX_DOCUMENTS:,}")
    documents = dict[str, Document]()
    for name, entry in stored.items():
        file, size, sha256 = entry["file"], entry["bytes"], entry["sha256"]
        if not (
            _NAME.fullmatch(name)
            and _FILE.fullmatch(file)
            and _SHA256.fullmatch(sha256)
            and type(size) is int
            and 0 <= size <= MAX_DOCUMENT
        ):
            raise ValueError(f"its entry {name!r:.80} is not a plain file name, a size and a sha256")
        documents[name] = Document(file, size, sha256)
    return documents


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _read(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file of the explorer.

    Raises:
        OSError: it or the explorer's folder is not there, or is a link, a pipe or anything but a regular file.
        ValueError: it is larger than the limit.
    """
    with reading(folder, FOLDER, name) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def _verified(folder: Path, document: Document) -> bytes:
    """The content of a document.

    Raises:
        OSError: see ``_read``.
        ValueError: it is not what the index says.
    """
    content = _read(folder, document.file, document.size)
    if len(content) != document.size or hashlib.sha256(content).hexdigest() != document.sha256:
        raise ValueError("its size or its sha256 is another")
    return content


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(
            f"port {port} of {LOOPBACK} cannot be used: {error.strerror}",
            expected="a port that is free and that this user may take",
            do="name another with --port, or leave --port out",
        ) from error
    return listener


def _values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for header, value in scope["headers"] if header.lower() == name]


def _response(status: int, content: bytes, **headers: str) -> Response:
    return Response(content, status, {**HEADERS, **headers})


def _sentence(status: int, sentence: str, **headers: str) -> Response:
    return _response(status, f"{sentence}\n".encode(), **{"Content-Type": "text/plain; charset=utf-8"}, **headers)
