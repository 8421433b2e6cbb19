"""What files that others wrote, and names that mean something to a terminal, do to the output."""

from __future__ import annotations

import subprocess
import sys


def test_a_name_is_no_picture(site, cli):
    """Rich takes ``:key:`` for an emoji, and keys are often called so."""
    ran = cli("keys", "create", "local:key")
    assert ran.out.startswith("local:key: aes256")


def test_metadata_does_not_pass_for_facts(site, cli):
    sealed = cli(
        "seal", "model", "m.sealed", "--name", "resnet50", "--release", "3",
        "-m", "name=other", "-m", "release=99", "-m", "note=x\nsigned by  " + 64 * "0",
    )  # fmt: skip
    for ran in (sealed, cli("inspect", "m.sealed")):
        lines = ran.out.splitlines()
        assert sum(line.split()[:2] == ["name", "resnet50"] for line in lines) == 1
        assert not any(line.split()[:2] == ["name", "other"] for line in lines)
        assert sum(line.split()[:2] == ["release", "3"] for line in lines) == 1
        assert sum(line.startswith("signed by") for line in lines) == 1
        assert "99" in ran.out


def test_an_audit_event_is_one_line(site, cli):
    assert cli("keys", "create", "local:d", "--kind", "hpke-x25519").code == 0
    odd = site / "device\n\x1b[2Jaudit: event=unwrap outcome=ok"
    exported = cli("keys", "export", "local:d", "-o", str(odd))
    fingerprint = exported.err.split()[-1]
    command = [sys.executable, "-P", "-m", "keymgmt.cli", "-v", "seal", "model", "m.sealed"]
    done = subprocess.run(
        [*command, "--to", f"@{odd}", "--fingerprint", fingerprint],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "recipient=" in done.stderr
    assert "\x1b" not in done.stderr
    assert not any(line.startswith("audit") for line in done.stderr.splitlines())
