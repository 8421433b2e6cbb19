"""Files that are replaced, people who type, keys of others, and servers that ignore contexts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vaults import JSON, UNWRAP, approle, opens
from waiting import until

from keymgmt.backend import AccessDenied, Dek, ProviderUnavailable, WrongKey

# What changes on disk.


def test_a_replaced_ca_file_is_taken(make, bao, wrapped, other_authority, tmp_path):
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


def test_a_replaced_client_certificate_is_taken(make, new_bao, tmp_path):
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


def test_a_replaced_secret_id_is_taken(make, bao, wrapped, secret_file):
    auth = approle(bao, secret_file, "moved", secret_id_num_uses=1)
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    made = bao.do("POST", "auth/approle/role/moved/secret-id")["data"]
    Path(auth["secret_id"]["file"]).write_text(made["secret_id"])
    bao.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")
    assert opens(provider, wrapped)


@pytest.mark.parametrize("method", ["token", "agent"])
def test_a_replaced_token_is_taken(make, bao, wrapped, secret_file, method):
    """One that somebody else writes to a file, an agent's sink say."""
    first = bao.token(UNWRAP)
    place = secret_file(first)
    provider = make(bao, auth={"method": method, "token" if method == "token" else "sink": place})
    assert opens(provider, wrapped)
    Path(place["file"]).write_text(bao.token(UNWRAP))
    bao.do("POST", "auth/token/revoke", {"token": first})
    assert opens(provider, wrapped)


@pytest.mark.parametrize("method", ["token", "approle"])
def test_a_person_who_types_a_secret_has_time(make, bao, wrapped, secret_file, monkeypatch, method):
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
    make, bao, wrapped, secret_file, monkeypatch, caplog
):
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


def test_keys_of_others_cost_no_request(make, bao, wrapped, gateway):
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


def test_a_refusal_costs_one_request(make, bao, wrapped, gateway):
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


def test_keys_of_others_do_not_fail_a_list(make, bao, caplog):
    bao.transit("shared", "mine", "yours")
    policy = """
        path "shared/keys" { capabilities = ["list"] }
        path "shared/keys/mine" { capabilities = ["read"] }
    """
    provider = make(bao, token=bao.token(policy), mount="shared")
    assert [info.key for info in provider.list_keys()] == ["mine"]
    assert "read the key yours" in caplog.text


# Contexts.


def test_a_server_that_ignores_the_context_is_refused(make, bao, gateway):
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


def test_a_warning_that_the_context_was_ignored_is_read(make, bao, wrapped, gateway):
    old = gateway()
    text = b'{"data": {"plaintext": "%s"}, "warnings": ["Endpoint ignored these unrecognized ' % (
        b"A" * 43 + b"="
    )
    old.before = lambda method, path, body: (200, JSON, text + b'parameters: [associated_data]"]}')
    with pytest.raises(ProviderUnavailable, match="does not bind"):
        make(address=old.address, token=bao.root).unwrap(wrapped, b"c")


# The development server.


def test_the_dev_server_ends_with_a_killed_parent(bao_binary, tmp_path):
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
