"""Names and texts that others chose, and systems that show them otherwise than most."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from keymgmt import Config, load_config
from keymgmt.console import clean
from keymgmt.errors import ConfigError, FormatError, KeymgmtError

FORGED = "x\n\x1b[2Jok  signature by release.pem\r\u2028\udcff"


def test_every_message_and_hint_is_one_printable_line():
    for error in (KeymgmtError(FORGED, hint=FORGED), FormatError(f"{FORGED} is bad")):
        for text in (str(error), error.hint or ""):
            assert text.isprintable()
    assert clean(FORGED).isprintable()


def test_a_config_key_of_very_many_dots_is_refused_at_once(tmp_path):
    path = tmp_path / "keymgmt.toml"
    path.write_text("a" + ".a" * 100_000 + " = 1\n")
    started = time.process_time()
    with pytest.raises(ConfigError, match="dots"):
        load_config(path)
    assert time.process_time() - started < 5  # it took 100 s of computing
    path.write_text('[providers.v]\nbackend = "vault"\naddress = "' + "a." * 200 + '"\n')
    load_config(path).close()


def test_two_keys_in_one_pem_are_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = b"".join(
        ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for _ in range(2)
    )
    (tmp_path / "two.pem").write_bytes(pem)
    config = Config({"policy": {"publishers": {"two.pem": ["*"]}}}, path=tmp_path / "k.toml")
    with pytest.raises(ConfigError, match=r"two\.pem is refused: there is more than one key"):
        config.public_key("two.pem")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_character(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "keymgmt.cli", "inspect", "mod\u00e8le-\u6a21.sealed"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    assert b"\\u6a21" in done.stderr
    assert done.returncode == 3
