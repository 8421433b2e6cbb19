"""The files in which Gramine and the kernel give quotes, simulated by a file system of FUSE.

Kind ``sgx`` has ``user_report_data`` and ``quote`` as Gramine has them, ``tdx`` the folders of
configfs-tsm. The file that is named for faults says what goes wrong next, and how often: the name
of an errno, ``stale`` for a quote of other report data, ``long`` for no quote.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mfusepy
import pytest
from quotes import World
from waiting import until

PROVIDER = b"tdx_guest\n"


class Tee(mfusepy.Operations):  # type: ignore[misc]
    """Both kinds: files of bytes, and what is committed when a file is closed."""

    def __init__(self, kind: str, world: World, faults: Path | None) -> None:
        self._kind, self._world, self._faults = kind, world, faults
        self._folders: dict[str, dict[str, bytes]] = {"/": {}}
        if kind == "sgx":
            self._folders["/"] = {"user_report_data": bytes(64), "quote": b""}
        self._written: dict[int, bytes] = {}
        self._answers: dict[int, bytes] = {}
        self._next, self._one = 0, threading.Lock()

    def _place(self, path: str) -> tuple[dict[str, bytes], str]:
        folder, _, name = path.rpartition("/")
        files = self._folders.get(folder or "/")
        if files is None or name not in files:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return files, name

    def _fault(self) -> str:
        path = self._faults
        if path is None or not path.exists():
            return ""
        word, _, count = path.read_text().partition(" ")
        if int(count or "1") <= 1:
            path.unlink()
        else:
            path.write_text(f"{word} {int(count) - 1}")
        return word

    def _quote(self, report_data: bytes) -> bytes:
        fault = self._fault()
        if fault.startswith("E"):
            raise mfusepy.FuseOSError(getattr(errno, fault))
        if fault == "stale":
            report_data = b"stale"
        if fault == "long":
            return bytes(70_000)
        return self._world.sgx(report_data) if self._kind == "sgx" else self._world.tdx(report_data)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        with self._one:
            if path in self._folders:
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, "st_uid": os.getuid()}
            self._place(path)
            return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": 0}

    def readdir(self, path: str, fh: int) -> list[str]:
        inner = [each[1:] for each in self._folders if each != "/"] if path == "/" else []
        return [".", "..", *inner, *self._folders[path]]

    def mkdir(self, path: str, mode: int) -> int:
        with self._one:
            self._folders[path] = {
                "inblob": b"",
                "outblob": b"",
                "generation": b"0\n",
                "provider": PROVIDER,
            }
        return 0

    def rmdir(self, path: str) -> int:
        with self._one:
            del self._folders[path]
        return 0

    def open(self, path: str, flags: int) -> int:
        with self._one:
            files, name = self._place(path)
            self._next += 1
            if name == "quote":
                self._answers[self._next] = self._quote(files["user_report_data"])
            elif name == "outblob":
                self._answers[self._next] = self._quote(files["inblob"])
            else:
                self._answers[self._next] = files[name]
            return self._next

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._answers[fh][offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._written[fh] = self._written.get(fh, b"")[:offset] + data
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        return 0

    def flush(self, path: str, fh: int) -> int:
        with self._one:
            data = self._written.pop(fh, None)
            if data is not None:
                files, name = self._place(path)
                files[name] = data.ljust(64, b"\0")[:64]
                if "generation" in files:
                    files["generation"] = b"%d\n" % (int(files["generation"]) + 1)
        return 0


def _serve(kind: str, world: World, folder: Path, faults: Path | None) -> None:
    mfusepy.FUSE(Tee(kind, world, faults), str(folder), foreground=True, direct_io=True)


@contextlib.contextmanager
def mounted(
    kind: str,
    world: World,
    folder: Path,
    require_tool: Callable[..., Path],
    faults: Path | None = None,
) -> Iterator[Path]:
    """A new folder with the files of a kind of TEE, whose quotes are of a world."""
    unmount = require_tool("fusermount3", package="fuse3")
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel, or the container, has no FUSE")
    folder.mkdir()
    arguments = (kind, world, folder, faults)
    process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments)
    process.start()
    try:
        until(lambda: os.path.ismount(folder) or not process.is_alive())
        if not process.is_alive():
            say = pytest.fail if os.environ.get("CI") else pytest.skip
            say("no file system can be mounted here")
        yield folder
    finally:
        subprocess.run([unmount, "-u", "-z", folder], check=False, capture_output=True)
        process.terminate()
        process.join()


def gramine_toml(folder: Path) -> str:
    """What stands for ``"sgx"`` in a config, for a folder of that kind."""
    files = f'user_report_data = "{folder}/user_report_data", quote = "{folder}/quote"'
    return f'{{ kind = "sgx", {files} }}'
