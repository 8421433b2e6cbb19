"""Nodes that are dead, slow or sealed, and how long a call may take."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from vaults import JSON, ONE_TRY, approle, errors, opens

from keymgmt.backend import ProviderUnavailable


@pytest.fixture
def frozen() -> Iterator[Callable[..., str]]:
    """Make addresses that take connections and never answer."""
    made: list[socket.socket] = []

    def make(host: str = "127.0.0.1", port: int = 0) -> str:
        made.append(socket.create_server((host, port), backlog=64))
        return f"https://{host}:{made[-1].getsockname()[1]}"

    yield make
    for each in made:
        each.close()


def test_one_healthy_node_among_dead_ones_is_enough(make, bao, wrapped, frozen, caplog):
    dead = [frozen() for _ in range(3)]
    provider = make(bao, address=[*dead, bao.address], timeout=8.0, call_timeout=8.0)
    for _ in range(5):
        assert opens(provider, wrapped)
    passed = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(passed) == 3
    assert not any(bao.address in text for text in passed)


def test_a_node_that_had_no_time_is_not_to_blame(make, bao, wrapped, gateway, caplog):
    """The reason that is given is that of the longest try, and the node is asked again at once."""
    slow = gateway()
    slow.before = lambda method, path, body: time.sleep(0.8)
    provider = make(address=slow.address, token=bao.root, timeout=1.2, call_timeout=0.6)
    with pytest.raises(ProviderUnavailable, match=r"no answer in 0\.6 s"):
        provider.unwrap(wrapped, b"c")
    slow.before = lambda method, path, body: None
    assert opens(provider, wrapped)


def test_a_pause_that_outlasts_the_call_does_not_hide_the_reason(
    make, wrapped, gateway, monkeypatch
):
    import keymgmt_vault._connection as connection

    before = gateway()
    before.before = lambda method, path, body: (503, JSON, errors("out of order"))
    sleep = time.sleep
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: sleep(seconds + ONE_TRY))
    with pytest.raises(ProviderUnavailable, match="out of order"):
        make(address=before.address, token="hvs.token", timeout=ONE_TRY).unwrap(wrapped, b"c")


def test_many_threads_leave_no_warning(make, bao, wrapped, gateway, caplog):
    before = gateway()
    provider = make(address=before.address, token=bao.root, timeout=30.0, call_timeout=30.0)
    with ThreadPoolExecutor(64) as pool, caplog.at_level(logging.DEBUG):
        assert all(pool.map(lambda _: opens(provider, wrapped), range(256)))
    assert before.connections <= 65
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_a_connection_that_was_idle_for_long_is_not_trusted(
    make, bao, wrapped, gateway, monkeypatch
):
    import keymgmt_vault._transport as transport

    before = gateway()
    provider = make(address=before.address, token=bao.root)
    assert opens(provider, wrapped)
    assert opens(provider, wrapped)
    assert before.connections == 1
    monkeypatch.setattr(transport, "_IDLE", 0.0)
    assert opens(provider, wrapped)
    assert before.connections == 2


def test_a_connection_that_ended_while_idle_is_replaced(make, bao, wrapped, gateway):
    """Also where its end comes only after something was sent on it."""
    before = gateway()
    provider = make(address=before.address, token=bao.root, timeout=5.0)
    for _ in range(5):
        assert opens(provider, wrapped)
        asked = len(before.seen)
        before.before = lambda method, path, body, asked=asked: (
            False if len(before.seen) == asked + 1 else None
        )
    assert before.connections == 5


def test_a_secret_that_is_a_fifo_does_not_hang(make, bao, wrapped, tmp_path):
    os.mkfifo(tmp_path / "token", 0o600)
    auth = {"method": "token", "token": {"file": str(tmp_path / "token")}}
    with pytest.raises(ProviderUnavailable, match="regular file"):
        make(bao, auth=auth).unwrap(wrapped, b"c")


def resolve(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """Make the name ``vault.example`` resolve to what is given, one after the other."""
    left = list(answers)
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "vault.example":
            return real(host, port, *args, **kwargs)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_an_address_of_a_name_does_not_hide_the_next(make, bao, wrapped, frozen, monkeypatch):
    frozen("127.0.0.2", bao.port)
    resolve(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    address = f"https://vault.example:{bao.port}"
    provider = make(bao, address=address, timeout=4.0, call_timeout=1.0)
    for _ in range(3):
        assert opens(provider, wrapped)


def test_a_sealed_server_of_a_name_does_not_hide_the_next(make, bao, wrapped, new_bao, monkeypatch):
    sealed = new_bao(init=False)
    balancer = Balancer(sealed.port, "127.0.0.2", bao.port)
    resolve(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    provider = make(bao, address=f"https://vault.example:{bao.port}", timeout=4.0)
    assert opens(provider, wrapped)
    assert balancer.accepted
    balancer.close()


def test_a_name_service_that_is_not_up_yet_is_waited_for(make, bao, wrapped, monkeypatch):
    busy = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    resolve(monkeypatch, busy, busy, busy, ["127.0.0.1"])
    assert opens(make(bao, address=f"https://vault.example:{bao.port}"), wrapped)
    resolve(monkeypatch, busy)
    with pytest.raises(ProviderUnavailable, match="name service gives no answer"):
        make(bao, address=f"https://vault.example:{bao.port}", timeout=ONE_TRY).unwrap(
            wrapped, b"c"
        )


class Balancer:
    """Passes bytes on to a port; closes each of the first ``refuse`` connections at once."""

    def __init__(
        self, target: int, host: str = "127.0.0.1", port: int = 0, refuse: int = 0
    ) -> None:
        self.target, self.refuse, self.accepted = target, refuse, 0
        self.listener = socket.create_server((host, port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self.listener.accept()
                self.accepted += 1
                if self.accepted <= self.refuse:
                    taken.close()
                    continue
                other = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((taken, other), (other, taken)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.listener.close()


def test_a_balancer_before_a_server_that_restarts_is_waited_for(make, bao, wrapped, secret_file):
    balancer = Balancer(bao.port, refuse=4)
    # A token that is kept alive is looked up after a second, over a connection of its own.
    auth = {"method": "token", "token": secret_file(bao.root), "renew": False}
    assert opens(make(bao, address=f"https://127.0.0.1:{balancer.port}", auth=auth), wrapped)
    assert balancer.accepted == 5
    balancer.refuse = 1000
    provider = make(bao, address=f"https://127.0.0.1:{balancer.port}", timeout=ONE_TRY)
    with pytest.raises(ProviderUnavailable, match="broke") as caught:
        provider.unwrap(wrapped, b"c")
    assert "balancer" in str(caught.value.hint)
    balancer.close()


def test_a_slow_login_has_the_time_of_the_whole_call(make, bao, wrapped, gateway, secret_file):
    before = gateway()
    before.before = lambda method, path, body: time.sleep(1.5 if "login" in path else 0)
    auth = approle(bao, secret_file, "slow", secret_id_num_uses=1)
    provider = make(address=before.address, auth=auth, timeout=8.0, call_timeout=0.7)
    assert opens(provider, wrapped)
    assert before.count("auth/approle/login") == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_login_that_a_standby_refused_waits_for_the_leader(
    make, bao, wrapped, gateway, secret_file, named
):
    """One that lags does not know the role yet; it is asked once, and not believed for a minute."""
    standby, other = gateway(), gateway()
    elected = threading.Event()

    def lags(method: str, path: str, body: Any) -> Any:
        if path == "sys/leader":
            address = other.address if named else ""
            said = {"ha_enabled": True, "is_self": False, "leader_address": address}
            return 200, JSON, json.dumps(said).encode()
        if path == "auth/approle/login":
            return 400, JSON, errors("invalid role or secret ID")
        return None

    def leads(method: str, path: str, body: Any) -> Any:
        if not elected.is_set():
            return False
        said = {"ha_enabled": True, "is_self": True, "leader_address": other.address}
        return (200, JSON, json.dumps(said).encode()) if path == "sys/leader" else None

    standby.before, other.before = lags, leads
    auth = approle(bao, secret_file, f"waits-{named}".lower())
    addresses = [standby.address, other.address]
    with pytest.raises(ProviderUnavailable, match="no leader can be asked"):
        make(address=addresses, auth=auth, timeout=ONE_TRY).unwrap(wrapped, b"c")
    assert standby.count("auth/approle/login") == 1
    timer = threading.Timer(ONE_TRY, elected.set)
    timer.start()
    assert opens(make(address=addresses, auth=auth, timeout=30.0), wrapped)
    timer.join()
    assert standby.count("auth/approle/login") == 2
    assert other.count("auth/approle/login") == 1


def test_a_lost_login_is_not_sent_again(make, bao, wrapped, gateway, secret_file):
    before = gateway()
    before.after = lambda method, path: "login" not in path
    auth = approle(bao, secret_file, "lost", secret_id_num_uses=1)
    with pytest.raises(ProviderUnavailable, match="may have used up the secret id") as caught:
        make(address=before.address, auth=auth).unwrap(wrapped, b"c")
    assert "new secret id" in str(caught.value.hint)
    assert before.count("auth/approle/login") == 1
