"""The sentences that people read when something is wrong, with whose fault it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import run

Cli = Callable[..., Any]
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root alone mounts")


@pytest.fixture
def small(site) -> Iterator[Path]:
    """A file system of 256 KiB, which a sealed model fills."""
    folder = site / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@ROOT
def test_a_full_disk_names_the_path_that_was_given(cli, site, small):
    (site / "model" / "large.bin").write_bytes(bytes(1 << 20))
    assert cli("seal", "model", "large.sealed").code == 0
    out = small / "out"
    for arguments in (
        ("seal", "model", out),
        ("seal", "model", out, "--json"),
        ("unseal", "large.sealed", out),
        ("reseal", "large.sealed", out),
    ):
        ran = cli(*arguments)
        assert ran.code == 1
        assert ran.error == f"{out}: No space left on device"
        assert ran.hint.startswith("make room there")
        assert not list(small.iterdir())
    with contextlib.suppress(OSError), (small / "fill").open("wb", buffering=0) as fill:
        while fill.write(bytes(4096)):
            pass
    ran = cli("keys", "export", "local:publisher", "-o", out)
    assert (ran.code, ran.error) == (1, f"{out}: No space left on device")
    ran = cli("init", small / "site")
    assert ran.error.endswith(".jwks: there is no room for it (ENOSPC)")
    assert not out.exists()


@ROOT
def test_a_disk_that_is_full_is_no_fault_of_the_model(cli, sealed, small):
    shutil.copytree(sealed, small / "a" / sealed.name)
    with contextlib.suppress(OSError), (small / "fill").open("wb", buffering=0) as fill:
        while fill.write(bytes(4096)):
            pass
    assert cli("keys", "create", "local:second").code == 0
    for tree in (small, small / "a" / sealed.name):
        ran = cli("rewrap", tree, "--add", "local:second")
        assert ran.code == 1
        assert "No space left on device" in ran.err


@pytest.mark.parametrize(
    "name", ["manifest.json", "keys.json", "signatures.json", "payload", "payload/weights.bin.floe"]
)
def test_a_file_that_this_user_may_not_read_is_no_damaged_model(sealed, name, require_tool):
    command = [sys.executable, "-m", "keymgmt.cli", "verify", str(sealed)]
    if os.geteuid() == 0:
        capabilities = "-dac_override,-dac_read_search"
        setpriv = str(require_tool("setpriv", package="util-linux"))
        command = [
            setpriv, f"--inh-caps={capabilities}", f"--bounding-set={capabilities}", *command
        ]  # fmt: skip
    (sealed / name).chmod(0)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (sealed / name).chmod(0o700)
    assert ran.returncode == 3, ran.stderr
    assert ran.stderr.splitlines() == [
        f"error: {sealed / name}: Permission denied",
        "hint: run it as a user who may, or change who may",
    ]


@ROOT
def test_a_file_system_that_is_read_only(cli, sealed, small):
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    ran = cli("seal", "model", small / "out.sealed")
    assert ran.code == 3
    assert ran.error == f"{small}/out.sealed: Read-only file system"
    ran = cli("keys", "export", "local:publisher", "-o", small / "p.pem")
    assert ran.code == 3
    assert ran.error == f"{small}/p.pem: Read-only file system"
    for arguments in (("unseal", sealed, small / "x"), ("reseal", sealed, small / "x")):
        ran = cli(*arguments)
        assert (ran.code, ran.error) == (3, f"{small}/x: Read-only file system")
        assert ran.hint == "name a place on a file system that can be written"
    ran = cli("init", small / "site")
    assert "read-only" in ran.error.lower()


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (("inspect", "nothere"), "cannot open nothere: No such file or directory", ""),
        (("verify", "nothere"), "cannot open nothere: No such file or directory", ""),
        (("unseal", "nothere", "x"), "cannot open nothere: No such file or directory", ""),
        (("seal", "nothere", "x"), "cannot read the model nothere: No such file or directory", ""),
        (("rewrap", "nothere"), "cannot open nothere: No such file or directory", ""),
        (
            ("-c", "model", "doctor"),
            "the config model is not a regular file",
            "-c model/keymgmt.toml",
        ),
        (("seal", "model", "no/x"), "the folder no for x does not exist", "mkdir -p no"),
        (("keys", "usage", "nothere"), "cannot read nothere: No such file or directory", ""),
        (
            ("keys", "retire", "local:models@1", "--tree", "nothere"),
            "1 place cannot be read or tried, so nobody knows whether local:models@1 is needed",
            "",
        ),
        (("keys", "list", "lokal"), "no provider named 'lokal'", "local"),
        (("seal", "model", "x", "--to", "local:modles"), "no such key file", "local:models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_misspelt_word_is_3_everywhere(cli, site, arguments, said, hint):
    ran = cli(*arguments)
    assert ran.code == 3
    assert said in ran.error
    assert hint in ran.hint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("seal", "model", "x", "--release", "seven"), "--release: not a whole number: 'seven'"),
        (("seal", "model", "x", "--release", "-1"), "--release: below 0: '-1'"),
        (("plugin", "check", "a", "--time-limit", "x"), "--time-limit: not a number: 'x'"),
        (("exec", "x", "--via", "foo", "--", "ls"), "--via: 'foo' is not one of 'auto', 'mount',"),
        (
            ("keys", "export", "local:a", "--format", "der"),
            "--format: 'der' is not one of 'pem', 'recipient'",
        ),
        (("completion", "tcsh"), "bash|zsh|fish: 'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (("completion",), "Missing argument 'bash|zsh|fish'. Choose from: bash, zsh, fish"),
    ],
)
def test_a_value_of_another_kind_is_said_in_plain_words(cli, arguments, said):
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.error.startswith(said)
    assert (
        ran.hint
        == f"keymgmt {' '.join(arguments[: 1 + (arguments[0] in ('plugin', 'keys'))])} --help"
    )


def test_the_variable_that_names_no_config_is_named(cli, monkeypatch):
    monkeypatch.setenv("KEYMGMT_CONFIG", "nothere.toml")
    ran = cli("keys", "list")
    assert ran.code == 3
    assert ran.error == "there is no config nothere.toml, which $KEYMGMT_CONFIG names"


def test_keys_that_cannot_be_listed_are_no_empty_table(cli, site):
    (site / "keys").rename(site / "elsewhere")
    ran = cli("keys", "list")
    assert (ran.code, ran.out) == (6, "")


LONG = "m" * 300
HOSTILE = [
    ("\x1b]0;title\x07\x9b31m", "\\x1b]0;title\\x07\\x9b31m", "No such file or directory"),
    ("a\nhint: rm -r ~", "a\\nhint: rm -r ~", "No such file or directory"),
    ("\u202egnp.exe", "\\u202egnp.exe", "No such file or directory"),
    ("caf\udce9", "caf\\udce9", "No such file or directory"),
    (LONG, LONG, "File name too long"),
    ("-rf", "-rf", "No such file or directory"),
    ("m/../../../etc", "m/../../../etc", "No such file or directory"),
]


@pytest.mark.parametrize(("name", "shown", "why"), HOSTILE, ids=[repr(h[0])[:12] for h in HOSTILE])
@pytest.mark.parametrize("verb", ["verify", "unseal", "inspect"])
def test_a_hostile_name_is_shown_and_does_nothing(cli, site, verb, name, shown, why):
    ran = cli(verb, "--", name, *(["out"] if verb == "unseal" else []))
    assert ran.code == 3
    assert ran.err == f"error: cannot open {shown}: {why}\n"
    assert ran.out == ""


@pytest.mark.parametrize(("name", "shown", "why"), HOSTILE[:4] + HOSTILE[5:6])
def test_what_is_given_a_hostile_name_is_written_there(cli, site, sealed, name, shown, why):
    """All that writes: what a killed process left beside it is looked for by its name."""
    for verb in ("unseal", "reseal"):
        ran = cli(verb, sealed, "--", name)
        assert ran.code == 0, ran.err
        assert (site / name).is_dir()
        assert cli("inspect", sealed, "--", name).code == 2
        ran = cli(verb, sealed, "--", name)
        assert (ran.code, ran.error) == (3, f"{shown} exists")
        shutil.rmtree(site / name)
    assert cli("keys", "export", "local:publisher", f"-o{name}").code == 0
    assert cli("seal", "model", "--", f"{name}.sealed").code == 0
    assert cli("verify", "--json", ".").code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("verify", ""), "MODEL.sealed|TREE"),
        (("rewrap", ""), "MODEL.sealed|TREE"),
        (("seal", "", "x.sealed"), "MODEL"),
        (("unseal", "model.sealed", ""), "DIRECTORY"),
        (("keys", "usage", ""), "TREE"),
        (("keys", "usage", "model", "--tree", ""), "--tree"),
        (("keys", "export", "local:publisher", "-o", ""), "--output"),
        (("init", ""), "[DIRECTORY]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_empty_path_is_not_the_working_directory(cli, sealed, arguments, named):
    """``keymgmt rewrap "$NOT_SET"`` must not go to work on what lies there."""
    ran = cli(*arguments)
    assert ran.code == 3
    assert ran.error == f"{named} is empty"
    assert ran.hint == "is a variable empty that holds it?"


def test_an_empty_argument_of_another_program_is_its_own(cli, sealed):
    ran = cli("exec", sealed, "--", "/nowhere/program", "")
    assert "is empty" not in ran.error


def test_without_a_config_it_says_where_it_looked(cli, tmp_path):
    ran = cli("doctor")
    assert ran.code == 3
    assert ran.error == (
        f"no config file: looked at $KEYMGMT_CONFIG, {tmp_path}/xdg/keymgmt/keymgmt.toml, "
        "/etc/keymgmt/keymgmt.toml"
    )
    assert ran.hint == "make one with: keymgmt init; or name one with -c FILE"


def test_a_config_from_a_pipe(site):
    """``-c <(...)``: a shell's pipe is no place for a config, and the sentence says so."""
    ran = run("bash", "-c", f"{sys.executable} -m keymgmt doctor -c <(cat keymgmt.toml)", cwd=site)
    assert ran.returncode == 3
    assert "is not a regular file" in ran.stderr
    assert "hint: " in ran.stderr


