"""A sealed model outside of /tmp, and ``keymgmt exec`` as whoever a test wants."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import keymgmt
import keymgmt.cli

pytest.importorskip("keymgmt_file")
# Where a mount namespace can be made at all is asked of the system itself, not of our code.
MAY_UNSHARE = (
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    and os.geteuid() == 0
)
OTHER = 1234  # a user of no account


def become(user: int, group: int, needed: list[str]) -> None:
    """Be a user who reaches this Python: root's home, and .tox, are closed to others.

    In a mount namespace of its own, the closed folders above it are replaced by open ones.
    """
    import ctypes
    import os
    from pathlib import Path

    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0
    libc.mount(None, b"/", None, ctypes.c_ulong(16384 | 1 << 18), None)
    closed: dict[Path, list[tuple[str, int]]] = {}
    for path in needed:
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & 1:
                closed.setdefault(parent, []).append((path, os.open(path, os.O_PATH)))
                break
    os.umask(0o022)
    for parent, inside in closed.items():
        assert libc.mount(b"open", bytes(parent), b"tmpfs", ctypes.c_ulong(0), b"mode=755") == 0
        for path, descriptor in inside:
            os.makedirs(path)  # noqa: PTH103
            source = f"/proc/self/fd/{descriptor}".encode()
            assert libc.mount(source, path.encode(), None, ctypes.c_ulong(4096), None) == 0
    os.setgroups([user, group])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable, as a process that starts as this user


def needed() -> list[str]:
    """Where this Python, its packages and keymgmt are."""
    source = Path(keymgmt.__file__).parents[1]
    places = {str(Path(sys.executable).resolve().parents[1]), sys.base_prefix, sys.prefix}
    places |= {str(source)}
    return sorted(
        each for each in places if not any(Path(other) in Path(each).parents for other in places)
    )


AS_USER = f"""
import os, sys
{inspect.getsource(become)}
become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(":"))
os.execv(sys.argv[4], sys.argv[4:])
"""


@dataclass
class Site:
    """Config, keys, and a sealed model with its plain files."""

    root: Path

    @property
    def sealed(self) -> Path:
        return self.root / "m.sealed"

    @property
    def plain(self) -> Path:
        return self.root / "model"

    def env(self) -> dict[str, str]:
        return {**os.environ, "KEYMGMT_CONFIG": str(self.root / "keymgmt.toml")}

    def command(self, *arguments: object, user: int | None = None, group: int = OTHER) -> list[str]:
        """The command line of ``keymgmt exec MODEL ARGUMENTS``, run as ``user``."""
        line = [sys.executable, "-m", "keymgmt.cli", "exec", str(self.sealed), *map(str, arguments)]
        if user is None:
            return line
        who = [str(user), str(group), ":".join(needed())]
        return [sys.executable, "-c", AS_USER, *who, *line]

    def run(
        self,
        *arguments: object,
        user: int | None = None,
        group: int = OTHER,
        env: dict[str, str] | None = None,
        cwd: str | Path = "/",
    ) -> subprocess.CompletedProcess[str]:
        """``keymgmt exec MODEL ARGUMENTS`` in a fork of this process, which has it imported."""
        out, err = os.memfd_create("out"), os.memfd_create("err")
        child = os.fork()
        if child == 0:
            code = 255
            try:
                os.chdir(cwd)
                os.environ.clear()
                os.environ.update(env or self.env())
                for ours, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
                    os.dup2(ours, number)
                # As Python makes them: whoever puts another in their place closes nothing.
                sys.stdin, sys.stdout, sys.stderr = (
                    open(number, mode, closefd=False)  # noqa: SIM115
                    for number, mode in ((0, "r"), (1, "w"), (2, "w"))
                )
                if user is not None:
                    become(user, group, needed())
                sys.argv = ["keymgmt", "exec", str(self.sealed), *map(str, arguments)]
                keymgmt.cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        until = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        said = []
        for descriptor in (out, err):
            with open(descriptor, "rb") as file:  # noqa: PTH123
                file.seek(0)
                said.append(file.read().decode())
        code = os.waitstatus_to_exitcode(ended[1])
        return subprocess.CompletedProcess(["exec", *arguments], code, *said)

    def own(self, user: int) -> None:
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, user, user)


def write_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("hello\n")
    (folder / "empty").touch()
    (folder / "sub" / "w.bin").write_bytes(os.urandom(3_000_001))


def make_site(root: Path, write: Callable[[Path], None]) -> Site:
    from keymgmt._crypto.signatures import PublicKey

    site = Site(root)
    (root / "keys").mkdir(mode=0o700)
    (root / "keymgmt.toml").write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n[seal]\nsign = "local:publisher"\n'
    )
    (root / "keymgmt.toml").chmod(0o600)
    (root / "pub.pem").touch()
    with keymgmt.load_config(root / "keymgmt.toml") as config:
        local = config.provider("local")
        local.create_key("a", "aes256", {})
        local.create_key("publisher", "ed25519", {})
        (root / "pub.pem").write_bytes(PublicKey(local.public_key("publisher")).to_pem())
        site.plain.mkdir()
        write(site.plain)
    with keymgmt.load_config(root / "keymgmt.toml") as config:
        keymgmt.seal(site.plain, site.sealed, to=["local:a"], keys=config, name="m")
    return site


@pytest.fixture
def new_site() -> Iterator[Callable[..., Site]]:
    """Sites whose folders are not below /tmp, which a program has of its own."""
    made: list[Path] = []

    def make(write: Callable[[Path], None] = write_files) -> Site:
        made.append(Path(tempfile.mkdtemp(prefix="keymgmt-test-", dir="/dev/shm")))
        made[-1].chmod(0o755)
        return make_site(made[-1], write)

    yield make
    for path in made:
        shutil.rmtree(path)


@pytest.fixture
def site(new_site) -> Site:
    return new_site()


@pytest.fixture
def needs_root() -> None:
    """Skip, with the reason, where this is not root with the right to mount."""
    if not MAY_UNSHARE:
        pytest.skip("not root, or unshare(CLONE_NEWNS) is refused here")
