"""What another user, the program, or an odd system does to ``keymgmt exec``, and gets nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import rich
from programs import run

import keymgmt
from keymgmt._mount.folders import MemfdFolder
from keymgmt._system.namespace import User, enter_mount_namespace, mount_memory, why_it_fails

keymgmt_file = pytest.importorskip("keymgmt_file")
OTHER = 1234  # a user of no account


def as_user(user: int, act: Any) -> None:
    """Do ``act`` in a process of that user, whatever comes of it."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            act()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_a_folder_that_is_handed_over_gives_away_nothing_else(needs_root, tmp_path, monkeypatch):
    victim = tmp_path / "roots"
    victim.mkdir()
    folder = MemfdFolder(process=os.getpid())
    folder.write("sub/deep/w.bin", 3, lambda memory: memory.write(b"abc"))
    chown = os.chown

    def exchange() -> None:
        (folder.path / "sub").rename(folder.path / "moved")
        (folder.path / "sub").symlink_to(victim)

    def chown_and_be_attacked(path, user, group, **options) -> None:
        chown(path, user, group, **options)
        # What the user can do at once with what it has been given so far.
        as_user(OTHER, exchange)

    monkeypatch.setattr(os, "chown", chown_and_be_attacked)
    try:
        folder.hand_over(User("other", OTHER, OTHER, (OTHER,), "/"))
        assert victim.stat().st_uid == 0
        assert (folder.path / "sub").readlink() == victim, "the attack has been tried"
        assert folder.path.stat().st_uid == OTHER
        assert (folder.path / "moved" / "deep").stat().st_uid == OTHER
    finally:
        folder.close()


PROBE = """
env > {out}
cat $1/a.txt >> {out}
grep -E 'SigBlk|SigIgn' /proc/self/status >> {out}
mv {out} {out}.done
"""


def _signals(status: list[str], name: str) -> set[signal.Signals]:
    mask = int(next(line for line in status if line.startswith(name)).split()[1], 16)
    return {each for each in signal.Signals if mask >> each - 1 & 1}


