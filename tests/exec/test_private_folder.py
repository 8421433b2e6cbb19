"""``keymgmt.private_folder``: real paths in this process, and nothing outside of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import run

OTHER = 1234
PROGRAM = """
import os, subprocess, sys, threading
import keymgmt
with keymgmt.private_folder(sys.argv[1], name="m") as folder:
    print((folder / "a.txt").read_text().strip())
    print(os.path.realpath(folder / "sub" / "w.bin") == str(folder / "sub" / "w.bin"))
    print(subprocess.run(["cat", folder / "a.txt"], capture_output=True, text=True).stdout.strip())
    thread = threading.Thread(target=lambda: print((folder / "a.txt").read_text().strip()))
    thread.start(); thread.join()
    try:
        (folder / "a.txt").unlink()
    except OSError as error:
        print(error.strerror)
    line = [each for each in open("/proc/self/mounts") if f" {folder} " in each][-1]
    print(line.split()[2], os.stat(folder).st_mode & 0o777 == 0o700)
    kept = open(folder / "a.txt")
    print(folder, flush=True)
    sys.stdin.readline()
print(kept.read().strip(), folder.exists(), str(folder) in open("/proc/self/mounts").read())
"""


@pytest.mark.parametrize("user", [None, OTHER])
def test_real_paths_that_only_this_process_sees(needs_root, site, user):
    line = [sys.executable, "-c", PROGRAM, str(site.sealed)]
    if user:
        site.own(user)
        line = [*site.command(user=user)[:-5], *line]
    with subprocess.Popen(
        line,
        env=site.env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = [process.stdout.readline().strip() for _ in range(7)]
        assert said[:5] == ["hello", "True", "hello", "hello", "Read-only file system"], (
            process.stderr.read() if "" in said else said
        )
        assert said[5] == ("ramfs True" if user else "tmpfs True")
        # From outside there is an empty folder.
        assert not any(Path(said[6]).iterdir())
        out, err = process.communicate("\n", timeout=30)
    assert (out, err) == ("hello False False\n", "")
    assert not Path(said[6]).exists()


def test_a_process_with_threads_is_told_so(needs_root, site):
    site.own(OTHER)
    program = """
import sys, threading, time
import keymgmt
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
try:
    with keymgmt.private_folder(sys.argv[1]):
        print("handed out")
except keymgmt.errors.KeymgmtError as error:
    print(error, "|", error.hint)
"""
    line = [*site.command(user=OTHER)[:-5], sys.executable, "-c", program, str(site.sealed)]
    done = run(*line, env=site.env())
    assert "Invalid argument" in done.stdout, done.stderr
    assert "several threads" in done.stdout
    assert "keymgmt.mount" in done.stdout
    assert not list(Path("/dev/shm").glob(f"keymgmt-mount-*/{site.sealed.name}"))


@pytest.mark.parametrize("user", [OTHER, 65534])
def test_a_refusal_leaves_the_process_who_it_was(needs_root, site, user):
    site.own(user)
    program = """
import os, sys
import keymgmt
before = os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt")
sealed = keymgmt.open(sys.argv[1], name="m")
keymgmt.harden()
try:
    with keymgmt.private_folder(sealed):
        print("handed out")
except keymgmt.errors.KeymgmtError as error:
    print(error, "|", error.hint)
import ctypes
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # so that the links can be read
print(before == (os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt")))
"""
    line = [*site.command(user=user)[:-5], sys.executable, "-c", program, str(site.sealed)]
    done = run(*line, env=site.env())
    said, same = done.stdout.splitlines()
    assert "permits no private file system" in said, done.stderr
    assert "non-dumpable (keymgmt.harden, keymgmt.mount)" in said
    assert same == "True"
    assert not list(Path("/dev/shm").glob(f"keymgmt-mount-*/{site.sealed.name}"))


def test_who_has_the_number_that_stands_for_others_takes_no_file_of_theirs(needs_root, site):
    """In a user namespace the files of everybody else are shown as those of 65534."""
    user = int(Path("/proc/sys/kernel/overflowuid").read_text())
    site.own(user)
    file = site.root / "of-another"
    file.write_text("x")
    file.chmod(0o600)
    program = """
import sys
from pathlib import Path
import keymgmt.errors
from keymgmt._system.namespace import enter_mount_namespace
from keymgmt._system.trusted_file import check_trusted
assert enter_mount_namespace()
assert Path(sys.argv[1]).stat().st_uid == 65534
try:
    check_trusted(Path(sys.argv[1]), label="file", private=True)
except keymgmt.errors.ConfigError as error:
    print(error, "|", error.hint)
"""
    line = [*site.command(user=user)[:-5], sys.executable, "-c", program, str(file)]
    done = run(*line, env=site.env())
    assert "its owner does not exist" in done.stdout, done.stderr
    assert "run it as another user than 65534" in done.stdout
