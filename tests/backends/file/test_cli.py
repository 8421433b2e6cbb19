"""``keymgmt file lock|unlock|passwd``, as a person runs it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from keymgmt_file import FileProvider, FileSettings

CONFIG = '[providers.local]\nbackend = "file"\npath = "keys"\n'


@pytest.fixture
def site(tmp_path) -> Path:
    (tmp_path / "keymgmt.toml").write_text(CONFIG)
    (tmp_path / "keymgmt.toml").chmod(0o600)
    files = FileProvider("local", FileSettings(path=tmp_path / "keys"))
    files.create_key("release", "aes256", {})
    files.create_key("publisher", "ed25519", {})
    return tmp_path


def add_passphrase(site: Path, source: str) -> None:
    (site / "keymgmt.toml").write_text(CONFIG + f"passphrase = {source}\n")


def secret_file(site: Path, name: str, passphrase: str) -> None:
    (site / name).touch(mode=0o600)
    (site / name).write_text(passphrase + "\n")


def command(site: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "keymgmt.cli", "-c", str(site / "keymgmt.toml"), "file"),
        *arguments,
    ]


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run(*command(site, *arguments), stdin=subprocess.DEVNULL)


def type_in(site: Path, arguments: list[str], answers: list[str]) -> tuple[int, str]:
    """Run it on a terminal and type each answer when it is asked for."""
    child, terminal = pty.fork()
    if not child:
        line = command(site, *arguments)
        os.execv(line[0], line)
    output = b""
    asked = 0
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # EIO: the terminal's other end was closed
            break
        if not chunk:
            break
        output += chunk
        if output.count(b": ") > asked and output.endswith(b": ") and answers:
            asked = output.count(b": ")
            os.write(terminal, answers.pop(0).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode()


def is_locked(site: Path) -> set[bool]:
    files = FileProvider("local", FileSettings(path=site / "keys"))
    return set(files.key_files.locked_keys().values())


def test_lock_change_unlock(site):
    result = run(site, "lock")
    assert result.returncode == 3
    assert "passphrase = {" in result.stderr
    assert is_locked(site) == {False}

    secret_file(site, "old", "correct horse battery")
    add_passphrase(site, '{ file = "old" }')
    result = run(site, "lock")
    assert (result.returncode, is_locked(site)) == (0, {True})
    assert "locked 2 key files" in result.stdout
    assert "backups" in result.stderr
    assert "locked 0 key files" in run(site, "lock", "local").stdout

    secret_file(site, "new", "another battery staple")
    result = run(site, "passwd", "--new-file", str(site / "new"))
    assert result.returncode == 0
    assert "Put the new passphrase" in result.stderr
    result = run(site, "unlock")
    assert result.returncode == 5, "a wrong passphrase is denied"
    assert "does not open with this passphrase" in result.stderr
    assert "hint:" in result.stderr
    assert is_locked(site) == {True}

    add_passphrase(site, '{ file = "new" }')
    result = run(site, "unlock")
    assert (result.returncode, is_locked(site)) == (0, {False})
    assert "remove it" in result.stderr
    result = run(site, "passwd", "--new-file", str(site / "old"))
    assert result.returncode == 3
    assert "keymgmt file lock local" in result.stderr
    everything = result.stdout + result.stderr
    assert "battery" not in everything


def test_a_passphrase_is_typed_twice_before_it_locks(site):
    add_passphrase(site, '{ prompt = "Passphrase" }')
    code, output = type_in(site, ["lock"], ["correct horse battery", "corect horse battery"])
    assert code == 3
    assert "differ" in output
    assert is_locked(site) == {False}
    code, output = type_in(site, ["lock"], ["correct horse battery", "correct horse battery"])
    assert (code, is_locked(site)) == (0, {True})
    assert "horse" not in output, "what is typed is not shown"
    code, _ = type_in(site, ["passwd"], ["wrong"])
    assert code == 5
    code, _ = type_in(
        site,
        ["passwd"],
        ["correct horse battery", "another battery staple", "another battery staple"],
    )
    assert code == 0
    code, _ = type_in(site, ["unlock"], ["another battery staple"])
    assert (code, is_locked(site)) == (0, {False})
    assert "not a terminal" not in run(site, "unlock").stderr, "nothing is locked: nothing asked"


def test_a_short_passphrase_locks_nothing_unless_it_is_to(site):
    """At least 15 characters (NIST SP 800-63B-4), and not bytes; opening takes any."""
    add_passphrase(site, '{ file = "old" }')
    secret_file(site, "old", "ä" * 14)
    result = run(site, "lock")
    assert (result.returncode, is_locked(site)) == (3, {False})
    assert "error: the passphrase is shorter than 15 characters\n" in result.stderr
    assert result.stderr.endswith("all the same: keymgmt file lock local --weak\n")
    assert "ä" not in result.stderr
    result = run(site, "lock", "local", "--weak")
    assert (result.returncode, is_locked(site)) == (0, {True})
    secret_file(site, "new", "12345678901234")
    result = run(site, "passwd", "--new-file", str(site / "new"))
    assert result.returncode == 3
    assert result.stderr.endswith("all the same: keymgmt file passwd local --weak\n")
    assert run(site, "passwd", "--new-file", str(site / "new"), "--weak").returncode == 0
    secret_file(site, "old", "12345678901234")
    assert run(site, "unlock").returncode == 0


def test_a_short_passphrase_is_not_asked_twice(site):
    add_passphrase(site, '{ prompt = "Passphrase" }')
    code, output = type_in(site, ["lock"], ["short"])
    assert (code, is_locked(site)) == (3, {False})
    assert "again" not in output


def test_accept_a_key_file_that_was_restored(site):
    backup = (site / "keys" / "release.jwks").read_bytes()
    files = FileProvider("local", FileSettings(path=site / "keys"))
    files.rotate_key("release")
    (site / "keys" / "release.jwks").write_bytes(backup)
    doctor = programs.run(*command(site)[:-1], "doctor")
    assert doctor.returncode != 0
    assert "lacks version 2" in doctor.stdout + doctor.stderr
    said = run(site, "accept", "local:release")
    assert (said.returncode, said.stdout) == (0, "made version 3 of the key local:release\n")
    assert [each.version for each in files.describe_key("release").versions] == ["1", "3"]
    assert run(site, "accept", "local").returncode == 3


def test_json_of_each_command_says_what_was_done(site, check_output):
    secret_file(site, "old", "correct horse battery")
    secret_file(site, "new", "another battery staple")
    add_passphrase(site, '{ file = "old" }')
    done = []
    for arguments in (
        ("lock",),
        ("passwd", "--new-file", str(site / "new")),
        ("unlock",),
        ("accept", "local:release"),
    ):
        if arguments == ("unlock",):
            add_passphrase(site, '{ file = "new" }')
        result = run(site, *arguments, "--json")
        assert result.returncode == 0, result.stderr
        assert check_output(result.stdout) == {"keymgmt-file/1"}
        said = json.loads(result.stdout)
        assert said["path"] == str(site / "keys")
        done.append((said["command"], said.get("files"), said.get("key"), said.get("version")))
    assert done == [
        ("lock", 2, None, None),
        ("passwd", None, None, None),
        ("unlock", 2, None, None),
        ("accept", None, "local:release", "2"),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_lock_of_another_user_is_named(site, require_tool):
    """As a command leaves it that was run with sudo."""
    files = FileProvider("local", FileSettings(path=site / "keys"))
    os.chown(files.key_files.path / ".lock", 12345, -1)
    capabilities = "-dac_override,-dac_read_search,-fowner"
    setpriv = str(require_tool("setpriv", package="util-linux"))
    limits = (f"--inh-caps={capabilities}", f"--bounding-set={capabilities}")
    line = [*command(site)[:-1], "keys", "rotate", "local:release"]
    said = programs.run(setpriv, *limits, *line)
    assert said.returncode == 5
    assert f"{site / 'keys' / '.lock'}: permission denied (EACCES)" in said.stderr
    assert ".lock too" in said.stderr


def test_which_provider(site):
    result = run(site, "lock", "lokal")
    assert result.returncode == 3
    assert "did you mean 'local'" in result.stderr
    (site / "keymgmt.toml").write_text(CONFIG + CONFIG.replace("local", "second"))
    result = run(site, "lock")
    assert result.returncode == 3
    assert "local, second" in result.stderr
