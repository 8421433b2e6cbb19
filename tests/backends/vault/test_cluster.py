"""Three TLS nodes: the leader dies, stalls or steps down, and standbys know less than it does."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from typing import Any, Self

import pytest
from waiting import until

from keymgmt.backend import AccessDenied, Dek, ProviderError, ProviderUnavailable, WrongKey

pytestmark = pytest.mark.once

CALL = 1.5


@pytest.fixture(scope="module")
def nodes(new_cluster) -> list[Any]:
    nodes = new_cluster()
    nodes[0].transit("transit", "model")
    return nodes


@pytest.fixture
def healthy(nodes) -> list[Any]:
    """All three nodes up, the leader first."""
    for node in nodes:
        node.send(signal.SIGCONT)

    def ready() -> bool:
        for node in nodes:
            if node.process.poll() is not None:
                node.start()
            try:
                status, answer = node.api("GET", "sys/seal-status", token=None, seconds=2)
                if status == 200 and answer["sealed"]:
                    node.unseal()
            except OSError:
                return False
        return [n.leads for n in nodes].count(True) == 1 and all(
            n.api("GET", "sys/health", token=None)[0] in (200, 429) for n in nodes
        )

    until(ready)
    leader, *others = sorted(nodes, key=lambda node: not node.leads)
    # One that was started again may lag for long on a busy machine, and elections wait for it.
    marker = f'path "sys/{time.monotonic_ns()}" {{ capabilities = ["read"] }}'
    leader.do("PUT", "sys/policies/acl/marker", {"policy": marker})

    def caught_up(node: Any) -> bool:
        status, answer = node.api("GET", "sys/policies/acl/marker")
        return status == 200 and answer["data"]["policy"] == marker

    until(lambda: all(map(caught_up, others)))
    return [leader, *others]


def addresses(nodes: list[Any]) -> dict[str, Any]:
    return {
        "address": [node.address for node in nodes],
        "ca_file": str(nodes[0].authority.ca_file),
        "call_timeout": CALL,
        "timeout": 15.0,
    }


class Stream:
    """Unwraps from many threads: operations, failures, and the longest time without an answer."""

    def __init__(self, providers: list[Any], wrapped: Any, dek: Dek, threads: int = 8) -> None:
        self.wrapped, self.dek = wrapped, dek
        self.operations = 0
        self.failures: list[str] = []
        self.longest = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(providers[n % len(providers)],), daemon=True)
            for n in range(threads)
        ]

    def _run(self, provider: Any) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                with provider.unwrap(self.wrapped, b"context") as got:
                    right = got == self.dek
                trouble = None if right else "another key came back"
            except Exception as error:  # noqa: BLE001 - counted, whatever it is
                trouble = f"{type(error).__name__}: {error}"
            with self._lock:
                self.operations += 1
                self.longest = max(self.longest, time.monotonic() - begun)
                if trouble:
                    self.failures.append(trouble)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads)

    def until(self, operations: int, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while self.operations < operations and time.monotonic() < end:
            time.sleep(0.02)
        assert self.operations >= operations, self.failures[:3]


def three_kinds_of_tokens(make: Any, leader: Any, settings: Any, secret_file: Any) -> list[Any]:
    """One that lives long, one that is renewed all the time, one that reaches its greatest age."""
    policy = 'path "transit/decrypt/model" { capabilities = ["update"] }'

    def by_role(name: str, **options: Any) -> Any:
        role_id, secret_id = leader.approle(policy, name, **options)
        role, secret = secret_file(role_id), secret_file(secret_id)
        return make(auth={"method": "approle", "role_id": role, "secret_id": secret}, **settings)

    return [
        make(token=leader.root, **settings),
        by_role("short", token_ttl="6s"),
        by_role("aged", token_ttl="12s", token_max_ttl="15s"),
    ]


@pytest.mark.parametrize(
    "event", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, "a rolling restart"]
)
def test_no_unwrap_fails_when_the_leader_goes(healthy, make, secret_file, event, record_property):
    leader, *others = healthy
    # An election takes as long as the machine needs; whoever asks meanwhile waits.
    settings = addresses(healthy) | {"timeout": 60.0}
    providers = three_kinds_of_tokens(make, leader, settings, secret_file)
    with Dek.generate() as dek:
        wrapped = providers[0].wrap("model", dek, b"context")
        for provider in providers:
            assert provider.unwrap(wrapped, b"context") == dek
        with Stream(providers, wrapped, dek, 14) as stream:
            stream.until(100)
            if isinstance(event, signal.Signals):
                leader.send(event)
                stream.until(stream.operations + 300)
                until(lambda: any(node.leads for node in others))
                # Long enough for a renewal and a new login.
                time.sleep(10)
                stream.until(stream.operations + 100)
            else:
                for node in [*others, leader]:
                    node.send(signal.SIGTERM)
                    node.process.wait(60)
                    node.start()
                    node.unseal()
                    until(
                        lambda: (
                            sum(each.leads for each in healthy) == 1
                            and all(
                                each.api("GET", "sys/health", token=None)[0] in (200, 429)
                                for each in healthy
                            )
                        )
                    )
                    stream.until(stream.operations + 100)
    record_property("operations", stream.operations)
    record_property("longest", round(stream.longest, 2))
    assert stream.failures == []


def test_a_right_that_was_given_a_moment_ago_is_known(healthy, make):
    """A standby says 403 until it has heard of the policy; the leader is asked once."""
    leader, first, _ = healthy
    root = make(token=leader.root, **addresses([leader]))
    with Dek.generate() as dek:
        wrapped = root.wrap("model", dek, b"c")
        for number in range(10):
            policy = f"moment-{number}"
            path = f"sys/policies/acl/{policy}"
            leader.do("PUT", path, {"policy": 'path "sys/none" { capabilities = ["read"] }'})
            token = leader.do("POST", "auth/token/create", {"policies": [policy]})
            device = make(token=token["auth"]["client_token"], **addresses([first, leader]))
            with pytest.raises(AccessDenied, match="does not allow"):
                device.unwrap(wrapped, b"c")
            right = 'path "transit/decrypt/model" { capabilities = ["update"] }'
            device = make(token=token["auth"]["client_token"], **addresses([first, leader]))
            leader.do("PUT", path, {"policy": right})
            assert device.unwrap(wrapped, b"c") == dek


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_writes_survive_an_election(healthy, make, number):
    leader, *others = healthy
    provider = make(token=leader.root, **addresses(healthy) | {"timeout": 30.0})
    with Dek.generate() as dek:
        provider.wrap("model", dek, b"c")
        leader.send(number)
        # A wrap is answered by any node; looking at the key, and both again after the election.
        wrapped = provider.wrap("model", dek, b"c")
        until(lambda: any(node.leads for node in others))
        before = int(provider.describe_key("model").newest)
        assert int(provider.rotate_key("model").newest) == before + 1
        assert provider.unwrap(wrapped, b"c") == dek


def test_our_own_rotation_is_seen_at_once(healthy, make):
    """A standby that has not caught up would wrap with the old version."""
    leader, first, second = healthy
    provider = make(token=leader.root, **addresses([first, second, leader]))
    before = int(provider.describe_key("model").newest)
    with Dek.generate() as dek:
        for number in range(1, 16):
            newest = provider.rotate_key("model").newest
            assert int(newest) == before + number
            wrapped = provider.wrap("model", dek, b"c")
            assert wrapped.version == newest
            assert provider.unwrap(wrapped, b"c") == dek


@pytest.mark.parametrize("knows_leader", [True, False])
def test_a_rotation_elsewhere_is_seen_by_a_standby(healthy, make, knows_leader):
    """``version is too new`` from a standby is asked again, of the leader if it is configured."""
    leader, first, _ = healthy
    elsewhere = make(token=leader.root, **addresses([leader]))
    device = make(token=leader.root, **addresses([first, leader] if knows_leader else [first]))
    with Dek.generate() as dek:
        for number in range(15):
            elsewhere.rotate_key("model")
            wrapped = elsewhere.wrap("model", dek, b"c")
            assert device.unwrap(wrapped, b"c") == dek
            key = f"fresh-{knows_leader}-{number}".lower()
            elsewhere.create_key(key, "aes256-gcm96", {})
            wrapped = elsewhere.wrap(key, dek, b"c")
            assert device.unwrap(wrapped, b"c") == dek
        batch = []
        for _ in range(3):
            elsewhere.rotate_key("model")
            batch.append((elsewhere.wrap("model", dek, b"c"), b"c"))
        assert [got == dek for got in device.unwrap_batch(batch)] == [True] * 3


def test_a_floor_is_never_lowered_by_a_standby_that_lags(healthy, make):
    leader, first, _ = healthy
    elsewhere = make(token=leader.root, **addresses([leader]))
    behind = make(token=leader.root, **addresses([first, leader]))
    elsewhere.create_key("floor", "aes256-gcm96", {})
    for _ in range(12):
        elsewhere.rotate_key("floor")
    time.sleep(0.5)
    for version in range(1, 12, 2):
        behind.describe_key("floor")  # connected to the standby
        elsewhere.retire_version("floor", str(version))
        elsewhere.retire_version("floor", str(version + 1))
        behind.retire_version("floor", str(version))
        states = [each.state for each in elsewhere.describe_key("floor").versions]
        assert states.count("retired") == version + 1


def test_a_new_login_is_known_to_every_node(healthy, make, secret_file):
    """A standby refuses a secret id that it has not heard of yet; the leader is asked."""
    leader, first, second = healthy
    policy = 'path "transit/decrypt/model" { capabilities = ["update"] }'
    role_id, secret_id = leader.approle(policy)
    auth = {
        "method": "approle",
        "role_id": secret_file(role_id),
        "secret_id": secret_file(secret_id),
    }
    settings = addresses([first, second, leader])
    with Dek.generate() as dek:
        wrapped = make(token=leader.root, **addresses([leader])).wrap("model", dek, b"c")
        time.sleep(0.5)
        for _ in range(15):
            assert make(auth=auth, **settings).unwrap(wrapped, b"c") == dek
        for _ in range(10):
            made = leader.do("POST", "auth/approle/role/app/secret-id")["data"]
            fresh = auth | {"secret_id": secret_file(made["secret_id"])}
            assert make(auth=fresh, **settings).unwrap(wrapped, b"c") == dek
        for _ in range(15):
            # Its policy is old; the token itself is new.
            made = leader.do("POST", "auth/token/create", {"policies": ["app"]})
            device = make(token=made["auth"]["client_token"], **settings)
            assert device.unwrap(wrapped, b"c") == dek


def test_a_bad_login_does_not_lock_the_role(healthy, make, secret_file):
    """The server locks a role after five bad logins; one bad login of ours is at most two."""
    leader, first, second = healthy
    policy = 'path "transit/decrypt/model" { capabilities = ["update"] }'
    role_id, secret_id = leader.approle(policy, "locked")
    auth = {"method": "approle", "role_id": secret_file(role_id)}
    bad = auth | {"secret_id": secret_file("wrong")}
    good = auth | {"secret_id": secret_file(secret_id)}
    time.sleep(0.5)
    with Dek.generate() as dek:
        wrapped = make(token=leader.root, **addresses([leader])).wrap("model", dek, b"c")
        for nodes in ([first, second, leader], [first, second]):
            with pytest.raises(AccessDenied, match="login by approle was refused"):
                make(auth=bad, **addresses(nodes)).unwrap(wrapped, b"c")
            assert make(auth=good, **addresses(nodes)).unwrap(wrapped, b"c") == dek


def test_what_is_not_there_is_still_said(healthy, make):
    leader, first, second = healthy
    provider = make(token=leader.root, **addresses([first, second, leader]))
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        with pytest.raises(WrongKey):
            provider.unwrap(replace(wrapped, key="missing"), b"c")
        future = wrapped.blob.replace(f":v{wrapped.version}:".encode(), b":v9999:")
        with pytest.raises(WrongKey):
            provider.unwrap(replace(wrapped, version="9999", blob=future), b"c")


def test_a_sealed_node_is_passed_over(healthy, make, caplog):
    leader, first, _ = healthy
    first.kill()
    first.start()  # it comes back sealed
    provider = make(token=leader.root, **addresses([first, leader]))
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        for _ in range(10):
            assert provider.unwrap(wrapped, b"c") == dek
        # Said once, and not for every call.
        said = [r.getMessage() for r in caplog.records if r.name == "keymgmt.vault"]
        assert said == [f"{first.address} is passed over: it is sealed or not initialised"]
    findings = {finding.name: finding for finding in provider.check("model").findings}
    assert findings[first.address].status == "failed"
    assert "operator unseal" in str(findings[first.address].hint)
    assert findings[leader.address].detail.startswith("leader")
    assert findings["round trip"].status == "ok"


def test_without_standby_reads_an_election_is_waited_out(new_cluster, make):
    nodes = new_cluster(standby_reads=False)
    nodes[0].transit("transit", "model")
    provider = make(token=nodes[0].root, **addresses(nodes) | {"timeout": 30.0})
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"context")
        with Stream([provider], wrapped, dek) as stream:
            stream.until(50)
            nodes[0].kill()
            stream.until(stream.operations + 100)
        assert stream.failures == []
        for node in nodes[1:]:
            node.kill()
        with pytest.raises(ProviderUnavailable) as caught:
            make(token=nodes[0].root, **addresses(nodes) | {"timeout": 2.0}).unwrap(wrapped, b"c")
    assert all(node.address in str(caught.value) for node in nodes)
    assert isinstance(caught.value, ProviderError)
