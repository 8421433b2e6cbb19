"""seal, inspect, verify, unseal, sign, rewrap and reseal, from one end to the other."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keymgmt.cli._output

Cli = Callable[..., Any]
pytest.importorskip("keymgmt_file")


def test_what_is_sealed_is_unsealed_the_same(cli: Cli, site: Path, sealed: Path) -> None:
    ran = cli("unseal", sealed, "plain")
    assert ran.code == 0
    assert "plaintext" in ran.err
    for file in (site / "model").iterdir():
        assert (site / "plain" / file.name).read_bytes() == file.read_bytes()


def test_inspect_takes_no_config_and_says_that_nothing_is_verified(
    cli: Cli, sealed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("inspect", sealed)
    assert ran.code == 0
    assert "nothing here is verified" in ran.out
    for fact in ("resnet50", "weights.bin", "file:models@1", "signed by"):
        assert fact in ran.out
    report = cli("inspect", sealed, "--json").json()
    assert report["verified"] is False
    assert report["manifest"]["name"] == "resnet50"


def test_verify_says_what_was_proved_and_what_was_not(cli: Cli, sealed: Path) -> None:
    report = cli("verify", sealed, "--json").json()
    assert {one["name"]: one["status"] for one in report["findings"]} == {
        "signature": "ok",
        "digests": "ok",
        "data key": "ok",
        "segments": "ok",
    }
    # Without the keys, the signature and the digests are still proved.
    (sealed.parent / "keys").rename(sealed.parent / "elsewhere")
    ran = cli("verify", sealed, "--signature-only")
    assert ran.code == 0
    assert "skipped data key" in ran.out


def test_a_second_publisher_signs(cli: Cli, sealed: Path) -> None:
    assert cli("keys", "create", "local:second", "--sign").code == 0
    assert cli("sign", sealed, "local:second").code == 0
    assert len(cli("inspect", sealed, "--json").json()["signers"]) == 2
    assert cli("verify", sealed).code == 0


def test_rewrap_moves_to_the_newest_version_and_says_so(cli: Cli, sealed: Path) -> None:
    assert cli("keys", "rotate", "local:models").code == 0
    before = (sealed / "keys.json").read_bytes()
    assert "would change" in cli("rewrap", sealed, "--dry-run").out
    assert (sealed / "keys.json").read_bytes() == before
    assert "file:models@2" in cli("rewrap", sealed).out
    assert cli("rewrap", sealed, "--json").json()["changed"] is False


def test_rewrap_of_a_tree_counts_and_stops_for_nothing(cli: Cli, site: Path, sealed: Path) -> None:
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    (sealed / "manifest.json").write_bytes(b"[]")
    ran = cli("rewrap", ".")
    assert ran.code == 4
    assert "1 models, changed 1, failed 1" in ran.out
    assert "model.sealed" in ran.err


def test_reseal_makes_another_model_of_the_same_content(cli: Cli, site: Path, sealed: Path) -> None:
    old = cli("inspect", sealed, "--json").json()["manifest"]
    new = cli("reseal", sealed, "--json").json()["manifest"]
    assert new["id"] != old["id"]
    assert new["commitment"] != old["commitment"]
    assert cli("unseal", sealed, "plain").code == 0
    content = (site / "model" / "weights.bin").read_bytes()
    assert (site / "plain" / "weights.bin").read_bytes() == content


def test_with_json_nothing_else_is_on_stdout(cli: Cli, site: Path) -> None:
    sealing = ("seal", "model", "model.sealed", "--json")
    assert cli(*sealing).json()["manifest"]["name"] == "model"
    for command in ("inspect", "verify", "rewrap", "reseal"):
        assert cli(command, "model.sealed", "--json").json()
    assert cli("unseal", "model.sealed", "plain", "--json").json()["files"]


def test_audit_events_show_with_verbose_and_hold_no_secret(cli: Cli, sealed: Path) -> None:
    key_file = json.loads((sealed.parent / "keys" / "models.jwks").read_text())
    command = [sys.executable, "-m", "keymgmt.cli", "-v", "verify", str(sealed)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=sealed.parent, timeout=60)
    assert "keymgmt.audit: event=unwrap" in ran.stderr
    assert key_file["keys"][0]["k"] not in ran.stdout + ran.stderr
    quiet = subprocess.run(
        command[:3] + command[4:], capture_output=True, text=True, timeout=60, cwd=sealed.parent
    )
    assert "event=" not in quiet.stderr


def test_the_shell_completes_providers_and_keys(cli: Cli, site: Path) -> None:
    def complete(words: str) -> str:
        environment = os.environ | {
            "_KEYMGMT_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": f"keymgmt {words}",
        }
        command = [sys.executable, "-c", "from keymgmt.cli import main; main()"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        return done.stdout.replace("\\", "")

    assert "local:" in complete("keys show loc")
    shown = complete("keys show local:mod")
    assert "models" in shown
    assert "publisher" not in shown


@pytest.mark.once
def test_bash_completes_a_key_as_the_page_says(cli: Cli, site: Path, tmp_path: Path) -> None:
    """In a real bash on a terminal: docs/cli.md has the line that lets a word hold a colon."""
    bash, program = shutil.which("bash"), Path(sys.executable).with_name("keymgmt")
    if bash is None or not program.exists():
        pytest.skip("no bash, or no keymgmt beside this Python")
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "TERM": "dumb"}
    script = subprocess.run(
        [program, "--show-completion", "bash"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    ).stdout
    (tmp_path / ".bashrc").write_text(
        f"{script}\nCOMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}\nPS1='> '\n"
    )
    child, terminal = pty.fork()
    if not child:
        os.execve(bash, [bash, "-i"], environment)
    try:
        seen = b""

        def until(expected: bytes) -> None:
            nonlocal seen
            while expected not in seen:
                assert select.select([terminal], [], [], 30)[0], seen
                seen += os.read(terminal, 4096)

        until(b"> ")
        os.write(terminal, b"keymgmt keys show local:mod\t")
        until(b"show local:models")
        assert b"local:local" not in seen
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_seal_leaves_nothing(site: Path, number: int) -> None:
    with (site / "model" / "large.bin").open("wb") as file:
        file.truncate(8 << 30)
    before = set(site.iterdir())
    command = [sys.executable, "-m", "keymgmt.cli", "seal", "model", "model.sealed"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=site) as process:
        while set(site.iterdir()) == before:
            assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, -number)
    assert b"Traceback" not in said
    assert set(site.iterdir()) == before


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    cli: Cli, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keymgmt.cli._output, "_LINE_SECONDS", 0.0)
    ran = cli("seal", "model", "model.sealed", "--json")
    assert "sealing: 100 % of 131.1 kB\n" in ran.err
    assert ran.json()["verified"]
    ran = cli("verify", "model.sealed", "--json")
    assert "verifying: 100 % of 131.1 kB\n" in ran.err
    assert ran.json()["name"] == "model"


def test_progress_is_a_bar_on_a_terminal(site: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "keymgmt.cli", "seal", "model", "model.sealed", "--json"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, cwd=site, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        # Linux ends the reading of a terminal whose last writer is gone with EIO.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                shown += part
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert b"sealing" in shown
    assert "━".encode() in shown
    assert json.loads(out)["manifest"]["name"] == "model"
