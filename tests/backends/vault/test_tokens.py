"""Tokens and secret ids: renewed while they live, left behind by nobody, and not used up."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forks import in_child
from programs import run
from vaults import JSON, UNWRAP, approle, errors, opens
from waiting import until

import keymgmt
from keymgmt.backend import AccessDenied


def tokens(bao: Any) -> set[str]:
    """The accessors of all tokens that live."""
    return set(bao.do("LIST", "auth/token/accessors")["data"]["keys"])


def threads_of_tokens() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "keymgmt site token"]


@pytest.mark.once
def test_a_token_is_renewed_while_nothing_is_opened(make, bao, wrapped, secret_file):
    auth = approle(bao, secret_file, "idle", token_ttl="3s", secret_id_num_uses=1)
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    time.sleep(7)
    assert opens(provider, wrapped)


@pytest.mark.once
def test_a_renewal_that_fails_costs_nobody_an_unwrap(
    make, bao, wrapped, gateway, secret_file, caplog
):
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
    make, bao, wrapped, gateway, secret_file, caplog
):
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
def test_a_token_that_will_die_is_said_before(make, bao, wrapped, caplog):
    token = bao.token(UNWRAP, ttl="6s", explicit_max_ttl="8s", renewable=True)
    provider = make(bao, token=token)
    said = False
    with contextlib.suppress(AccessDenied):
        while not said:
            said = "cannot be renewed and ends in" in caplog.text
            assert opens(provider, wrapped)
            time.sleep(0.05)
    assert said


def test_the_thread_of_a_token_ends_with_its_provider(make, bao, wrapped, secret_file):
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


def test_close_revokes_what_this_process_logged_in_for(make, bao, wrapped, secret_file):
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


def test_neither_opens_nor_commands_leave_a_token(bao, secret_file, tmp_path):
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


def test_a_batch_token_leaves_nothing(make, bao, wrapped, gateway, secret_file):
    before, known = gateway(), tokens(bao)
    auth = approle(bao, secret_file, "batch", token_type="batch")
    provider = make(address=before.address, auth=auth)
    assert opens(provider, wrapped)
    assert tokens(bao) <= known  # a token of another test may end meanwhile
    provider.close()
    assert before.count("auth/token/revoke-self") == 0


def test_close_lets_a_call_in_flight_end(make, bao, wrapped, gateway, secret_file):
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
    make, bao, wrapped, gateway, secret_file
):
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


def test_workers_that_start_together_send_one_bad_login(make, bao, wrapped, gateway, secret_file):
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


def test_a_locked_role_names_the_lockout(make, bao, wrapped, secret_file):
    auth = approle(bao, secret_file, "locked-out")
    for _ in range(6):
        role_id = Path(auth["role_id"]["file"]).read_text()
        body = {"role_id": role_id, "secret_id": "wrong"}
        bao.api("POST", "auth/approle/login", body, token=None)
    with pytest.raises(AccessDenied, match="refused") as caught:
        make(bao, auth=auth).unwrap(wrapped, b"c")
    assert "locked the role" in str(caught.value.hint)


def test_a_token_of_few_uses_is_used_for_nothing_else(make, bao, wrapped, gateway, secret_file):
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
