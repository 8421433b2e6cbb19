"""seal, inspect, verify, unseal, sign, rewrap and reseal, from one end to the other."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import run

import keymgmt.cli._output

Cli = Callable[..., Any]
pytest.importorskip("keymgmt_file")


def test_what_is_sealed_is_unsealed_the_same(cli, site, sealed):
    ran = cli("unseal", sealed, "plain")
    assert ran.code == 0
    assert "plaintext" in ran.err
    for file in (site / "model").iterdir():
        assert (site / "plain" / file.name).read_bytes() == file.read_bytes()


def test_inspect_takes_no_config_and_says_that_nothing_is_verified(
    cli, sealed, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    ran = cli("inspect", sealed)
    assert ran.code == 0
    assert "nothing here is verified" in ran.out
    for fact in ("resnet50", "weights.bin", "file:models@1", "signed by"):
        assert fact in ran.out
    report = cli("inspect", sealed, "--json").json()
    assert report["verified"] is False
    assert report["manifest"]["name"] == "resnet50"


def test_verify_says_what_was_proved_and_what_was_not(cli, sealed):
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


def test_a_second_publisher_signs(cli, sealed):
    assert cli("keys", "create", "local:second", "--sign").code == 0
    assert cli("sign", sealed, "local:second").code == 0
    assert len(cli("inspect", sealed, "--json").json()["signers"]) == 2
    assert cli("verify", sealed).code == 0


def test_rewrap_moves_to_the_newest_version_and_says_so(cli, sealed):
    assert cli("keys", "rotate", "local:models").code == 0
    before = (sealed / "keys.json").read_bytes()
    assert "would change" in cli("rewrap", sealed, "--dry-run").out
    assert (sealed / "keys.json").read_bytes() == before
    assert "file:models@2" in cli("rewrap", sealed).out
    assert cli("rewrap", sealed, "--json").json()["changed"] is False


def test_rewrap_of_a_tree_counts_and_stops_for_nothing(cli, site, sealed):
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    (sealed / "manifest.json").write_bytes(b"[]")
    ran = cli("rewrap", ".")
    assert ran.code == 4
    assert "1 model, changed 1, failed 1" in ran.out
    assert "model.sealed" in ran.err


def test_the_json_of_a_run_over_a_tree_is_enough_to_decide(cli, site, sealed):
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    (sealed / "manifest.json").write_bytes(b"[]")
    ran = cli("rewrap", ".", "--json")
    *lines, summary = (json.loads(line) for line in ran.out.splitlines())
    assert ran.code == summary["exit_code"] == 4
    assert summary["format"] == "keymgmt-rewrap/1"
    assert (summary["models"], summary["changed"], summary["failed"]) == (1, 1, 1)
    assert summary["groups"] == {"moved": 1}
    (failed,) = (line for line in lines if "error" in line)
    assert (failed["path"], failed["error"]["class"]) == ("model.sealed", "FormatError")
    (done,) = (line for line in lines if line.get("changed"))
    assert done["groups"][0]["state"] == "moved"


def test_a_shard_of_a_tree(cli, site, sealed):
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    summaries = [
        json.loads(cli("rewrap", ".", "--shard", f"{number}/2", "--json").out.splitlines()[-1])
        for number in (1, 2)
    ]
    assert [summary["shard"] for summary in summaries] == ["1/2", "2/2"]
    assert sum(summary["changed"] for summary in summaries) == 2
    for command in ("rewrap", "verify", "sign", "reseal"):
        assert cli(command, ".", "--shard", "3/2").code == 3
        ran = cli(command, sealed, "--shard", "1/2")
        assert (ran.code, "--shard is for a tree" in ran.err) == (3, True)


def test_a_rewrap_of_a_tree_is_resumed(cli, site, sealed):
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    assert "changed 2, failed 0, finished before 0" in cli("rewrap", ".", "--resume", "done").out
    assert cli("rewrap", ".").code == 0
    assert "changed 0, failed 0, finished before 2" in cli("rewrap", ".", "--resume", "done").out
    ran = cli("rewrap", ".", "--resume", "done", "--json")
    *lines, summary = (json.loads(line) for line in ran.out.splitlines())
    assert [line["skipped"] for line in lines] == [True, True]
    assert (summary["models"], summary["changed"], summary["skipped"]) == (2, 0, 2)
    for arguments in ([sealed, "--resume", "done"], [".", "--resume", "done", "-n"]):
        assert cli("rewrap", *arguments).code == 3
    ran = cli("rewrap", ".", "--resume", "done", "--shard", "1/2")
    assert (ran.code, "differs in shard" in ran.err) == (3, True)
    assert "remove it" in ran.hint


@pytest.mark.parametrize(
    "command", [["verify"], ["sign", "--if-signed-by", "publisher.pem"], ["reseal"]]
)
def test_every_verb_over_a_tree_takes_a_part(cli, site, sealed, command):
    assert cli("seal", "model", "other.sealed").code == 0
    parts = [cli(*command, ".", "--shard", f"{number}/2", "--json") for number in (1, 2)]
    summaries = [json.loads(part.out.splitlines()[-1]) for part in parts]
    assert [(each["shard"], each["models"]) for each in summaries] == [("1/2", 1), ("2/2", 1)]
    assert json.loads(cli(*command, ".", "--json").out.splitlines()[-1])["shard"] is None


def test_usage_of_a_part_says_so(cli, site, sealed):
    assert cli("seal", "model", "other.sealed").code == 0
    assert cli("keys", "rotate", "local:models").code == 0
    ran = cli("keys", "usage", ".", "local:models", "--shard", "2/2")
    assert "not named in this part (2/2) of it" in " ".join(ran.out.split())
    found = cli("keys", "usage", ".", "--shard", "2/2", "--json").json()
    assert (found["shard"], found["models"]) == ("2/2", 1)
    assert cli("keys", "usage", ".", "--shard", "0/2").code == 3


def test_a_tree_is_signed_verified_and_resealed(cli, site, sealed):
    assert cli("keys", "rotate", "local:publisher").code == 0
    refused = cli("sign", ".")
    assert refused.code == 3
    assert "--if-signed-by" in refused.hint
    assert "1 model: signed 1" in cli("sign", ".", "--if-signed-by", "publisher.pem").out
    ran = cli("verify", ".", "--json")
    *lines, summary = (json.loads(line) for line in ran.out.splitlines())
    assert [line["state"] for line in lines] == ["verified"]
    assert summary == {
        "format": "keymgmt-verify/1",
        "models": 1,
        "failed": 0,
        "states": {"verified": 1},
        "shard": None,
        "exit_code": 0,
    }
    assert "resealed 1" in cli("reseal", ".").out
    (sealed / "keys.json").write_bytes(b"{}")
    ran = cli("verify", ".", "--json")
    assert json.loads(ran.out.splitlines()[-1])["exit_code"] == ran.code == 4


def test_an_interrupted_reseal_says_how_it_goes_on(cli, site, sealed):
    ran = cli("reseal", ".")
    assert "resealed 1" in ran.out
    again = re.search(r"run it again with (--created-before) (\S+)", ran.err)
    assert again, ran.err
    # What was resealed in the second in which it began may be resealed once more.
    later = again[2].replace("20", "29", 1)
    assert "resealed 1" in cli("reseal", ".", again[1], later).out
    assert "current 1" in cli("reseal", ".", again[1], "2020-01-01T00:00:00Z").out
    assert cli("reseal", ".", again[1], "30d").code == 3
    assert cli("reseal", sealed, *again.groups()).code == 3


def test_exactly_these_groups_open_it(cli, site, sealed):
    assert cli("keys", "create", "local:more").code == 0
    ran = cli("rewrap", sealed, "--set", "local:more")
    assert ran.code == 0
    assert "dropped" in ran.out
    assert cli("inspect", sealed, "--json").json()["groups"] == [["file:more@1"]]
    refused = cli("rewrap", sealed, "--set", "local:more", "--drop", "file:more")
    assert refused.code == 3


def test_reseal_makes_another_model_of_the_same_content(cli, site, sealed):
    old = cli("inspect", sealed, "--json").json()["manifest"]
    new = cli("reseal", sealed, "--json").json()["manifest"]
    assert new["id"] != old["id"]
    assert new["commitment"] != old["commitment"]
    assert cli("unseal", sealed, "plain").code == 0
    content = (site / "model" / "weights.bin").read_bytes()
    assert (site / "plain" / "weights.bin").read_bytes() == content


def test_with_json_nothing_else_is_on_stdout(cli, site):
    sealing = ("seal", "model", "model.sealed", "--json")
    assert cli(*sealing).json()["manifest"]["name"] == "model"
    for command in ("inspect", "verify", "rewrap", "reseal"):
        assert cli(command, "model.sealed", "--json").json()
    assert cli("unseal", "model.sealed", "plain", "--json").json()["files"]


def test_audit_events_show_with_verbose_and_hold_no_secret(cli, sealed):
    key_file = json.loads((sealed.parent / "keys" / "models.jwks").read_text())
    command = [sys.executable, "-m", "keymgmt.cli", "-v", "verify", str(sealed)]
    ran = run(*command, cwd=sealed.parent)
    assert "keymgmt.audit: event=unwrap" in ran.stderr
    assert key_file["keys"][0]["k"] not in ran.stdout + ran.stderr
    quiet = run(*(command[:3] + command[4:]), cwd=sealed.parent)
    assert "event=" not in quiet.stderr


def test_inspect_prints_a_command_that_can_be_copied(cli: Cli, sealed: Path) -> None:
    sealed.rename(sealed.with_name("press 4; true.sealed"))
    out = cli("inspect", "press 4; true.sealed").out
    command = out.partition("`keymgmt ")[2].partition("`")[0]
    assert cli(*shlex.split(command)).code == 0


_INTERRUPTS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _hears_a_hangup():
    """What is started here ends by SIGHUP, also where nohup started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", _INTERRUPTS)