def test_what_asks_whether_it_is_ready_is_run_as_the_program_is(needs_root, site, tmp_path):
    config = site.root / "keymgmt.toml"
    config.write_text(
        config.read_text()
        + '[providers.other]\nbackend = "file"\npath = "o"\npassphrase = { env = "SITE_SECRET" }\n'
    )
    asks = site.root / "asks"
    out = site.root / "said"
    asks.write_text(PROBE.format(out=out))
    env = site.env() | {"SITE_SECRET": "correct horse battery", "OTHER_ONE": "stays"}
    done = site.run(
        "--drop-when-ready", f"command:sh {asks} {{sealed}}", "--",
        "sh", "-c", "while test -e {sealed}/a.txt; do sleep 0.1; done; exit 5",
        env=env,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    said = Path(f"{out}.done").read_text().splitlines()
    assert "OTHER_ONE=stays" in said
    assert "KEYMGMT_MODEL=/tmp/keymgmt/m" in said
    assert "hello" in said
    assert not any(line.startswith("SITE_SECRET=") for line in said)
    # What whoever started us ignores stays ignored, as with nohup; what Python ignores does not.
    ignored = {each for each in signal.Signals if signal.getsignal(each) == signal.SIG_IGN}
    assert _signals(said, "SigBlk") == set()
    assert _signals(said, "SigIgn") == ignored - {signal.SIGPIPE, signal.SIGXFSZ}
    assert "the program is ready" in done.stderr


def test_what_asks_ends_with_the_program(needs_root, site):
    out = site.root / "pid"
    asks = site.root / "asks"
    asks.write_text(f"echo $$ > {out}.new; mv {out}.new {out}; exec sleep 60")
    script = f"while ! test -e {out}; do sleep 0.1; done"
    assert (
        site.run("--drop-when-ready", f"command:sh {asks}", "--", "sh", "-c", script).returncode
        == 0
    )
    asked = int(out.read_text())
    until = time.monotonic() + 20
    while Path(f"/proc/{asked}").exists() and "Z" not in _state(asked):
        assert time.monotonic() < until
        time.sleep(0.05)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "Z"


def test_the_program_goes_on_where_nobody_reads_what_we_say(needs_root, site):
    reader, writer = os.pipe()
    script = "touch /tmp/ready; sleep 1; exit 9"
    line = site.command(
        "--user", "nobody", "--drop-when-ready", "file:/tmp/ready", "--", "sh", "-c", script
    )
    with subprocess.Popen(line, env=site.env(), cwd="/", stderr=writer) as process:
        os.close(writer)
        os.close(reader)
        assert process.wait(30) == 9


def test_what_is_installed_below_tmp_is_told_too(needs_root, site, tmp_path):
    """The private /tmp hides our own modules, of which some are imported when they are needed."""
    links = []
    for module in (rich, keymgmt, keymgmt_file):  # in a checkout, three folders
        links.append(tmp_path / module.__name__)
        links[-1].symlink_to(Path(module.__file__).parents[1])
    script = "touch /tmp/ready; sleep 1; exit 9"
    line = site.command(
        "--user", "nobody", "--drop-when-ready", "file:/tmp/ready", "--", "sh", "-c", script
    )
    line.insert(1, "-S")  # nothing of ours is found elsewhere
    env = site.env() | {"PYTHONPATH": ":".join(map(str, links))}
    done = subprocess.run(line, env=env, cwd="/", stderr=subprocess.PIPE, text=True, timeout=60)
    assert "the program is ready" in done.stderr
    assert done.returncode == 9


def test_a_caller_with_ambient_capabilities_keeps_them_to_itself(needs_root, site, require_tool):
    setpriv = require_tool("setpriv", package="util-linux")
    site.own(OTHER)
    caps = "+sys_admin,+net_raw"
    ids = [f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
    for via in ("mount", "memfd"):
        program = ["--via", via, "--", "grep", "^Cap[IPEA]", "/proc/self/status"]
        line = site.command(*program, user=OTHER)
        line[2] = line[2].replace("os.setresuid(user, user, user)", "pass")
        line[2] = line[2].replace("os.setresgid(user, user, user)", "pass")
        line[6:6] = [str(setpriv), *ids, f"--inh-caps={caps}", f"--ambient-caps={caps}"]
        done = run(*line, env=site.env(), cwd="/")
        found = dict(each.split() for each in done.stdout.splitlines())
        assert found == dict.fromkeys(found, "0" * 16), done.stderr
        assert len(found) == 4, done.stderr


@pytest.mark.parametrize("user", [None, OTHER])
@pytest.mark.parametrize("via", ["mount", "memfd"])
def test_a_core_dump_has_no_memory_in_it(needs_root, site, via, user):
    if user:
        site.own(user)
    script = "cat /proc/self/coredump_filter; grep 'Max core' /proc/self/limits"
    # 1 is what keeps a dump from a handler. Where the limit is 0, root may raise it to that, if it
    # has the capability, and for others there is the filter.
    for before, after in ((1 << 20, {"1"}), (0, {"0"} if user else {"0", "1"})):
        done = run(
            "prlimit",
            f"--core={before}:{before}",
            *site.command("--via", via, "--", "sh", "-c", script, user=user),
            env=site.env(),
            cwd="/",
        )
        filters, *words = done.stdout.split()
        assert int(filters, 16) == 0
        assert words[4] == words[5], done.stderr
        assert words[4] in after


def test_numbers_that_are_no_users_and_no_ports(needs_root, site):
    for number in ("4294967295", "4294967296", "9" * 5000):
        done = site.run("--user", number, "--", "id", "-u")
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "there is no user" in done.stderr
    done = site.run("--drop-when-ready", f"port:{'9' * 5000}", "--", "true")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert site.run("--", "echo", f"/tmp/{'x' * 5000}").returncode == 0


def test_who_names_itself_needs_not_be_root(needs_root, site):
    site.own(OTHER)
    assert site.run("--user", OTHER, "--", "id", "-u", user=OTHER).stdout == f"{OTHER}\n"


def test_a_way_around_does_not_change_where_a_path_is(needs_root, site, tmp_path):
    (tmp_path / "script").write_text("x")
    hidden = f"{site.root}/../../..{tmp_path}/script"
    assert "out of the program's sight" in site.run("--", "cat", hidden).stderr
    seen = f"/tmp/..{site.root}/model/a.txt"
    assert site.run("--", "cat", seen).stdout == "hello\n"


def test_the_first_process_of_a_container_tells_the_signal_by_its_code(needs_root, site):
    arguments = ["--drop-when-ready", "file:/tmp/never", "--user", "nobody", "--"]
    line = site.command(*arguments, "sh", "-c", "kill -KILL $$")
    first = ["unshare", "-p", "-f", "--mount-proc", *line]
    done = run(*first, env=site.env(), cwd="/")
    assert done.returncode == 128 + signal.SIGKILL, done.stderr


def test_what_decrypts_may_have_ended_before_it_is_asked_to():
    """An interrupt can come after it was waited for, and before its exit code is kept."""
    from keymgmt._mount.exec import _end_child

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    _end_child(child)


def test_what_decrypts_is_asked_to_end_first(needs_root):
    from keymgmt._mount.exec import _end_child

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: (os.write(writer, b"gave back"), os._exit(0)))
        os.write(writer, b".")
        time.sleep(60)
        os._exit(1)
    assert os.read(reader, 1) == b"."
    _end_child(child)
    assert os.read(reader, 20) == b"gave back"


def test_that_memfds_leave_the_credentials_of_systemd_is_said(needs_root, site):
    folder = site.root / "credentials"
    folder.mkdir(mode=0o700)
    config = site.root / "keymgmt.toml"
    config.write_text(
        config.read_text() + '[providers.other]\nbackend = "file"\npath = "o"\n'
        'passphrase = { credential = "model-keys" }\n'
    )
    env = site.env() | {"CREDENTIALS_DIRECTORY": str(folder)}
    said = "the program can read the folder of systemd's credentials"
    assert said in site.run("--via", "memfd", "--", "true", env=env).stderr
    assert said not in site.run("--via", "memfd", "--", "true").stderr
    assert said not in site.run("--via", "mount", "--", "true", env=env).stderr


def test_root_gives_no_folder_that_a_link_leads_to(needs_root, tmp_path):
    """Where a link has taken the place of the folder since it was looked at."""
    victim = tmp_path / "roots"
    victim.mkdir()
    (tmp_path / "link").symlink_to(victim)
    user = User("other", OTHER, OTHER, (OTHER,), "/")

    def mount() -> None:
        enter_mount_namespace()
        mount_memory(tmp_path / "link", 1 << 20, mode=0o700, user=user)

    assert "Not a directory" in str(why_it_fails(mount)) or "Too many levels" in str(
        why_it_fails(mount)
    )
