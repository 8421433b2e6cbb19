"""What a fleet meets: dead nodes, short time, tokens that come and go, files that are replaced."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import in_child
from programs import run
from vaults import JSON, ONE_TRY, UNWRAP, approle, errors, opens
from waiting import until

import keymgmt
from keymgmt.backend import AccessDenied, Dek, ProviderUnavailable, WrappedKey, WrongKey


def tokens(bao: Any) -> set[str]:
    """The accessors of all tokens that live."""
    return set(bao.do("LIST", "auth/token/accessors")["data"]["keys"])


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


def threads_of_tokens() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "keymgmt site token"]


# Time and nodes.


def test_one_healthy_node_among_dead_ones_is_enough(
    make: Any, bao: Any, wrapped: WrappedKey, frozen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dead = [frozen() for _ in range(3)]
    provider = make(bao, address=[*dead, bao.address], timeout=8.0, call_timeout=8.0)
    for _ in range(5):
        assert opens(provider, wrapped)
    passed = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(passed) == 3
    assert not any(bao.address in text for text in passed)


def test_a_node_that_had_no_time_is_not_to_blame(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason that is given is that of the longest try, and the node is asked again at once."""
    slow = gateway()
    slow.before = lambda method, path, body: time.sleep(0.8)
    provider = make(address=slow.address, token=bao.root, timeout=1.2, call_timeout=0.6)
    with pytest.raises(ProviderUnavailable, match=r"no answer in 0\.6 s"):
        provider.unwrap(wrapped, b"c")
    slow.before = lambda method, path, body: None
    assert opens(provider, wrapped)


def test_a_pause_that_outlasts_the_call_does_not_hide_the_reason(
    make: Any, wrapped: WrappedKey, gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keymgmt_vault._connection as connection

    before = gateway()
    before.before = lambda method, path, body: (503, JSON, errors("out of order"))
    sleep = time.sleep
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: sleep(seconds + ONE_TRY))
    with pytest.raises(ProviderUnavailable, match="out of order"):
        make(address=before.address, token="hvs.token", timeout=ONE_TRY).unwrap(wrapped, b"c")