def test_export_says_what_it_wrote_and_what_comes_next(cli, site):
    ran = cli("keys", "export", "local:publisher", "-o", "p.pem")
    assert ran.err.splitlines() == [
        "wrote p.pem",
        'next, where models are opened: publishers = { "p.pem" = ["*"] } under [policy]',
    ]


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_what_is_exported_ends_its_line_on_a_terminal(cli, site, on_a_terminal):
    """In a file the bytes are what they are, since a fingerprint is over them."""
    assert cli("keys", "create", "local:dev", "--kind", "hpke-x25519").code == 0
    assert cli("keys", "export", "local:dev", "-o", "dev.recipient").code == 0
    ours, theirs = os.openpty() if on_a_terminal else os.pipe()
    command = [sys.executable, "-m", "keymgmt", "keys", "export", "local:dev"]
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, timeout=60, check=True)
    said = os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)
    assert said == (site / "dev.recipient").read_bytes() + b"\r\n" * on_a_terminal


def test_init_says_how_its_config_is_used(cli):
    said = cli("init", "my site").out
    assert f"export KEYMGMT_CONFIG='{Path.cwd()}/my site/keymgmt.toml'" in said


@ROOT
def test_a_config_that_this_user_may_not_read(site):
    for folder in (site, *site.parents[:3]):
        folder.chmod(0o755)
    code = (
        "import os, sys, keymgmt._config.config as c, keymgmt.errors as e\n"
        "os.setresuid(54321, 54321, 54321)\n"
        "try: c.load_config(sys.argv[1])\n"
        "except e.ConfigError as error: print(error, error.hint, sep='; ')\n"
    )
    (site / "keymgmt.toml").chmod(0o600)
    command = [sys.executable, "-c", code, site / "keymgmt.toml"]
    ran = run(*command)
    assert ran.stdout.endswith(
        "Permission denied; let this user read it, or name another one: -c FILE\n"
    ), ran.stderr


