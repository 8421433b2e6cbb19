"""A web server on loopback that answers as a test says."""

from __future__ import annotations

import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from loopback import Authority


@dataclass
class Seen:
    """A request that came to a server."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Web:
    """A web server; ``answer(request, handler)`` writes what it answers."""

    url: str
    seen: list[Seen] = field(default_factory=list)


Answer = Callable[[Seen, Any], None]
Serve = Callable[..., Web]
Quirk = Callable[[Seen, Any, bytes], bool]


def reply(handler: Any, status: int, body: bytes = b"", **headers: str) -> None:
    """Answer with a status and a body whose length is said."""
    handler.send_response(status)
    said = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": str(len(body)), **said}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def start_web(
    answer: Answer, *, by: Authority | None = None
) -> tuple[Web, http.server.ThreadingHTTPServer]:
    """Start a server, with TLS where an authority is given; whoever calls shuts it down."""
    web = Web("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client has seen enough
                self.close_connection = True

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            said = {name.lower(): value for name, value in self.headers.items()}
            request = Seen(self.command, self.path, said, self.rfile.read(length))
            web.seen.append(request)
            answer(request, self)

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = _any  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if by:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*by.issue("server"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    web.url = f"http{'s' if by else ''}://127.0.0.1:{server.server_address[1]}"
    return web, server


def files_of(root: Path, quirk: Quirk | None = None) -> Answer:
    """A web server of a folder, with ranges and ETags; ``quirk`` may answer in its place."""

    def answer(request: Seen, handler: Any) -> None:
        file = root / unquote(request.path.partition("?")[0]).lstrip("/")
        if not file.is_file():
            reply(handler, 404)
            return
        content = file.read_bytes()
        if quirk and quirk(request, handler, content):
            return
        serve_range(request, handler, content)

    return answer


def serve_range(request: Seen, handler: Any, content: bytes) -> None:
    etag = etag_of(content)
    if request.headers.get("if-match", etag) != etag:
        reply(handler, 412, ETag=etag)
        return
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if not asked:
        reply(handler, 200, content, ETag=etag)
        return
    start, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
    headers = {"Content-Range": f"bytes {start}-{last}/{len(content)}", "ETag": etag}
    reply(handler, 206, content[start : last + 1], **headers)


def etag_of(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'
