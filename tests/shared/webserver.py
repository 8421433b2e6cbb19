"""A web server on loopback that answers as a test says."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Iterator
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
    """A web server; ``answer(request, handler)`` writes what it answers.

    An answer of False ends the connection instead.
    """

    url: str
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0


Answer = Callable[[Seen, Any], bool | None]
Serve = Callable[..., Web]
Quirk = Callable[[Seen, Any, bytes], bool]


def reply(handler: Any, status: int, body: bytes = b"", **headers: str) -> None:
    """Answer with a status and a body whose length is said."""
    handler.send_response_only(status)
    said = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": str(len(body)), **said}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


def start_web(
    answer: Answer,
    *,
    by: Authority | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> tuple[Web, http.server.ThreadingHTTPServer]:
    """Start a server, with TLS where an authority or a context is given.

    Whoever calls shuts it down.
    """
    web = Web("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            web.connections += 1
            super().setup()

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client has seen enough
                self.close_connection = True

        def __getattr__(self, name: str) -> Any:
            # http.server looks for do_GET, do_POST, do_LIST, ...; who asks for a tunnel gets none.
            if name.startswith("do_") and name != "do_CONNECT":
                return self._any
            raise AttributeError(name)

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            said = {name.lower(): value for name, value in self.headers.items()}
            request = Seen(self.command, self.path, said, self.rfile.read(length))
            web.seen.append(request)
            if answer(request, self) is False:
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    server = _Server((host, port), Handler)
    if by:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*by.issue("server"))
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    web.url = f"http{'s' if tls else ''}://{host}:{server.server_port}"
    return web, server


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Web]:
    """A server for the length of a block."""
    web, server = start_web(answer)
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


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
