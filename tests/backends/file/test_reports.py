"""No secret in what tools show that report an error with the variables of every frame."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bits import flipped
from keymgmt_file import FileProvider
from reports import report

from keymgmt.backend import Dek, KeymgmtError, ProviderError

Open = Callable[..., FileProvider]
Within = Callable[[int, int, Callable[[], object]], None]


def secret_of(path: Path) -> str:
    return str(json.loads((path / "models.jwks").read_text())["keys"][0]["k"])


FULL_DISK = (resource.RLIMIT_FSIZE, 20)


def test_a_damaged_key_file(open_store, path):
    provider = open_store()
    provider.create_key("models", "aes256", {})
    secret = secret_of(path)
    data = json.loads((path / "models.jwks").read_text())
    data["keys"] *= 2
    (path / "models.jwks").write_text(json.dumps(data))
    with pytest.raises(ProviderError) as raised:
        provider.describe_key("models")
    assert secret not in report(raised.value)


def test_a_full_disk(open_store, path, within):
    plain, locked = open_store(), open_store("correct horse battery")
    plain.create_key("models", "aes256", {})
    secret = secret_of(path)

    def change() -> None:
        for call in (lambda: plain.rotate_key("models"), locked.key_files.lock):
            with pytest.raises(ProviderError) as raised:
                call()
            assert secret not in report(raised.value)

    within(*FULL_DISK, change)


def test_a_full_disk_while_unlocking(open_store, path, within):
    provider = open_store("correct horse battery")
    open_store().create_key("models", "aes256", {})
    secret = secret_of(path)
    provider.key_files.lock()

    def unlock() -> None:
        with pytest.raises(ProviderError) as raised:
            provider.key_files.unlock()
        assert secret not in report(raised.value)
        assert str(list(secret.encode()))[1:-1] not in report(raised.value)

    within(*FULL_DISK, unlock)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("passphrase", [None, "correct horse battery"], ids=["plain", "locked"])
@pytest.mark.parametrize("kind", ["aes256", "hpke-x25519", "hpke-mlkem768-x25519", "ed25519"])
def test_what_is_refused(open_store, path, kind, passphrase):
    provider = open_store(passphrase)
    provider.create_key("models", kind, {})
    keys = provider.key_files.read("models")
    with keys.secret("1") as secret:
        secrets = [str(keys.versions[0][keys.kind.secret]), bytes(secret)]
    calls: list[Callable[[], object]] = [
        lambda: provider.retire_version("models", "1"),
        lambda: provider.create_key("models", kind, {}),
    ]
    if kind == "ed25519":
        calls.append(lambda: provider.wrap("models", Dek.generate(), b""))
    else:
        wrapped = provider.wrap("models", Dek.generate(), b"")
        recogniser = dict.fromkeys(wrapped.params, "00" * 8)
        calls += [
            lambda: provider.unwrap(wrapped, b"another context"),
            lambda: provider.unwrap(replace(wrapped, blob=flipped(wrapped.blob)), b""),
            lambda: provider.unwrap(replace(wrapped, params=recogniser), b""),
            lambda: provider.unwrap(replace(wrapped, params={}), b""),
            lambda: provider.unwrap(replace(wrapped, mechanism="none"), b""),
            lambda: provider.sign("models", b""),
        ]
    refused(calls, secrets)
    provider.rotate_key("models")
    provider.retire_version("models", "1")
    if kind != "ed25519":
        refused([lambda: provider.unwrap(wrapped, b"")], secrets)
    # Another file under the name, and one that is cut.
    content = (path / "models.jwks").read_bytes()
    (path / "models.jwks").unlink()
    provider.create_key("models", kind, {})
    (path / "models.jwks").write_bytes(content)
    refused([lambda: provider.rotate_key("models")], secrets)
    (path / "models.jwks").write_bytes(content[:-9])
    refused([lambda: provider.describe_key("models")], secrets)


def refused(calls: list[Callable[[], object]], secrets: list[str | bytes]) -> None:
    for call in calls:
        with pytest.raises(KeymgmtError) as raised:
            call()
        error: BaseException | None = raised.value
        while error is not None:
            shown = report(error)
            for secret in secrets:
                spelled = [secret] if isinstance(secret, str) else spellings(secret)
                assert not [each for each in spelled if each in shown]
            error = error.__cause__ or error.__context__


def spellings(secret: bytes) -> list[str]:
    return [secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1]]
