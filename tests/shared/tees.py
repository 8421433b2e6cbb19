"""The files in which Gramine and the kernel give quotes, simulated by a file system of FUSE.

Run as a program: ``tees.py KIND MOUNT WORK``. KIND ``sgx`` makes ``user_report_data`` and ``quote``
as Gramine does, ``tdx`` the folders of configfs-tsm. WORK gets the collateral of the root of these
quotes (``collateral``, ``root.der``). A file ``fault`` there says what goes wrong next, and how
often: the name of an errno, ``stale`` for a quote of other report data, ``long`` for no quote.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import mfusepy
from quotes import World

PROVIDER = b"tdx_guest\n"


class Tee(mfusepy.Operations):  # type: ignore[misc]
    """Both kinds: files of bytes, and what is committed when a file is closed."""

    def __init__(self, kind: str, work: Path) -> None:
        self._kind, self._work, self._world = kind, work, World()
        self._world.write(work / "collateral", [kind])
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
        path = self._work / "fault"
        if not path.exists():
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


if __name__ == "__main__":
    kind, mount, work = sys.argv[1:]
    mfusepy.FUSE(Tee(kind, Path(work)), mount, foreground=True, direct_io=True)
