"""Servers on loopback: a web server that does as a test says, and real registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback import Authority
from webserver import Answer, Serve, Web, start_web


@pytest.fixture(autouse=True)
def _urllib3() -> None:
    pytest.importorskip("urllib3")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def serve(authority: Authority) -> Iterator[Serve]:
    """Start a web server: ``serve(answer)``, or with TLS ``serve(answer, tls=True)``."""
    servers = []

    def start(answer: Answer, *, tls: bool = False, by: Authority = authority) -> Web:
        web, server = start_web(answer, by=by if tls else None)
        servers.append(server)
        return web

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def settings(authority: Authority) -> Callable[..., Any]:
    """``[remote]`` with the test's authority and little patience."""
    from keymgmt._config.remote import Remote

    def make(**table: Any) -> Remote:
        return Remote(**{"timeout": 5.0, "deadline": 20.0, "ca_file": authority.ca_file, **table})

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait before something is tried again; the waits, in seconds."""
    from keymgmt._remote import http

    waited: list[float] = []
    monkeypatch.setattr(http.time, "sleep", waited.append)
    return waited
