"""Locks between processes: waited for as long as told, and by nobody who may only read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from keymgmt._system.locks import lock_file


def test_one_at_a_time(tmp_path):
    inside: list[int] = []

    def work() -> None:
        for _ in range(20):
            with lock_file(tmp_path / "lock", 60, remove=True):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(tmp_path.iterdir())


def test_whoever_waits_too_long_is_told(tmp_path):
    with (
        lock_file(tmp_path / "lock", 0),
        pytest.raises(TimeoutError, match="another process held its lock for 0 seconds"),
        lock_file(tmp_path / "lock", 0),
    ):
        pass
    with lock_file(tmp_path / "lock", 0):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_process_that_was_forked_meanwhile_does_not_go_on_holding_it(tmp_path):
    with lock_file(tmp_path / "lock", 0):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        forked = os.fork()
        if not forked:
            threading.Event().wait(30)
            os._exit(0)
    try:
        with lock_file(tmp_path / "lock", 0):
            pass
    finally:
        os.kill(forked, 9)
        os.waitpid(forked, 0)
        child.communicate(b"\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_who_may_only_read_the_folder_cannot_hold_it(tmp_path):
    program = """if True:
        import fcntl, os, sys
        os.setresuid(12345, 12345, 12345)
        for name in sys.argv[1:]:
            try:
                fcntl.flock(os.open(name, os.O_RDONLY), fcntl.LOCK_SH)
            except PermissionError:
                pass
        print("holds", flush=True)
        input()
        """
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o001)
    with lock_file(folder / "lock", 0):
        pass
    command = [sys.executable, "-c", program, str(folder), str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"holds\n"
        with lock_file(folder / "lock", 0):
            pass
        other.communicate(b"\n")
