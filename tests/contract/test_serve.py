"""The explorer's server shows the documents of one atlas to one browser, and nothing to anybody else."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from starlette.types import ASGIApp

from virtual_weights.cli import run as command
from virtual_weights.cli import serve as verb
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.report.serve import FORMAT, HEADERS, PAGES, application, bundle, read_index, serve

Capture = pytest.CaptureFixture[str]
PORT = 8765
HOST = f"127.0.0.1:{PORT}"
HOSTS = frozenset({HOST, f"localhost:{PORT}"})
TOKEN = "the-token-of-these-tests"
CANARY = b"canary"  # in every file of the atlas and beside it
STATIC = {name: f"page {name}".encode() for name, _ in PAGES.values()}
DOCUMENTS = {"map": b'{"canary": "map"}', "pairs-K": b'{"canary": "' + b"pairs " * 400 + b'"}'}
PATHS = [*PAGES, "/api/index", *(f"/api/documents/{name}" for name in DOCUMENTS)]
COOKIE = re.compile(r"(vweights-\d+=[\w-]{43}); HttpOnly; SameSite=Strict; Path=/")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def write_explorer(folder: Path) -> Path:
    """An atlas with an explorer, and files that nobody may see in it and beside it."""
    (folder / "explorer").mkdir(parents=True)
    entries = {}
    for name, content in DOCUMENTS.items():
        file = f"{name.lower()}.json"
        (folder / "explorer" / file).write_bytes(content)
        entries[name] = {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    index = {"format": FORMAT, "canary": 1, "documents": entries}
    (folder / "explorer" / "index.json").write_text(json.dumps(index))
    for secret in ("explorer/secret.json", "explorer/secret", "secret.json", "manifest.json", "../secret.json"):
        (folder / secret).write_bytes(CANARY)
    return folder


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    return write_explorer(tmp_path / "beside" / "atlas")


@pytest.fixture
def app(atlas: Path) -> ASGIApp:
    return application(atlas, STATIC, TOKEN, HOSTS)


def ask(
    app: ASGIApp, target: str, *headers: tuple[str, str], method: str = "GET", host: str | None = HOST, **scope: Any
) -> Reply:
    """What the application answers; the path is decoded as uvicorn does it."""
    path, _, query = target.partition("?")
    pairs = [*([] if host is None else [("host", host)]), *headers]
    raw = [(name.lower().encode(), value.encode("utf-8")) for name, value in pairs]
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": raw,
        **scope,
    }
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    start, *rest = messages
    said = {name.decode(): value.decode() for name, value in start["headers"]}
    assert len(said) == len(start["headers"]), "no header twice"
    assert {name: said.get(name.lower()) for name in HEADERS} == HEADERS
    return Reply(start["status"], said, b"".join(message.get("body", b"") for message in rest))


def opened(app: ASGIApp) -> tuple[str, str]:
    """The header of the session that the token opens."""
    match = COOKIE.fullmatch(ask(app, f"/?token={TOKEN}").headers["set-cookie"])
    assert match is not None
    return ("cookie", match[1])


def is_refusal(reply: Reply, *statuses: int) -> bool:
    """Whether a reply is one plain sentence, and nothing of the atlas, the disk or the bundle is in it."""
    texts = (CANARY, b"page explorer", b"secret", os.sep.encode() + b"tmp", b"Traceback", b"root:")
    plain = reply.headers["content-type"].startswith("text/plain") and reply.body.count(b"\n") == 1
    return reply.status in statuses and plain and not any(text in reply.body for text in texts)


def test_the_browser_with_the_token_sees_the_documents_and_the_page(atlas: Path, app: ASGIApp) -> None:
    first = ask(app, f"/?token={TOKEN}")
    assert (first.status, first.headers["location"], first.body) == (303, "/", b"")
    match = COOKIE.fullmatch(first.headers["set-cookie"])
    assert match is not None
    assert TOKEN not in match[1]
    replies = {path: ask(app, path, ("cookie", f"other=1; {match[1]}")) for path in PATHS}
    assert {reply.status for reply in replies.values()} == {200}
    assert [reply.body for reply in replies.values()] == [
        *STATIC.values(),
        (atlas / "explorer" / "index.json").read_bytes(),
        *DOCUMENTS.values(),
    ]
    kinds = [reply.headers["content-type"].partition(";")[0] for reply in replies.values()]
    pages = ["text/html", "text/javascript", "text/css", "image/svg+xml", "application/schema+json"]
    assert kinds == [*pages, *["application/json"] * 3]


def test_documents_are_compressed_for_who_takes_it(app: ASGIApp) -> None:
    session = opened(app)
    reply = ask(app, "/api/documents/pairs-K", session, ("accept-encoding", "gzip, br"))
    assert reply.headers["content-encoding"] == "gzip"
    assert int(reply.headers["content-length"]) == len(reply.body) < len(DOCUMENTS["pairs-K"])
    assert gzip.decompress(reply.body) == DOCUMENTS["pairs-K"]


def test_head_has_the_headers_and_no_content(app: ASGIApp) -> None:
    reply = ask(app, "/api/documents/map", opened(app), method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert int(reply.headers["content-length"]) == len(DOCUMENTS["map"])


def test_the_token_works_once(app: ASGIApp) -> None:
    session = opened(app)
    assert is_refusal(ask(app, f"/?token={TOKEN}"), 401)
    again = ask(app, f"/?token={TOKEN}", session)
    assert (again.status, again.headers["location"]) == (303, "/")
    assert "set-cookie" not in again.headers


def test_looking_at_the_address_does_not_spend_the_token(app: ASGIApp) -> None:
    assert is_refusal_of_head(ask(app, f"/?token={TOKEN}", method="HEAD"))
    assert is_refusal(ask(app, f"/api/index?token={TOKEN}"), 401)
    assert is_refusal(ask(app, f"/?token={TOKEN}", host="evil.example"), 421)
    assert is_refusal(ask(app, f"/?token={TOKEN}", ("sec-fetch-site", "cross-site")), 403)
    opened(app)


def is_refusal_of_head(reply: Reply) -> bool:
    return (reply.status, reply.body, "set-cookie" in reply.headers) == (401, b"", False)


@pytest.mark.parametrize(
    "query",
    "- ?token ?token= ?token=wrong ?token=TOKENx ?token=xTOKEN ?x=1&token=TOKEN ?token=TOKEN&x=1 ?token=%74TOKEN "
    "?tokens=TOKEN ?token=THE-TOKEN-OF-THESE-TESTS ?token=\u00e9".split(),
)
def test_without_the_token_nothing_opens(query: str, app: ASGIApp) -> None:
    reply = ask(app, f"/{query.lstrip('-').replace('TOKEN', TOKEN)}")
    assert is_refusal(reply, 401)
    assert "set-cookie" not in reply.headers


def test_without_the_cookie_of_the_session_there_is_nothing(app: ASGIApp) -> None:
    before = [ask(app, path, ("cookie", f"vweights-{PORT}=None")) for path in PATHS]
    name, _, value = opened(app)[1].partition("=")
    wrong = ["", name, f"{name}=", f"{name}={value}x", f"{name}={value[:-1]}", f"{name}={TOKEN}", f"x={value}"]
    wrong += [f"x{name}={value}", f"{name}=\u00e9", f'{name}="{value}"', value, f"{name}={value.swapcase()}"]
    after = [ask(app, path, ("cookie", cookie)) for path in PATHS for cookie in wrong]
    assert all(is_refusal(reply, 401) for reply in [*before, *after, ask(app, "/nothing")])


def fuzzed_paths() -> list[str]:
    """1,000 paths, none of which is one of the table."""
    draw = random.Random(0)
    words = "secret.json ../secret.json manifest.json index.json explorer map.json map api documents etc/passwd".split()
    joints = [
        "/",
        "//",
        "/./",
        "/../",
        "\\",
        "\\..\\",
        "%2f",
        "%5c",
        "%2e%2e%2f",
        "%00",
        "%252e%252e%252f",
        ";/",
        "/\u2215",
    ]
    heads = ["", "/", "//", "/api/", "/api/documents/", "/api/documents/../", "http://evil.example/", f"http://{HOST}"]
    heads += ["file:///", "/explorer/", "/static/", "\\\\", "/.", "*", "/api/index/", "/api/documents/map/"]
    paths = ["", "*", "/" * 5000, "/api/documents/" + "a" * 70_000, "/..%2f" * 3000, f"http://{HOST}/api/index"]
    paths += [
        "/api/%69ndex",
        "/API/index",
        "/api/index/",
        "//api/index",
        "/api//index",
        "/./api/index",
        "/api/index%00",
    ]
    paths += ["/api/documents/map.json", "/api/documents/MAP", "/api/documents/", "/api/documents", "/explorer.html"]
    paths += ["/api/documents/m%61p", "/api/documents/map%20", "/api/documents/\uff4dap", "/api/documents/../index"]
    while len(paths) < 1000:
        pieces = [draw.choice(words) for _ in range(draw.randint(1, 4))]
        path = draw.choice(heads) + draw.choice(joints).join(pieces)
        where = draw.randrange(len(path) + 1)
        noise = ["", "", "", "%", "\0", "\u202e", "\u00e9", "%ff", "%c0%af", "?", "#", " ", "..;"]
        path = path[:where] + draw.choice(noise) + path[where:]
        if draw.random() < 0.2:
            path = quote(path, safe="")
        if draw.random() < 0.1:
            path = "".join(f"%{byte:02x}" for byte in path.encode())
        if path.partition("?")[0] not in PATHS:
            paths.append(path)
    return paths


def test_other_paths_lead_nowhere(app: ASGIApp) -> None:
    paths = fuzzed_paths()
    assert len(paths) == 1000
    assert len(set(paths)) > 900
    session = opened(app)
    assert [path for path in paths if not is_refusal(ask(app, path, session), 404)] == []
    assert [path for path in paths[::10] if not is_refusal(ask(app, path), 401)] == []


def fuzzed_hosts() -> list[str]:
    names = [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "evil.example",
        "127.0.0.1.evil.example",
    ]
    names += ["LOCALHOST", "localhost.", "127.0.0.1.", "user@127.0.0.1", "127.0.0.2", "[::ffff:127.0.0.1]", "\u00e9"]
    ends = ["", ":", f":{PORT + 1}", f":{PORT}/", f":0{PORT}", f":{PORT}:{PORT}", f":{PORT}"]
    return [name + end for name in names for end in ends if name + end not in HOSTS]


def test_other_hosts_are_refused(app: ASGIApp) -> None:
    session, hosts = opened(app), [*fuzzed_hosts(), "", " ", f" {HOST}", f"{HOST} ", f"{HOST},{HOST}", f"http://{HOST}"]
    assert len(hosts) >= 60
    for host in hosts:
        for path in ("/", "/api/documents/map"):
            assert is_refusal(ask(app, path, session, host=host), 421), host
    assert is_refusal(ask(app, "/api/index", session, host=None), 421)
    assert is_refusal(ask(app, "/api/index", session, ("host", HOST)), 421), "twice the same"
    assert is_refusal(ask(app, "/api/index", session, ("x-forwarded-host", HOST), host="evil.example"), 421)
    assert ask(app, "/api/index", session, host=f"localhost:{PORT}").status == 200


@pytest.mark.parametrize("method", "POST PUT DELETE PATCH OPTIONS TRACE CONNECT PROPFIND get".split())
def test_nothing_but_get_and_head(method: str, app: ASGIApp) -> None:
    session = opened(app)
    reply = ask(app, "/api/documents/map", session, method=method)
    assert is_refusal(reply, 405)
    assert reply.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),  # another port of this machine
        ("sec-fetch-site", "", 403),
        ("sec-fetch-site", "none", 200),
        ("sec-fetch-site", "same-origin", 200),
        ("origin", "null", 403),
        ("origin", "http://evil.example", 403),
        ("origin", f"http://localhost:{PORT}", 403),
        ("origin", f"http://127.0.0.1:{PORT + 1}", 403),
        ("origin", f"https://{HOST}", 403),
        ("origin", f"http://{HOST}", 200),
    ],
)
def test_other_sites_are_refused(name: str, value: str, status: int, app: ASGIApp) -> None:
    session = opened(app)
    for path in PATHS:
        reply = ask(app, path, session, (name, value))
        assert reply.status == status
        assert status == 200 or is_refusal(reply, 403)


def test_a_websocket_is_closed(app: ASGIApp) -> None:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(app({"type": "websocket", "path": "/", "headers": []}, send, send))  # type: ignore[arg-type]
    assert [message["type"] for message in messages] == ["websocket.close"]


def replace(path: Path, how: str) -> None:
    """Make a document another file than the index says."""
    content, elsewhere = path.read_bytes(), path.parent / "elsewhere"
    path.rename(elsewhere)
    if how == "link":
        path.symlink_to(elsewhere)
    elif how == "linked folder":
        elsewhere.rename(path)
        path.parent.rename(path.parents[1] / "moved")
        path.parent.symlink_to("moved")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"longer": content + b" ", "shorter": content[:-1], "other": content[::-1]}[how])


@pytest.mark.parametrize("how", ["link", "linked folder", "pipe", "folder", "gone", "longer", "shorter", "other"])
def test_a_document_that_changed_is_not_sent(how: str, atlas: Path, app: ASGIApp) -> None:
    session = opened(app)
    assert ask(app, "/api/documents/map", session).status == 200
    replace(atlas / "explorer" / "map.json", how)
    reply = ask(app, "/api/documents/map", session)
    assert is_refusal(reply, 500)
    assert b"map.json is not what it was" in reply.body
    assert ask(app, "/api/documents/pairs-K", session).status == (500 if how == "linked folder" else 200)


def test_size_and_kind_of_file_count_even_where_the_checksum_agrees(atlas: Path) -> None:
    content = DOCUMENTS["map"]
    sha256 = {value: hashlib.sha256(value).hexdigest() for value in (content, b"")}
    long = {"file": "map.json", "bytes": len(content) + 1, "sha256": sha256[content]}
    pipe = {"file": "pipe.json", "bytes": 0, "sha256": sha256[b""]}
    os.mkfifo(atlas / "explorer" / "pipe.json")
    index = {"format": FORMAT, "documents": {"long": long, "pipe": pipe}}
    (atlas / "explorer" / "index.json").write_text(json.dumps(index))
    app = application(atlas, STATIC, TOKEN, HOSTS)
    session = opened(app)
    assert all(is_refusal(ask(app, f"/api/documents/{name}", session), 500) for name in ("long", "pipe"))


def entry(**other: Any) -> dict[str, Any]:
    return {"file": "map.json", "bytes": 1, "sha256": "0" * 64, **other}


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"documents": {}}',
        b'{"format": "virtual-weights explorer 2", "documents": {}}',
        *(json.dumps({"format": FORMAT, "documents": documents}).encode() for documents in (
            [], {"map": []}, {"map": {}}, {"..": entry()}, {"a/b": entry()}, {"": entry()}, {"a\n": entry()},
            {"map": entry(file="../secret.json")}, {"map": entry(file="/etc/passwd.json")}, {"map": entry(file=1)},
            {"map": entry(file="map.json\n")}, {"map": entry(file="secret")}, {"map": entry(sha256="0" * 63)},
            {"map": entry(bytes=-1)}, {"map": entry(bytes=True)}, {"map": entry(bytes="1")},
            {"map": entry(bytes=1 << 50)},
        )),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_is_refused(index: bytes, atlas: Path) -> None:
    (atlas / "explorer" / "index.json").write_bytes(index)
    with pytest.raises(RecordError, match=r"index\.json cannot be used") as caught:
        application(atlas, STATIC, TOKEN, HOSTS)
    assert f"run vweights report {atlas}" in caught.value.do


def test_an_index_that_is_a_link_is_refused(atlas: Path) -> None:
    replace(atlas / "explorer" / "index.json", "link")
    with pytest.raises(RecordError, match=r"index\.json cannot be used"):
        read_index(atlas)


def test_what_cannot_be_served_is_said(atlas: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bare").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ([str(tmp_path / "none")], UsageError.exit_code, "there is no folder"),
            ([str(tmp_path / "bare")], RecordError.exit_code, f"run vweights report {tmp_path / 'bare'} to write it"),
            ([str(atlas), "--port", str(port)], UsageError.exit_code, f"port {port} of 127.0.0.1 cannot be used"),
        ]
        for arguments, code, words in cases:
            assert command(["serve", *arguments, "--no-browser"]) == code
            out, error = capsys.readouterr()
            assert out == ""
            assert words in error
            assert error.count("\n  ") == 2, "what was expected, what to do"


def test_without_the_extra_it_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    assert command(["serve", "atlas"]) == 2
    assert "pip install -c constraints.txt '.[serve]'" in capsys.readouterr().err


def test_no_browser_is_opened_that_was_not_wanted(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses, browsers = list[str](), list[str]()
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    monkeypatch.setattr("webbrowser.open", browsers.append)
    for wanted in (False, True):
        serve(atlas, open_browser=wanted, announce=addresses.append)
    assert browsers == addresses[1:]
    assert len(set(addresses)) == 2, "a token of its own each time"


def test_the_page_is_installed() -> None:
    assert all(bundle().values())
    assert bundle().keys() == STATIC.keys()


SERVER = """
import atexit, sys, webbrowser
from virtual_weights.cli import main
webbrowser.open = lambda address: print("browser:", address, file=sys.stderr)
atexit.register(lambda: print("torch" in sys.modules, "numpy" in sys.modules, "uvicorn" in sys.modules))
main()
"""


@pytest.fixture
def server(atlas: Path) -> Generator[tuple[subprocess.Popen[str], int, str]]:
    """The command in a process of its own, with its port and the token that it printed."""
    line = [sys.executable, "-W", "error", "-c", SERVER, "serve", str(atlas)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{43})\n", process.stdout.readline())
            assert match is not None
            yield process, int(match[1]), match[2]
        finally:
            process.kill()


def sent(port: int, *lines: str) -> bytes:
    """All that comes back from a real socket."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def listening(port: int) -> set[str]:
    """Addresses of this machine on which a port listens, as Linux lists them in hex."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}


def test_the_command_serves_on_loopback_without_torch(server: tuple[subprocess.Popen[str], int, str]) -> None:
    process, port, token = server
    assert listening(port) == {"0100007F"}
    host = f"Host: 127.0.0.1:{port}"
    assert sent(port, "GET / HTTP/1.1", host).startswith(b"HTTP/1.1 401 ")
    assert sent(port, "GET / HTTP/1.1", "Host: evil.example").startswith(b"HTTP/1.1 421 ")
    first = sent(port, f"GET /?token={token} HTTP/1.1", host)
    assert first.startswith(b"HTTP/1.1 303 ")
    cookie = re.search(rb"set-cookie: ([^;]+);", first)
    assert cookie is not None
    session = f"Cookie: {cookie[1].decode()}"
    whole = sent(port, "GET /api/documents/map HTTP/1.1", host, session)
    assert whole.endswith(b"\r\n\r\n" + DOCUMENTS["map"])
    assert re.search(rb"(?i)\r\n(server|date):", whole) is None
    refused = [sent(port, f"GET {path} HTTP/1.1", host, session) for path in fuzzed_paths()[:40]]
    refused += [sent(port, "GET /api/index HTTP/1.1", *lines) for lines in ([session], [host, host, session])]
    refused += [sent(port, "GET /api/index HTTP/1.0", session), sent(port, "GET /\x00 HTTP/1.1", host), sent(port, "x")]
    refused += [sent(port, "GET / HTTP/1.1", host, "Upgrade: websocket", "Connection: upgrade")]
    assert all(re.match(rb"HTTP/1\.1 4\d\d ", reply) and CANARY not in reply for reply in refused)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "False False True\n")
    said = "Open this address, once, in a browser on this machine. Ctrl-C ends the server."
    assert sorted(error.splitlines()) == [said, f"browser: http://127.0.0.1:{port}/?token={token}"]
