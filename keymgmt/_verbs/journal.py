"""The journal of a run over a tree, by which a run that was interrupted goes on (``--resume``).

The first line says which job it is of. Every other line is one of two: a model that was finished,
with a stamp of its keys.json as it was then; or a key, and the name of the recipient that wrapping
under it gave, which has the key's version. A model is passed over only while its keys.json has
still that stamp, so what somebody changes later is looked at again. And only while wrapping under
every key gives still that recipient: after another rotation the journal begins anew.

A line is written after the model is safely on the disk or in the bucket. Lines are not synced: of
those that are lost, the models are found done. Only a hash of each is kept in memory, of 8 bytes,
keyed so that nobody can look for two models of one hash.
"""

from __future__ import annotations

import array
import bisect
import hashlib
import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt._system.closing import Closing
from keymgmt._system.files import replace_file
from keymgmt._system.locks import acquire_lock, release_lock
from keymgmt._system.refused import translate
from keymgmt._system.strict_json import load_json
from keymgmt._system.trusted_file import open_file
from keymgmt._verbs.find_models import path_below
from keymgmt.errors import ConfigError, FormatError, KeymgmtError
from keymgmt.sealed.folder import KEYS, file_stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from keymgmt._verbs.find_models import Place

__all__ = ["Journal"]

FORMAT: Final = "keymgmt-journal/1"
_LINE: Final = 1 << 16  # a path has at most 4096 bytes, each written with at most six
_HINT: Final = "name another file, or remove it: then every model is looked at again"


class Journal(Closing):
    """A journal that is open for one run; a context manager that closes it.

    Attributes:
        path: the file.
        skipped: whether a model was passed over.
        broken: why it could not be written further; the models are not affected.
    """

    def __init__(
        self, path: Path, tree: Place, job: Mapping[str, object], newest: Callable[[str], str]
    ) -> None:
        """Make the file, or read one of the same job.

        Args:
            path: the file.
            tree: to which the paths in it are relative.
            job: what the run does, as JSON.
            newest: gives the name of the recipient that wrapping under ``provider:key`` gives now.

        Raises:
            ConfigError: it is of another job, damaged, in use, or others can write to it.
            KeymgmtError: it cannot be written, or as ``newest`` raises.
        """
        self.path, self.skipped = path, False
        self.broken: KeymgmtError | None = None
        self._tree = tree
        self._keys: dict[str, str] = {}
        self._salt = os.urandom(16)
        # Sorted later, and in parts by their first byte, so that few are a list at any time.
        self._hashes = [array.array("Q") for _ in range(256)]
        self._lock = threading.Lock()
        head = _line({"format": FORMAT, "job": job})
        try:
            replace_file(path, head, mode=0o600, exclusive=True)
        except FileExistsError:
            pass
        except OSError as error:
            raise translate(error, path) from error
        flags = os.O_RDWR | os.O_APPEND
        self._fd = open_file(path, label="journal", access="trusted", flags=flags)
        try:
            acquire_lock(self._fd, 0)
            os.ftruncate(self._fd, self._read(head))
            if any(newest(key) != name for key, name in self._keys.items()):
                os.ftruncate(self._fd, len(head))
                self._forget()
        except TimeoutError as error:
            os.close(self._fd)
            raise ConfigError(f"another run writes the journal {path}", hint=_HINT) from error
        except BaseException:
            release_lock(self._fd)
            raise
        self._hashes = [array.array("Q", sorted(part)) for part in self._hashes]

    def _forget(self) -> None:
        self._keys.clear()
        for part in self._hashes:
            del part[:]

    def _read(self, head: bytes) -> int:
        """Read the file; returns where its last whole line ends."""
        end, limit = 0, max(len(head), _LINE)
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(iter(partial(file.readline, limit), b""), 1):
                torn = not line.endswith(b"\n")
                if torn and number > 1 and len(line) < limit:
                    break  # the run was killed while it wrote this
                try:
                    self._take(line, head if number == 1 else None)
                except FormatError as error:
                    raise ConfigError(
                        f"line {number} of the journal {self.path} is damaged: {error}", hint=_HINT
                    ) from error
                end += len(line)
        if not end:
            raise ConfigError(f"{self.path} is empty, and no journal", hint=_HINT)
        return end

    def _take(self, line: bytes, head: bytes | None) -> None:
        reader = load_json(line, "it", len(line), canonical=False)
        if head is not None:
            reader.version(FORMAT, _HINT)
            mine, its = json.loads(head)["job"], reader.members("job")
            differs = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
            if differs:
                raise ConfigError(
                    f"the journal {self.path} is of another job: it differs in "
                    f"{', '.join(sorted(differs))}",
                    hint=_HINT,
                )
        elif "key" in reader.names():
            key = reader.text("key", limit=_LINE)
            name = reader.text("newest", limit=_LINE)
            if self._keys.setdefault(key, name) != name:
                # It was rotated during that run.
                self._forget()
                self._keys[key] = name
        else:
            path = reader.text("path", limit=_LINE)
            found = self._hash(path, reader.text("keys", limit=_LINE))
            self._hashes[found >> 56].append(found)
        reader.end()

    def _hash(self, path: str, stamp: str) -> int:
        text = f"{path}\0{stamp}".encode(errors="surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest, "big")

    def has(self, place: Place, etag: str | None) -> bool:
        """Whether a model was finished, and its keys.json is still the same.

        Args:
            place: the model.
            etag: of its keys.json, where that is in a bucket.
        """
        if isinstance(place, Path):
            try:
                etag = file_stamp((place / KEYS).lstat())
            except OSError:
                return False
        if etag is None:
            return False
        found = self._hash(path_below(self._tree, place), etag)
        part = self._hashes[found >> 56]
        index = bisect.bisect_left(part, found)
        self.skipped |= (has := part[index : index + 1] == array.array("Q", [found]))
        return has

    def add(self, place: str | os.PathLike[str], stamp: str, keys: Mapping[str, str]) -> None:
        """Write that a model is finished.

        Args:
            place: the model.
            stamp: of its keys.json; empty if there is none, and then nothing is written.
            keys: the keys that it was wrapped under, ``provider:key``, and the recipients.
        """
        with self._lock:
            new = {key: name for key, name in keys.items() if self._keys.get(key) != name}
            lines = [_line({"key": key, "newest": name}) for key, name in new.items()]
            lines.append(_line({"path": path_below(self._tree, place), "keys": stamp}))
            if not stamp or self.broken is not None:
                return
            self._keys.update(new)
            content = b"".join(lines)
            try:
                written = os.write(self._fd, content)
            except OSError as error:
                self.broken = translate(error, self.path)
            else:
                if written < len(content):
                    self.broken = KeymgmtError(f"{self.path}: the disk is full")

    def close(self) -> None:
        """Give back the lock, and close the file."""
        if self._fd >= 0:
            release_lock(self._fd)
        self._fd = -1


def _line(value: Mapping[str, Any]) -> bytes:
    # In ASCII, since a path need not be UTF-8.
    return json.dumps(value, ensure_ascii=True, sort_keys=True).encode() + b"\n"