def test_an_interrupted_seal_leaves_nothing(site, number):
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


def test_a_lost_terminal_leaves_nothing_though_no_progress_can_be_shown(site):
    with (site / "model" / "large.bin").open("wb") as file:
        file.truncate(8 << 30)
    before = set(site.iterdir())
    command = [sys.executable, "-m", "keymgmt.cli", "seal", "model", "model.sealed"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=site) as process:
        os.close(theirs)
        while set(site.iterdir()) == before:
            assert process.poll() is None
        os.close(ours)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 128 + signal.SIGHUP
    assert set(site.iterdir()) == before


_FORKS = """
import os, signal, sys, time
from keymgmt.cli import _run

def work(arguments):
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), int(sys.argv[1])))
    if os.fork() == 0:
        os._exit(0)
    time.sleep(60)

_run._run = work
_run.run([])
"""


@pytest.mark.parametrize("number", _INTERRUPTS)
def test_a_signal_that_comes_during_a_fork_is_not_lost(number):
    """Python cannot raise there, nor in a ``__del__``, and only tells of what it ignored."""
    command = [sys.executable, "-c", _FORKS, str(int(number))]
    ran = run(*command)
    assert (ran.returncode, ran.stderr) == (128 + number, "")


_CONVERTS = """
import os, sys, time
from keymgmt.cli import _run

def work(arguments):
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(60)
    except BaseException as error:
        raise RuntimeError("the class cannot be made") from error

_run._run = work
_run.run([])
"""


