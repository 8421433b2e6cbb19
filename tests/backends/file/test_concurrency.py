"""Many at once, and killed at any point: no key is lost, and no file is ever half.

A kill is made certain rather than likely: a forked child counts its own file operations by audit
events (PEP 578) and kills itself before the n-th, for every n until it gets through.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import in_child
from keymgmt_file import FileProvider, FileSettings
from keymgmt_file._keys import LOCK
from keymgmt_file._passphrase import Passphrase

from keymgmt.backend import AccessDenied, Dek, ProviderUnavailable

Open = Callable[..., FileProvider]
EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "fcntl.flock"}

PREAMBLE = """
import sys
from pathlib import Path
from keymgmt_file import FileProvider, FileSettings
files = FileProvider("local", FileSettings(path=Path(sys.argv[1])))
number = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
"""


def start(path: Path, script: str, count: int) -> list[subprocess.Popen[str]]:
    """Start real processes and let them go all at once."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script, str(path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for each in running:
        assert each.stdout
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin
        each.stdin.write("go\n")
        each.stdin.flush()
    return running


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    output = []
    for each in running:
        out, _ = each.communicate(timeout=120)
        assert each.returncode == 0
        output.append(out)
    return output


def leftovers(path: Path) -> set[str]:
    known = {LOCK, "passphrase.json", "versions.json"}
    return {each.name for each in path.iterdir() if not each.name.endswith(".jwks")} - known