def test_many_threads_leave_no_warning(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = gateway()
    provider = make(address=before.address, token=bao.root, timeout=30.0, call_timeout=30.0)
    with ThreadPoolExecutor(64) as pool, caplog.at_level(logging.DEBUG):
        assert all(pool.map(lambda _: opens(provider, wrapped), range(256)))
    assert before.connections <= 65
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_a_connection_that_was_idle_for_long_is_not_trusted(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keymgmt_vault._transport as transport

    before = gateway()
    provider = make(address=before.address, token=bao.root)
    assert opens(provider, wrapped)
    assert opens(provider, wrapped)
    assert before.connections == 1
    monkeypatch.setattr(transport, "_IDLE", 0.0)
    assert opens(provider, wrapped)
    assert before.connections == 2


def test_a_connection_that_ended_while_idle_is_replaced(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any
) -> None:
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


def test_a_secret_that_is_a_fifo_does_not_hang(
    make: Any, bao: Any, wrapped: WrappedKey, tmp_path: Path
) -> None:
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


def test_an_address_of_a_name_does_not_hide_the_next(
    make: Any, bao: Any, wrapped: WrappedKey, frozen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen("127.0.0.2", bao.port)
    resolve(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    address = f"https://vault.example:{bao.port}"
    provider = make(bao, address=address, timeout=4.0, call_timeout=1.0)
    for _ in range(3):
        assert opens(provider, wrapped)


def test_a_sealed_server_of_a_name_does_not_hide_the_next(
    make: Any, bao: Any, wrapped: WrappedKey, new_bao: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = new_bao(init=False)
    balancer = Balancer(sealed.port, "127.0.0.2", bao.port)
    resolve(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    provider = make(bao, address=f"https://vault.example:{bao.port}", timeout=4.0)
    assert opens(provider, wrapped)
    assert balancer.accepted
    balancer.close()


def test_a_name_service_that_is_not_up_yet_is_waited_for(
    make: Any, bao: Any, wrapped: WrappedKey, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_balancer_before_a_server_that_restarts_is_waited_for(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
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


def test_a_slow_login_has_the_time_of_the_whole_call(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    before.before = lambda method, path, body: time.sleep(1.5 if "login" in path else 0)
    auth = approle(bao, secret_file, "slow", secret_id_num_uses=1)
    provider = make(address=before.address, auth=auth, timeout=8.0, call_timeout=0.7)
    assert opens(provider, wrapped)
    assert before.count("auth/approle/login") == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_login_that_a_standby_refused_waits_for_the_leader(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any, named: bool
) -> None:
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


def test_a_lost_login_is_not_sent_again(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    before.after = lambda method, path: "login" not in path
    auth = approle(bao, secret_file, "lost", secret_id_num_uses=1)
    with pytest.raises(ProviderUnavailable, match="may have used up the secret id") as caught:
        make(address=before.address, auth=auth).unwrap(wrapped, b"c")
    assert "new secret id" in str(caught.value.hint)
    assert before.count("auth/approle/login") == 1


# Tokens: renewed while they live, and left behind by nobody.


@pytest.mark.once
def test_a_token_is_renewed_while_nothing_is_opened(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
    auth = approle(bao, secret_file, "idle", token_ttl="3s", secret_id_num_uses=1)
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    time.sleep(7)
    assert opens(provider, wrapped)


@pytest.mark.once
def test_a_renewal_that_fails_costs_nobody_an_unwrap(
    make: Any,
    bao: Any,
    wrapped: WrappedKey,
    gateway: Any,
    secret_file: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = gateway()
    heals = time.monotonic() + 5.5

    def fail(method: str, path: str, body: Any) -> Any:
        if path == "auth/token/renew-self" and time.monotonic() < heals:
            return 500, JSON, errors("renewal is out of order")
        return None

    before.before = fail
    auth = approle(bao, secret_file, "failing", token_ttl="6s", secret_id_num_uses=1)
    provider = make(address=before.address, auth=auth, timeout=0.5)
    end = time.monotonic() + 9
    while time.monotonic() < end:
        assert opens(provider, wrapped)
        time.sleep(0.02)
    assert before.count("auth/token/renew-self") > 2
    assert "was not renewed" in caplog.text


@pytest.mark.once
def test_a_token_that_died_is_not_renewed_for_ever(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any, caplog: Any
) -> None:
    before = gateway()
    before.before = lambda method, path, body: (
        (403, JSON, errors("permission denied")) if path.endswith("renew-self") else None
    )
    provider = make(address=before.address, auth=approle(bao, secret_file, "dies", token_ttl="2s"))
    assert opens(provider, wrapped)
    time.sleep(6)
    assert before.count("auth/token/renew-self") in (1, 2)
    assert "and has ended, so the next call logs in" in caplog.text
    assert opens(provider, wrapped)
    assert before.count("auth/approle/login") == 2


@pytest.mark.once
def test_a_token_that_will_die_is_said_before(
    make: Any, bao: Any, wrapped: WrappedKey, caplog: pytest.LogCaptureFixture
) -> None:
    token = bao.token(UNWRAP, ttl="6s", explicit_max_ttl="8s", renewable=True)
    provider = make(bao, token=token)
    said = False
    with contextlib.suppress(AccessDenied):
        while not said:
            said = "cannot be renewed and ends in" in caplog.text
            assert opens(provider, wrapped)
            time.sleep(0.05)
    assert said


def test_the_thread_of_a_token_ends_with_its_provider(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
    until(lambda: not threads_of_tokens())
    auth = approle(bao, secret_file, "thread")
    provider = make(bao, auth=auth)
    assert not threads_of_tokens()
    assert opens(provider, wrapped)
    assert len(threads_of_tokens()) == 1

    def use() -> None:
        assert not threads_of_tokens()
        assert opens(provider, wrapped)
        assert len(threads_of_tokens()) == 1

    in_child(use)
    provider.close()
    until(lambda: not threads_of_tokens())
    from keymgmt_vault import VaultProvider

    dropped = VaultProvider("site", provider.settings)
    assert opens(dropped, wrapped)
    del dropped
    gc.collect()
    until(lambda: not threads_of_tokens())


def test_close_revokes_what_this_process_logged_in_for(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
    auth = approle(bao, secret_file, "leaving", token_ttl="1h")
    before = tokens(bao)
    for _ in range(3):
        provider = make(bao, auth=auth)
        assert opens(provider, wrapped)
        assert len(tokens(bao) - before) == 1

        def use(provider: Any = provider) -> None:
            provider.unwrap(wrapped, b"c").wipe()
            provider.close()

        in_child(use)
        assert len(tokens(bao) - before) == 1, "a child revoked its parent's token"
        provider.close()
        assert tokens(bao) <= before
        assert opens(provider, wrapped)
        provider.close()
    given = bao.token(UNWRAP)
    provider = make(bao, token=given)
    assert opens(provider, wrapped)
    provider.close()
    assert bao.api("GET", "auth/token/lookup-self", token=given)[0] == 200


def test_neither_opens_nor_commands_leave_a_token(
    bao: Any, secret_file: Any, tmp_path: Path
) -> None:
    policy = """
        path "transit/encrypt/model" { capabilities = ["update"] }
        path "transit/decrypt/model" { capabilities = ["update"] }
        path "transit/keys/model" { capabilities = ["read"] }
        path "transit/keys" { capabilities = ["list"] }
    """
    role_id, secret_id = bao.approle(policy, "commands", token_ttl="32d")
    role, secret = secret_file(role_id)["file"], secret_file(secret_id)["file"]
    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f"""
        [providers.site]
        backend = "vault"
        address = "{bao.address}"
        ca_file = "{bao.authority.ca_file}"
        [providers.site.auth]
        method = "approle"
        role_id = {{ file = "{role}" }}
        secret_id = {{ file = "{secret}" }}
        [policy]
        require_signature = false
        """
    )
    config.chmod(0o600)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.bin").write_bytes(b"m" * 1000)
    before = tokens(bao)
    sealed = tmp_path / "m.sealed"
    keymgmt.seal(tmp_path / "m", sealed, to=["site:model"], keys=config)
    for _ in range(2):
        with keymgmt.open(sealed, keys=config) as model:
            assert model.read("model.bin") == b"m" * 1000
    assert tokens(bao) <= before
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for words in (["doctor", "site:model"], ["keys", "list", "site"], ["verify", sealed]):
        command = [sys.executable, "-m", "keymgmt.cli", "-c", str(config), *map(str, words)]
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        assert tokens(bao) <= before, words


def test_a_batch_token_leaves_nothing(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before, known = gateway(), tokens(bao)
    auth = approle(bao, secret_file, "batch", token_type="batch")
    provider = make(address=before.address, auth=auth)
    assert opens(provider, wrapped)
    assert tokens(bao) <= known  # a token of another test may end meanwhile
    provider.close()
    assert before.count("auth/token/revoke-self") == 0


def test_close_lets_a_call_in_flight_end(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    held = threading.Event()

    def hold(method: str, path: str, body: Any) -> None:
        if held.is_set() and "decrypt" in path:
            time.sleep(0.4)

    before.before = hold
    auth = approle(bao, secret_file, "flight", token_ttl="1h")
    provider = make(address=before.address, auth=auth)
    assert opens(provider, wrapped)
    held.set()
    with ThreadPoolExecutor(1) as pool:
        flying = pool.submit(opens, provider, wrapped)
        time.sleep(0.1)
        provider.close()
        assert flying.result()
    revoked = [seen for _, seen, _ in before.seen].index("auth/token/revoke-self")
    assert before.seen[revoked - 1][1] == "transit/decrypt/model"


def test_a_wrong_secret_id_is_not_sent_until_the_role_is_locked(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    auth = approle(bao, secret_file, "guessed")
    good = Path(auth["secret_id"]["file"]).read_text()
    Path(auth["secret_id"]["file"]).write_text("not-the-secret-id")
    for _ in range(8):
        with pytest.raises(AccessDenied, match="login by approle was refused") as caught:
            make(address=before.address, auth=auth).unwrap(wrapped, b"c")
    assert "lock" in str(caught.value.hint)
    # Nor by another process, such as the next start of a service.
    opening = (
        "import json, sys; from keymgmt_vault import VaultProvider, VaultSettings\n"
        "settings = VaultSettings.model_validate(json.loads(sys.argv[1]))\n"
        "VaultProvider('site', settings).list_keys()"
    )
    command = [sys.executable, "-c", opening, json.dumps({"address": before.address, "auth": auth})]
    done = run(*command)
    assert "not sent again" in done.stderr
    assert before.count("auth/approle/login") == 1
    way_out = str(caught.value.hint).rpartition(": ")[2]
    note = Path(way_out.removeprefix("rm "))
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert "not-the-secret-id" not in note.read_text()
    subprocess.run(way_out.split(), check=True, timeout=60)
    subprocess.run(command, capture_output=True, timeout=60)
    assert before.count("auth/approle/login") == 2
    # Nor does the process that saw the refusal remember it against what was printed.
    subprocess.run(way_out.split(), check=True, timeout=60)
    with pytest.raises(AccessDenied, match="refused"):
        make(address=before.address, auth=auth).unwrap(wrapped, b"c")
    assert before.count("auth/approle/login") == 3
    # What others may write is not believed.
    note.write_text(note.read_text().replace("invalid", "FORGED"))
    assert "FORGED" in run(*command).stderr
    note.chmod(0o666)
    assert "FORGED" not in run(*command).stderr
    # Another secret id is another try.
    Path(auth["secret_id"]["file"]).write_text(good)
    assert opens(make(address=before.address, auth=auth), wrapped)


def test_workers_that_start_together_send_one_bad_login(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    auth = approle(bao, secret_file, "herd")
    Path(auth["secret_id"]["file"]).write_text("not-the-secret-id")
    old = Path(f"/dev/shm/keymgmt-{os.geteuid()}-{'0' * 32}")
    old.touch(mode=0o600)
    old.write_text(json.dumps([time.monotonic() - 100_000, 1, "of a secret id that was replaced"]))
    together = threading.Barrier(8)

    def hold(method: str, path: str, body: Any) -> None:
        if path == "auth/approle/login":
            time.sleep(0.3)  # until all have looked whether it was refused before

    before.before = hold
    # flock(2) tells threads with descriptors of their own apart as it does processes.
    workers = [make(address=before.address, auth=auth, timeout=30.0) for _ in range(8)]

    def work(provider: Any) -> str:
        together.wait(30)
        with pytest.raises(AccessDenied) as caught:
            provider.unwrap(wrapped, b"c")
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(work, workers))
    assert before.count("auth/approle/login") == 1
    assert sum("not sent again" in each for each in said) == 7
    assert not old.exists()


def test_a_locked_role_names_the_lockout(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
    auth = approle(bao, secret_file, "locked-out")
    for _ in range(6):
        role_id = Path(auth["role_id"]["file"]).read_text()
        body = {"role_id": role_id, "secret_id": "wrong"}
        bao.api("POST", "auth/approle/login", body, token=None)
    with pytest.raises(AccessDenied, match="refused") as caught:
        make(bao, auth=auth).unwrap(wrapped, b"c")
    assert "locked the role" in str(caught.value.hint)


def test_a_token_of_few_uses_is_used_for_nothing_else(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any, secret_file: Any
) -> None:
    before = gateway()
    provider = make(address=before.address, token=bao.token(UNWRAP, num_uses=2))
    assert opens(provider, wrapped)
    assert opens(provider, wrapped)
    with pytest.raises(AccessDenied, match="expired"):
        provider.unwrap(wrapped, b"c")
    assert before.count("auth/token/lookup-self") == 0
    token = bao.token(UNWRAP, num_uses=3)
    auth = {"method": "token", "token": secret_file(token), "renew": False}
    provider = make(address=before.address, auth=auth)
    assert opens(provider, wrapped)
    time.sleep(1.5)
    assert opens(provider, wrapped)
    assert opens(provider, wrapped)


# What changes on disk.


def test_a_replaced_ca_file_is_taken(
    make: Any, bao: Any, wrapped: WrappedKey, other_authority: Any, tmp_path: Path
) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(other_authority.ca_file.read_bytes())
    provider = make(bao, ca_file=str(file))
    with pytest.raises(ProviderUnavailable, match="certificate is refused"):
        provider.unwrap(wrapped, b"c")
    (tmp_path / "new").write_bytes(bao.authority.ca_file.read_bytes())
    (tmp_path / "new").rename(file)
    assert opens(provider, wrapped)
    # While a file is being written, what was read before is good.
    file.write_text("half a file")
    provider.close()
    assert opens(provider, wrapped)


def test_a_replaced_client_certificate_is_taken(make: Any, new_bao: Any, tmp_path: Path) -> None:
    bao = new_bao()
    bao.transit("transit", "model")
    bao.do("PUT", "sys/policies/acl/unwrap", {"policy": UNWRAP})
    bao.do("POST", "sys/auth/cert", {"type": "cert"})
    role = {
        "certificate": bao.authority.ca_file.read_text(),
        "allowed_common_names": "new-device",
        "token_policies": ["unwrap"],
    }
    bao.do("POST", "auth/cert/certs/device", role)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    key.touch(0o600)

    def issue(name: str) -> None:
        made = bao.authority.issue(name, client=True)
        cert.write_bytes(made[0].read_bytes())
        key.write_bytes(made[1].read_bytes())

    issue("old-device")
    provider = make(bao, auth={"method": "cert"}, client_cert=str(cert), client_key=str(key))
    with Dek.generate() as dek:
        wrapped = make(bao).wrap("model", dek, b"c")
        with pytest.raises(AccessDenied):
            provider.unwrap(wrapped, b"c")
        issue("new-device")
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_replaced_secret_id_is_taken(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any
) -> None:
    auth = approle(bao, secret_file, "moved", secret_id_num_uses=1)
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    made = bao.do("POST", "auth/approle/role/moved/secret-id")["data"]
    Path(auth["secret_id"]["file"]).write_text(made["secret_id"])
    bao.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")
    assert opens(provider, wrapped)


@pytest.mark.parametrize("method", ["token", "agent"])
def test_a_replaced_token_is_taken(
    make: Any, bao: Any, wrapped: WrappedKey, secret_file: Any, method: str
) -> None:
    """One that somebody else writes to a file, an agent's sink say."""
    first = bao.token(UNWRAP)
    place = secret_file(first)
    provider = make(bao, auth={"method": method, "token" if method == "token" else "sink": place})
    assert opens(provider, wrapped)
    Path(place["file"]).write_text(bao.token(UNWRAP))
    bao.do("POST", "auth/token/revoke", {"token": first})
    assert opens(provider, wrapped)


@pytest.mark.parametrize("method", ["token", "approle"])
def test_a_person_who_types_a_secret_has_time(
    make: Any,
    bao: Any,
    wrapped: WrappedKey,
    secret_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """The time limit is for the server, and not for who looks the secret up and types it."""
    role_id, secret_id = bao.approle(UNWRAP, "typed")
    prompt = {"prompt": "Vault"}
    auth: dict[str, Any] = {"method": "token", "token": prompt}
    if method == "approle":
        auth = {"method": "approle", "role_id": secret_file(role_id), "secret_id": prompt}

    def type_it(_: str) -> str:
        time.sleep(1.5)
        return str(secret_id if method == "approle" else bao.root)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", type_it)
    assert opens(make(bao, auth=auth, timeout=1.0), wrapped)


@pytest.mark.once
def test_nobody_is_asked_by_the_thread_that_keeps_a_token_alive(
    make: Any,
    bao: Any,
    wrapped: WrappedKey,
    secret_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    role_id, secret_id = bao.approle(UNWRAP, "asked", token_ttl="8s", token_max_ttl="8s")
    asked: list[threading.Thread] = []

    def type_it(_: str) -> str:
        asked.append(threading.current_thread())
        return str(secret_id)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", type_it)
    secrets = {"role_id": secret_file(role_id), "secret_id": {"prompt": "Secret id"}}
    provider = make(bao, auth={"method": "approle", **secrets})
    assert opens(provider, wrapped)
    until(lambda: "cannot be renewed" in caplog.text or len(asked) > 1)
    assert opens(provider, wrapped)
    assert set(asked) == {threading.current_thread()}


# Many recipients.


def test_keys_of_others_cost_no_request(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any
) -> None:
    before = gateway()
    bao.transit("transit", "device7-main", "device8-main")
    provider = make(address=before.address, token=bao.root, keys_prefix="device7-")
    for key in ("model", "device8-main"):
        with pytest.raises(WrongKey, match="keys_prefix"):
            provider.unwrap(replace(wrapped, key=key), b"c")
    assert before.seen == []
    with Dek.generate() as dek:
        mine = provider.wrap("device7-main", dek, b"c")
        assert provider.unwrap(mine, b"c") == dek
    assert [info.key for info in provider.list_keys()] == ["device7-main"]


def test_a_refusal_costs_one_request(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any
) -> None:
    before = gateway()
    policy = 'path "transit/decrypt/model" { capabilities = ["update"] }'
    provider = make(address=before.address, token=bao.token(policy))
    assert opens(provider, wrapped)
    before.seen.clear()
    for number in range(10):
        with pytest.raises(AccessDenied, match="policy does not allow"):
            provider.unwrap(replace(wrapped, key=f"other-{number}"), b"c")
    paths = [seen for _, seen, _ in before.seen]
    # And one look at who leads.
    assert sum("decrypt" in each for each in paths) == 10
    assert len(paths) <= 12


def test_keys_of_others_do_not_fail_a_list(
    make: Any, bao: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bao.transit("shared", "mine", "yours")
    policy = """
        path "shared/keys" { capabilities = ["list"] }
        path "shared/keys/mine" { capabilities = ["read"] }
    """
    provider = make(bao, token=bao.token(policy), mount="shared")
    assert [info.key for info in provider.list_keys()] == ["mine"]
    assert "read the keys yours" in caplog.text


# Contexts.


def test_a_server_that_ignores_the_context_is_refused(make: Any, bao: Any, gateway: Any) -> None:
    """As HashiCorp Vault before 1.13 does."""
    old = gateway()

    def strip(method: str, path: str, body: Any) -> Any:
        for each in [body, *(body or {}).get("batch_input", [])] if isinstance(body, dict) else []:
            each.pop("associated_data", None)

    old.before = strip
    provider = make(address=old.address, token=bao.root)
    with Dek.generate() as dek, pytest.raises(ProviderUnavailable, match="does not bind") as caught:
        provider.wrap("model", dek, b"c")
    assert "1.13" in str(caught.value.hint)
    assert not provider.check("model").ok


def test_a_warning_that_the_context_was_ignored_is_read(
    make: Any, bao: Any, wrapped: WrappedKey, gateway: Any
) -> None:
    old = gateway()
    text = b'{"data": {"plaintext": "%s"}, "warnings": ["Endpoint ignored these unrecognized ' % (
        b"A" * 43 + b"="
    )
    old.before = lambda method, path, body: (200, JSON, text + b'parameters: [associated_data]"]}')
    with pytest.raises(ProviderUnavailable, match="does not bind"):
        make(address=old.address, token=bao.root).unwrap(wrapped, b"c")


# The development server.


def test_the_dev_server_ends_with_a_killed_parent(bao_binary: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keymgmt.cli", "vault", "dev", "--directory"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(
        [*command, str(tmp_path / "dev")], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        port = int(lines[2].rpartition(":")[2].strip().strip('"'))
        process.kill()

        def gone() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        until(gone)
