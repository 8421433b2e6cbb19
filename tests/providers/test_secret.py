"""Where a secret comes from, and what is refused as its place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from keymgmt._providers.secret_source import SecretSource
from keymgmt.errors import ProviderUnavailable


def source(base: Path, **place: str) -> SecretSource:
    made: SecretSource = SecretSource.model_validate(place, context={"base": base})
    return made


@pytest.fixture
def private(tmp_path) -> Path:
    path = tmp_path / "pin"
    path.touch(mode=0o600)
    path.write_bytes(b"hunter2\n")
    return path


def test_a_private_file_without_its_line_end(private):
    secret = source(private.parent, file="pin").read()
    assert secret == b"hunter2"
    assert isinstance(secret, bytearray)
    private.write_bytes(b" two\nlines\r\n")
    assert source(private.parent, file="pin").read() == b" two\nlines"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_file_that_others_can_use_is_refused(private, mode):
    private.chmod(mode)
    with pytest.raises(ProviderUnavailable, match="is refused: others can use it") as raised:
        source(private.parent, file="pin").read()
    assert raised.value.hint == f"chmod go= {private}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_is_refused(private):
    os.chown(private, 12345, 12345)
    with pytest.raises(ProviderUnavailable, match="belongs to user 12345"):
        source(private.parent, file="pin").read()


def test_what_is_no_small_file_is_refused_and_never_waited_for(private):
    os.mkfifo(private.parent / "fifo", 0o600)
    with pytest.raises(ProviderUnavailable, match="is not a regular file"):
        source(private.parent, file="fifo").read()
    private.write_bytes(b"x" * 65537)
    with pytest.raises(ProviderUnavailable, match="is larger than 65536 bytes"):
        source(private.parent, file="pin").read()
    private.write_bytes(b"\n")
    with pytest.raises(ProviderUnavailable, match="is empty"):
        source(private.parent, file="pin").read()
    with pytest.raises(ProviderUnavailable, match="cannot read the secret file"):
        source(private.parent, file="missing").read()


def test_an_environment_variable(tmp_path, monkeypatch):
    place = source(tmp_path, env="ACME_PIN")
    with pytest.raises(ProviderUnavailable, match="ACME_PIN is not set"):
        place.read()
    monkeypatch.setenv("ACME_PIN", "hunter2")
    assert place.read() == b"hunter2"


def test_a_systemd_credential(private, monkeypatch):
    place = source(private.parent, credential="pin")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ProviderUnavailable, match="no systemd credentials") as raised:
        place.read()
    assert "LoadCredential" in str(raised.value.hint)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(private.parent))
    private.chmod(0o440)
    assert place.read() == b"hunter2"


def test_a_prompt_needs_a_terminal(tmp_path, monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ProviderUnavailable, match="not a terminal"):
            source(tmp_path, prompt="PIN of the HSM").read()


def test_a_keyring_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    gone: Any = None
    monkeypatch.setitem(sys.modules, "keyring", gone)
    with pytest.raises(ProviderUnavailable) as raised:
        source(tmp_path, keyring="acme/pin").read()
    assert raised.value.hint == 'pip install "keymgmt[keyring]"'


def test_the_place_is_shown_and_never_the_secret(private):
    place = source(private.parent, file="pin")
    place.read()
    assert str(private) in str(place)
    assert "hunter2" not in f"{place} {place!r}"