def test_an_empty_name_of_a_config_is_none(cli, site):
    """``--config "$NOT_SET"`` must not take another config, which trusts others."""
    for arguments in (("--config", "", "inspect", "model"), ("inspect", "model", "--config", "")):
        ran = cli(*arguments)
        assert ran.code == 3
        assert ran.error == "--config names no file"


def test_what_the_library_warns_of_is_shown_once(cli, sealed, site):
    config = site / "other.toml"
    gone = '[providers.gone]\nbackend = "file"\npath = "gone"\n\n'
    config.write_text(gone + (site / "keymgmt.toml").read_text())
    for _ in range(2):
        ran = cli("verify", sealed, "-c", config)
        assert ran.code == 0
        (warned,) = (line for line in ran.err.splitlines() if line.startswith("warning: "))
        assert "because the provider gone does not work" in warned
        assert "event=" not in ran.err


@pytest.mark.once
def test_what_an_onnx_names_is_told_before_it_is_sealed(cli, site):
    onnx = pytest.importorskip("onnx")
    helper, tensors = onnx.helper, onnx.TensorProto
    weight = helper.make_tensor("w", tensors.FLOAT, [2], [1.0, 2.0])
    weight.ClearField("float_data")
    weight.data_location = tensors.EXTERNAL
    weight.external_data.add(key="location", value=".ssh/id_rsa")
    graph = helper.make_graph([], "g", [], [], [weight])
    onnx.save(helper.make_model(graph), site / "m.onnx")
    (site / ".ssh").mkdir()
    (site / ".ssh" / "id_rsa").write_bytes(bytes(8))
    ran = cli("seal", "m.onnx", "m.sealed")
    assert "sealed with it: .ssh/id_rsa" in ran.err
    assert "looks like secrets or leftovers, and is sealed too: .ssh" in ran.err
