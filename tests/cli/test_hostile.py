"""What files that others wrote, and names that mean something to a terminal, do to the output."""

from __future__ import annotations

import dataclasses
import sys

from programs import run

from keymgmt.sealed.keys import Group, UnlockPolicy


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
    done = run(*command, "--to", f"@{odd}", "--fingerprint", fingerprint)
    assert done.returncode == 0, done.stderr
    assert "recipient=" in done.stderr
    assert "\x1b" not in done.stderr
    assert not any(line.startswith("audit") for line in done.stderr.splitlines())


def test_thousands_of_reasons_are_not_printed_one_by_one(sealed, cli):
    """A fleet has thousands of recipients, and those that might have opened come first."""
    policy = UnlockPolicy.from_bytes((sealed / "keys.json").read_bytes())
    real = policy.groups[0].recipients[0]
    others = [
        Group(bytes(16), (dataclasses.replace(real, key=f"device{number}"),))
        for number in range(3000)
    ]
    damaged = Group(
        bytes(16), (dataclasses.replace(real, blob=real.blob[:-1] + bytes([real.blob[-1] ^ 1])),)
    )
    policy = dataclasses.replace(policy, groups=(*others, damaged))
    (sealed / "keys.json").write_bytes(policy.to_bytes())
    ran = cli("verify", "model.sealed")
    assert ran.code == 4
    assert len(ran.err.splitlines()) < 500
    assert "UnwrapFailed" in ran.err
    assert "2901 more" in ran.err
