"""Watch a program: search the files that it and its children write and hold open.

With strace, every file that is opened for writing is known by name. Without strace, only files are
seen that are open at the moment of a look, or are in one of the watched folders afterwards.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt.loading import libc

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Leak", "Watch", "search_folders"]

# A line of strace -f -y -xx: the descriptor that was opened, and its path in hexadecimal. A call of
# another thread may cut a line in two.
_WRITING: Final = re.compile(
    r"(?:creat\(|O_WRONLY|O_RDWR|O_CREAT).*\) += \d+<(?P<path>(?:\\x[0-9a-f]{2})+)>"
)
_CUT: Final = re.compile(r"(?P<call>.*) <unfinished \.\.\.>$")
_REST: Final = re.compile(r"<\.\.\. \w+ resumed>(?P<rest>.*)")
_MEMORY: Final = (0x01021994, 0x858458F6)  # tmpfs and ramfs (statfs(2))
_LONGEST: Final = 64 << 30  # bytes of one file that are searched
_ESCAPE: Final = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True)
class Leak:
    """A file, and the part of the canary that it held."""

    path: str
    part: str


@dataclass
class Watch:
    """A program that was run, and the files that were seen.

    Attributes:
        search: returns the part of the canary that is in a file, or None.
        work: our own folder, which is not searched.
        leaks: files with a part of the canary.
        written: files that were searched because the program wrote them.
        unseen: files that it wrote and that were gone before they could be searched.
        unknown: descriptions of what could not be searched.
        mounts: other file systems below the folders, which were not searched.
        traced: whether strace named the files.
    """

    search: Callable[[io.RawIOBase, int], str | None]
    work: Path
    leaks: set[Leak] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    mounts: set[str] = field(default_factory=set)
    traced: bool = False
    _sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str],
        wait_for: str | None,
        trace_it: bool = True,
    ) -> tuple[int, str]:
        """Run ``command`` to its end, and search its open files meanwhile.

        Args:
            command: program and arguments.
            env: the environment.
            wait_for: the program is ready when it prints a line with this beginning, and ends when
                its input does; None for a program that ends by itself.
            trace_it: use strace if it is installed.

        Returns:
            Exit status, and that line.
        """
        trace = self.work / "trace"
        strace = shutil.which("strace") if trace_it else None
        self.traced = strace is not None
        calls = "trace=open,openat,openat2,creat"
        prefix = [strace, "-f", "-qq", "-y", "-xx", "-o", str(trace), "-e", calls] if strace else []
        with subprocess.Popen(
            [*prefix, *command],
            env=env,
            stdin=subprocess.PIPE if wait_for else subprocess.DEVNULL,
            # The output of a command goes to stderr: stdout is for the result of leakcheck.
            stdout=subprocess.PIPE if wait_for else sys.stderr,
            text=True,
            start_new_session=True,
        ) as process:
            ready = ""
            if wait_for and process.stdout and process.stdin:
                ready = next((line for line in process.stdout if line.startswith(wait_for)), "")
                self.look(process.pid)
                process.stdin.close()
            while process.poll() is None:
                self.look(process.pid)
                time.sleep(0.05)
        if trace.exists():
            self._read_trace(trace)
        return process.returncode, ready

    def look(self, session: int) -> None:
        """Search the files that processes of a session hold open for writing, also deleted ones."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if os.getsid(int(entry.name)) == session:
                    self._look_at(entry)
            except (ProcessLookupError, FileNotFoundError):
                continue
            except PermissionError:
                self.unknown.add("what the program holds open: it is hardened against looks")

    def _look_at(self, process: Path) -> None:
        for link in (process / "fd").iterdir():
            try:
                info = link.stat()
                flags = int((process / "fdinfo" / link.name).read_text().split()[3], 8)
                if not stat.S_ISREG(info.st_mode) or flags & os.O_ACCMODE == os.O_RDONLY:
                    continue
                name = str(link.readlink())
                key = (info.st_dev, info.st_ino)
                if not name.startswith(f"{self.work}/") and self._sizes.get(key) != info.st_size:
                    self._sizes[key] = info.st_size
                    self.search_file(link, name)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def search_file(self, path: Path, name: str | None = None) -> None:
        """Search one file, shown as ``name``."""
        name = name or str(path)
        try:
            # Non-blocking, as it may have become a FIFO or a device meanwhile.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb", 0) as file:  # noqa: PTH123 - a descriptor
                info = os.fstat(descriptor)
                if not stat.S_ISREG(info.st_mode) or _in_private_memory(descriptor, info.st_dev):
                    return
                # No further than its present end: a program may be writing to it for ever.
                part = self.search(file, min(info.st_size, _LONGEST))
                if info.st_size > _LONGEST:
                    self.unknown.add(f"{name} beyond its first {_LONGEST >> 30} GiB")
        except FileNotFoundError:
            self.unseen.add(name)
            return
        except OSError as error:
            self.unknown.add(f"{name}: {error.strerror}")
            return
        self.written.add(name)
        self.unseen.discard(name)
        if part:
            self.leaks.add(Leak(name, part))

    def _read_trace(self, trace: Path) -> None:
        for path in _opened_for_writing(trace.read_text().splitlines()):
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError:
                # An earlier search while it was open says nothing of later writes.
                self.unseen.add(str(path))
                continue
            if regular and str(path) not in {leak.path for leak in self.leaks}:
                self.search_file(path)