@pytest.mark.parametrize("number", _INTERRUPTS)
def test_a_signal_that_a_library_turns_into_its_own_error_is_no_traceback(number):
    """As pydantic does while it makes a class, which our modules do when they are imported."""
    command = [sys.executable, "-c", _CONVERTS, str(int(number))]
    ran = run(*command)
    assert (ran.returncode, ran.stderr) == (128 + number, "")


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(cli, site, monkeypatch):
    monkeypatch.setattr(keymgmt.cli._output, "_LINE_SECONDS", 0.0)
    ran = cli("seal", "model", "model.sealed", "--json")
    assert "sealing: 100 % of 131.1 kB\n" in ran.err
    assert ran.json()["verified"]
    ran = cli("verify", "model.sealed", "--json")
    assert "verifying: 100 % of 131.1 kB\n" in ran.err
    assert ran.json()["name"] == "model"


def run_with_a_terminal_for_stderr(*arguments: str) -> tuple[str, str]:
    """What a command showed on the terminal, and its stdout."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", "keymgmt", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    ) as process:
        os.close(theirs)
        shown = b""
        # Read while it runs: a terminal holds 4 KiB, and on a busy machine it draws more than that.
        # Linux ends the reading of a terminal whose last writer is gone with EIO.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                shown += part
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    return shown.decode(), out


def test_progress_is_a_bar_on_a_terminal(site):
    shown, out = run_with_a_terminal_for_stderr("seal", "model", "model.sealed", "--json")
    assert "sealing" in shown
    assert "━" in shown
    assert json.loads(out)["manifest"]["name"] == "model"


@pytest.mark.parametrize(("command", "doing"), [("verify", "verifying"), ("reseal", "resealing")])
def test_progress_over_a_tree_names_the_model_at_hand(cli, site, monkeypatch, command, doing):
    for name in ("[b]a", "b"):
        (site / "tree").mkdir(exist_ok=True)
        assert cli("seal", "model", f"tree/{name}.sealed").code == 0
    monkeypatch.setattr(keymgmt.cli._output, "_LINE_SECONDS", 0.0)
    ran = cli(command, "tree")
    lines = ran.err.splitlines()
    assert f"{doing}: 0 done, tree/[b]a.sealed: 100 %" in lines
    assert f"{doing}: 1 done, tree/b.sealed: 100 %" in lines
    assert lines[-1] == f"{doing}: 2"
    shown, out = run_with_a_terminal_for_stderr(command, "tree", "--json")
    assert doing in shown
    assert json.loads(out.splitlines()[-1])["models"] == 2


@pytest.mark.parametrize("command", ["verify", "rewrap", "reseal"])
def test_a_failure_in_a_tree_is_told_once(cli, site, command):
    (site / "tree").mkdir()
    ran = cli(command, "tree")
    assert ran.err.count("there is no sealed model") == 1
    assert cli("seal", "model", "tree/b.sealed").code == 0
    shutil.copytree(site / "tree" / "b.sealed", site / "tree" / "a.sealed")
    (site / "tree" / "a.sealed" / "keys.json").unlink()
    ran = cli(command, "tree")
    assert ran.code in (3, 4)
    assert ran.err.count("tree/a.sealed: ") == 1


def test_sign_names_who_signed_before(cli, site, sealed):
    ran = cli("sign", sealed)
    assert "was signed by publisher.pem" in ran.err
    assert cli("keys", "create", "local:stranger", "--kind", "ed25519").code == 0
    assert cli("sign", sealed, "local:stranger").code == 0
    ran = cli("sign", sealed)
    assert "a stranger (key " in ran.err
    (sealed / "signatures.json").unlink()
    ran = cli("sign", sealed, "--unopened")
    assert ran.code == 0
    assert "has no signature yet" in ran.err
    assert "unopened: who made it was not checked" in ran.out
    for unopened in (True, False):
        ran = cli("sign", sealed, *["--unopened"] * unopened, "--json")
        assert ran.json()["unopened"] is unopened
        tree = ("sign", ".", "--if-signed-by", "publisher.pem", *["--unopened"] * unopened)
        line = json.loads(cli(*tree, "--json").out.splitlines()[0])
        assert line["unopened"] is unopened


def test_inspect_of_a_folder_names_a_model_below(cli, sealed):
    folder = sealed.parent / "two words"
    folder.mkdir()
    assert cli("inspect", folder).error.endswith("has no manifest.json")
    sealed.rename(folder / "a.sealed")
    ran = cli("inspect", folder)
    assert ran.code == 4
    assert ran.error.endswith(f"a folder of them, such as {folder / 'a.sealed'}")
    assert ran.hint.endswith(f"keymgmt verify '{folder}'")


def test_inspect_says_of_a_signature_that_it_was_not_checked(cli, sealed):
    """Anybody can write there who signed, and until when."""
    (line,) = [line for line in cli("inspect", sealed).out.splitlines() if "signed by" in line]
    assert line.endswith("says signatures.json, unchecked")
    made = cli("seal", "model", "n.sealed").out
    assert "signed by" in made
    assert "unchecked" not in made


def test_a_publisher_says_until_when_his_signature_counts(cli, sealed):
    ran = cli("sign", sealed, "--expires", "30d")
    assert ran.code == 0
    assert ", until 20" in ran.out
    assert ", until 20" in cli("inspect", sealed).out
    assert ", until 20" in cli("verify", sealed, "--signature-only").out
    assert cli("sign", sealed, "--expires", "2999-12-31T00:00:00Z").code == 0
    (until,) = cli("inspect", sealed, "--json").json()["expiries"].values()
    assert until == "2999-12-31T00:00:00Z"
    assert f", until {until}" in cli("verify", sealed).out
    for wrong in ("tomorrow", "0d", "2020-01-01T00:00:00Z", "2027-02-31T00:00:00Z", "99999999d"):
        assert cli("sign", sealed, "--expires", wrong).code == 3


def test_a_time_limit_from_the_first_seal_on(cli, site):
    def until() -> str:
        (found,) = cli("inspect", "model.sealed", "--json").json()["expiries"].values()
        return str(found)

    assert cli("seal", "model", "model.sealed", "--expires", "2999-12-31T00:00:00Z").code == 0
    assert until() == "2999-12-31T00:00:00Z"
    assert ", until 2999" in cli("verify", "model.sealed").out
    # A new data key does not make of a model for a while one for ever.
    assert cli("reseal", "model.sealed").code == 0
    assert until() == "2999-12-31T00:00:00Z"
    assert ", until 2999" in cli("verify", "model.sealed").out
    assert cli("reseal", "model.sealed", "--expires", "2998-12-31T00:00:00Z").code == 0
    assert until() == "2998-12-31T00:00:00Z"
    assert cli("reseal", ".", "--expires", "30d").code == 0
    assert until().startswith("20")
    for wrong in ("tomorrow", "2020-01-01T00:00:00Z"):
        assert cli("seal", "model", "other.sealed", "--expires", wrong).code == 3
    config = site / "keymgmt.toml"
    config.write_text(config.read_text().replace("\nsign =", "\n# sign ="))
    refused = cli("seal", "model", "other.sealed", "--expires", "30d")
    assert refused.code == 3
    assert "--sign" in refused.hint
    assert not (site / "other.sealed").exists()


def test_what_was_hardly_meant_to_be_sealed_is_named(cli, site):
    model = site / "model"
    for name in (".env", ".git/config", "sub/id_ed25519", "old.sealed/keys.json", "keys/a.jwks"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    (model / "nothing" / "below").mkdir(parents=True)
    ran = cli("seal", model, "a.sealed")
    assert ran.code == 0
    named = ".env, .git, keys/a.jwks, old.sealed, sub/id_ed25519"
    assert f"secrets or leftovers, and is sealed too: {named}\n" in ran.err
    assert str(model / ".keymgmtignore") in ran.hint
    assert "empty folders are not sealed: nothing/below\n" in ran.err
    (model / ".keymgmtignore").write_text("# ours\n.env\n.git/\n*.sealed\nsub/*\n/keys\n")
    ran = cli("seal", model, "b.sealed", "--json")
    assert "leftovers" not in ran.err
    assert (
        "left out by .keymgmtignore: .env, .git, .keymgmtignore, keys, old.sealed, sub/id_ed25519\n"
        in ran.err
    )
    files = [entry["path"] for entry in ran.json()["manifest"]["files"]]
    assert files == ["notes.txt", "weights.bin"]


def test_a_sealed_folder_is_not_sealed_again(cli, sealed):
    ran = cli("seal", sealed, "again.sealed")
    assert ran.code == 3
    assert ran.error == f"{sealed} is sealed already"
    assert "rewrap" in ran.hint
    assert not (sealed.parent / "again.sealed").exists()


def test_what_the_loader_will_refuse_is_said_when_it_is_sealed(site, cli):
    for name in ("pytorch_model.bin", "a.xml", "b.tflite"):
        Path("other").mkdir(exist_ok=True)
        (Path("other") / name).write_bytes(b"x")
        ran = cli("seal", "other", f"{name}.sealed", "--json")
        assert ran.code == 0
        said = {
            "pytorch_model.bin": "OpenVINO reads none of its files by its name",
            "a.xml": "",
            "b.tflite": "it has 2 graphs: load(..., file='a.xml') says which",
        }[name]
        assert ("note: " in ran.err) == bool(said)
        assert said in ran.err
        ran.json()


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "model.sealed"),
        *(("verify", place) for place in ("model.sealed", ".")),
        ("unseal", "model.sealed", "plain"),
        ("sign", "model.sealed"),
        *(("rewrap", place) for place in ("model.sealed", ".")),
        *(("reseal", place) for place in ("model.sealed", ".")),
        ("reseal", "model.sealed", "new.sealed"),
        ("keys", "usage", "."),
    ],
    ids=" ".join,
)
def test_a_model_without_its_keys_is_damaged_for_every_verb(cli, sealed, arguments):
    (sealed / "keys.json").unlink()
    ran = cli(*arguments)
    assert ran.code == 4, ran.err
    assert "has no keys.json" in ran.error
