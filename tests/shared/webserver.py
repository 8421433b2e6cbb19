"""A web server on loopback that answers as a test says."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