def _in_private_memory(descriptor: int, device: int) -> bool:
    """Whether a file is only in memory, in a file system that our own file tree does not have.

    The files of ``keymgmt exec`` are such files: they are the protected plaintext, and not a leak.
    """
    answer = (ctypes.c_long * 32)()  # struct statfs, whose first member is the kind
    if libc.fstatfs(descriptor, answer) or answer[0] not in _MEMORY:
        return False
    shown = f" {os.major(device)}:{os.minor(device)} "
    return shown not in Path("/proc/self/mountinfo").read_text()


def _opened_for_writing(lines: Iterable[str]) -> Iterator[Path]:
    cut: dict[str, str] = {}
    for line in lines:
        process, _, call = line.partition(" ")
        if match := _CUT.match(call):
            cut[process] = match["call"]
            continue
        if match := _REST.search(call):
            call = cut.pop(process, "") + match["rest"]
        if match := _WRITING.search(call):
            raw = _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), match["path"].encode())
            yield Path(os.fsdecode(raw))


def search_folders(
    watch: Watch, folders: Iterable[Path], since: float, progress: Callable[[int], object]
) -> int:
    """Search every regular file below ``folders`` that changed since; returns their number.

    A file of another user that we cannot read is skipped, since the program could not write it
    either. Other file systems are not entered: a /proc below /tmp has no end.
    """
    count = 0
    seen: set[Path] = set()

    def unreadable(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # another program removed its folder meanwhile
            return
        ours = Path(error.filename).lstat().st_uid == os.geteuid()
        if isinstance(error, PermissionError) and ours:
            watch.unknown.add(f"{error.filename}: {error.strerror}")

    for folder in folders:
        device = folder.stat().st_dev
        for parent, names, files in os.walk(folder, onerror=unreadable):
            here = Path(parent).resolve()
            if here in seen or here == watch.work.resolve():
                names.clear()
                continue
            seen.add(here)
            for name in [*names]:
                path = Path(parent, name)
                if os.path.ismount(path) and path.lstat().st_dev != device:
                    names.remove(name)
                    watch.mounts.add(str(path))
            for name in files:
                path = Path(parent) / name
                try:
                    info = path.lstat()
                except OSError:
                    continue
                if not stat.S_ISREG(info.st_mode) or info.st_ctime < since:
                    continue
                if info.st_uid != os.geteuid() and not os.access(path, os.R_OK):
                    continue
                watch.search_file(path)
                progress(count := count + 1)
    return count