def killed_at(step: int, path: Path, action: Callable[[], object]) -> bool:
    """Run ``action`` in a fork that dies before its file operation ``step``, if it has so many."""
    child = os.fork()
    if not child:
        left = step

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in EVENTS and not str(arguments[0]).startswith(("/dev", "/proc", "/sys")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def kill_everywhere(path: Path, action: Callable[[], object], look: Callable[[], None]) -> int:
    """Kill ``action`` before each of its steps, each time from the same beginning, and look."""
    before = {each.name: each.read_bytes() for each in path.iterdir()} if path.exists() else None
    for step in range(1, 400):
        shutil.rmtree(path, ignore_errors=True)
        if before is not None:
            path.mkdir(mode=0o700)
            for name, content in before.items():
                (path / name).touch(mode=0o600)
                (path / name).write_bytes(content)
        killed = killed_at(step, path, action)
        look()
        if not killed:
            return step
    raise AssertionError("the action never ends")


def test_processes_that_rotate_one_key_lose_no_version(open_store, path):
    files = open_store()
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        finish(start(path, "for _ in range(8): files.rotate_key('release')", 4))
        info = files.describe_key("release")
        assert [each.version for each in info.versions] == [str(n) for n in range(1, 34)]
        assert files.unwrap(wrapped, b"") == dek
        keys = json.loads((path / "release.jwks").read_text())["keys"]
        assert len({jwk["k"] for jwk in keys}) == 33
    assert leftovers(path) == set()


def test_processes_that_create_at_once_from_nothing(path, open_store):
    script = """
from keymgmt.backend import ConfigError
for n in range(4):
    files.create_key(f"key-{number}-{n}", "ed25519", {})
try:
    files.create_key("shared", "aes256", {})
    print("made it")
except ConfigError as error:
    assert "there is a key" in str(error)
"""
    output = finish(start(path, script, 4))
    assert output.count("made it\n") == 1
    assert len(open_store().list_keys()) == 17
    assert leftovers(path) == set()


def test_readers_never_see_a_key_half_or_gone(open_store, path):
    files = open_store()
    files.create_key("release", "aes256", {})
    script = """
for n in range(25):
    files.rotate_key("release")
    if n % 3 == 2:
        files.retire_version("release", str(n))
"""
    writers = start(path, script, 2)
    newest = 0
    with Dek.generate() as dek:
        while any(each.poll() is None for each in writers):
            # A wrap made a moment ago is older than the newest and not yet retired, at worst 25
            # rotations of the other writer later.
            wrapped = files.wrap("release", dek, b"")
            assert int(wrapped.version) >= newest
            newest = int(wrapped.version)
            assert len(files.list_keys()) == 1
    finish(writers)
    info = files.describe_key("release")
    assert [each.version for each in info.versions] == [str(n) for n in range(1, 52)]
    assert leftovers(path) == set()


@pytest.mark.usefixtures("cheap")
def test_locking_under_readers(open_store, path):
    files = open_store("correct horse battery")
    for number in range(6):
        files.create_key(f"key-{number}", "aes256", {})
    with Dek.generate() as dek:
        wraps = [files.wrap(f"key-{number}", dek, b"") for number in range(6)]
        stop = threading.Event()
        problems: list[BaseException] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    for wrapped in wraps:
                        assert files.unwrap(wrapped, b"") == dek
            except BaseException as error:  # noqa: BLE001 - told to the test below
                problems.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert files.key_files.unlock() == 6
            assert files.key_files.lock() == 6
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []


def test_threads_that_rotate_one_key(files):
    files.create_key("release", "aes256", {})
    threads = [
        threading.Thread(target=lambda: [files.rotate_key("release") for _ in range(5)])
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.describe_key("release").newest == "31"


def test_a_process_killed_among_others_harms_none(open_store, path):
    files = open_store()
    files.create_key("release", "aes256", {})
    script = "while True:\n print(files.rotate_key('release').newest, flush=True)"
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        confirmed = 0
        for _ in range(4):
            victims = start(path, script, 2)
            for victim in victims:
                assert victim.stdout
                confirmed = max(confirmed, int(victim.stdout.readline()))
            for victim in victims:
                victim.kill()
                victim.communicate()
            info = files.describe_key("release")
            assert int(info.newest) >= confirmed, "what was reported is on the disk"
            assert [each.version for each in info.versions] == [
                str(n) for n in range(1, int(info.newest) + 1)
            ]
            assert files.unwrap(wrapped, b"") == dek
        files.rotate_key("release")
    assert leftovers(path) == set()


@pytest.mark.once
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("locked", [False, True], ids=["plain", "locked"])
def test_killed_at_every_step_of_a_change(open_store, path, locked):
    files = open_store("correct horse battery" if locked else None)
    files.create_key("release", "aes256", {})
    files.rotate_key("release")
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        seen = set()

        def look() -> None:
            info = files.describe_key("release")
            seen.add((info.newest, info.versions[0].state))
            assert files.unwrap(wrapped, b"") == dek
            assert files.rotate_key("release").newest == str(int(info.newest) + 1)
            assert leftovers(path) == set()

        assert kill_everywhere(path, lambda: files.rotate_key("release"), look) > 8
        assert seen == {("2", "old"), ("3", "old")}, "it was killed before the change and after"
        seen.clear()
        assert kill_everywhere(path, lambda: files.retire_version("release", "1"), look) > 8
        assert {state for _, state in seen} == {"old", "retired"}


@pytest.mark.once
def test_killed_at_every_step_of_making_a_key(open_store, path):
    files = open_store()
    seen = set()

    def look() -> None:
        made = [info.key for info in files.list_keys()] if path.exists() else []
        seen.add(tuple(made))
        if made:
            assert files.sign("release", b"it works").signature
        else:
            files.create_key("release", "ed25519", {})
        files.rotate_key("release")
        assert leftovers(path) == set()

    assert kill_everywhere(path, lambda: files.create_key("release", "ed25519", {}), look) > 8
    assert seen == {(), ("release",)}


@pytest.mark.once
@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("action", ["lock", "unlock", "passwd"])
def test_killed_at_every_step_of_locking(open_store, path, action):
    names = ["a", "b", "c"]
    old, new, plain = (
        open_store("correct horse battery"),
        open_store("another battery staple"),
        open_store(),
    )
    maker = plain if action == "lock" else old
    for name in names:
        maker.create_key(name, "aes256", {})
    with Dek.generate() as dek:
        wraps = [maker.wrap(name, dek, b"") for name in names]

        def opens(files: FileProvider) -> int:
            count = 0
            for wrapped in wraps:
                try:
                    assert files.unwrap(wrapped, b"") == dek
                    count += 1
                except AccessDenied:
                    pass
            return count

        changed = Passphrase(new.settings.passphrase, "local")
        actions: dict[str, Callable[[], object]] = {
            "lock": old.key_files.lock,
            "unlock": old.key_files.unlock,
            "passwd": lambda: old.key_files.change_passphrase(changed),
        }
        seen = set()

        def look() -> None:
            found = (opens(old), opens(new), opens(plain))
            seen.add(found)
            # Whoever has the passphrase opens everything at any moment.
            holder = new if action == "passwd" and found[1] == 3 else old
            assert opens(holder) == 3
            if action != "passwd":
                # Whoever has none opens what is not locked at that moment.
                assert found[2] == 3 - sum(old.key_files.locked_keys().values())
                # The next run does the rest, and so would a run of the other command.
                if found[2] != 1:
                    actions[action]()
                    assert set(old.key_files.locked_keys().values()) == {action == "lock"}
                else:
                    (old.key_files.unlock if action == "lock" else old.key_files.lock)()
                    assert set(old.key_files.locked_keys().values()) == {action != "lock"}
                assert opens(old) == 3
            # Whatever was left half done is tidied up by whoever changes something next.
            holder.rotate_key("a")
            assert leftovers(path) == set()
            assert opens(holder) == 3

        assert kill_everywhere(path, actions[action], look) > (8 if action == "passwd" else 20)
        # With a passphrase file that none of the keys needs yet, or needs any more, a wrong
        # passphrase still opens what is not locked.
        assert seen == (
            {(3, 0, 0), (0, 3, 0)} if action == "passwd" else {(3, n, n) for n in range(4)}
        )


def test_the_lock_is_waited_for_and_given_up_at_last(files, path, monkeypatch):
    files.create_key("release", "aes256", {})
    with (path / LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr("keymgmt_file._keys.LOCK_SECONDS", 0.2)
            with pytest.raises(ProviderUnavailable, match="another process") as caught:
                files.rotate_key("release")
            assert "fuser" in str(caught.value.hint)
        assert files.describe_key("release").newest == "1", "reading waits for nobody"
        done: list[str] = []
        waiter = threading.Thread(target=lambda: done.append(files.rotate_key("release").newest))
        waiter.start()
        waiter.join(0.2)
        assert not done
        fcntl.flock(held, fcntl.LOCK_UN)
        waiter.join(30)
        assert done == ["2"]


def test_a_lock_file_that_was_removed_locks_nobody_out(files, path):
    files.create_key("release", "aes256", {})
    with (path / LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (path / LOCK).unlink()
        assert files.rotate_key("release").newest == "2"


def test_a_lock_file_that_is_removed_at_the_worst_moment(files, path, monkeypatch):
    files.create_key("release", "aes256", {})
    real = fcntl.flock
    calls = 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            # Opened, and not locked yet: somebody replaces it.
            (path / LOCK).unlink()
            (path / LOCK).touch(mode=0o600)
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        files.key_files.changing(),
        (path / LOCK).open("rb") as other,
        pytest.raises(BlockingIOError),
    ):
        real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_fork_in_the_middle_of_a_change_does_not_keep_the_lock(files):
    files.create_key("release", "aes256", {})
    read, write = os.pipe()
    with files.key_files.changing():
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    os.close(read)
    try:
        begin = time.monotonic()
        assert files.rotate_key("release").newest == "2"
        assert time.monotonic() - begin < 20, "it had to wait for the child"
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_a_fork_unwraps_and_rotates(files):
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")

        def use() -> None:
            assert files.unwrap(wrapped, b"") == dek
            files.rotate_key("release")

        in_child(use)
        assert files.describe_key("release").newest == "2", "seen at once"


def test_a_full_disk_changes_nothing(open_store, path):
    files = open_store()
    files.create_key("release", "aes256", {})
    before = (path / "release.jwks").read_bytes()
    # A file size limit stands in for the full disk: the write fails half-way.
    script = """
import resource, signal
from keymgmt.backend import ProviderError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    files.rotate_key("release")
except ProviderError as error:
    print(error)
"""
    (output,) = finish(start(path, script, 1))
    assert "there is no room for it (EFBIG)" in output
    assert (path / "release.jwks").read_bytes() == before
    assert leftovers(path) == set()
    assert FileProvider("again", FileSettings(path=path)).rotate_key("release").newest == "2"
