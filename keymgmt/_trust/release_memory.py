"""What a machine remembers against rollback: the highest release of each name, and a time.

The time is the highest that the clock showed when a model was opened that expires, less ten
minutes, so that a clock may be set by a little.

Whoever restores a disk restores a file. With an anchor the file counts only if the anchor's value
says so: it is a hash chain over every state that the file had. A new state is written to the file
first, beside the one that counts, and then the anchor moves: whenever the power fails, exactly one
of the two is the anchor's, and no other file ever is (docs/decisions/release-memory.md).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt._config.calls import call_provider, require
from keymgmt._providers.anchor import ANCHOR_START, SupportsAnchor, anchor_after
from keymgmt._system.files import replace_file
from keymgmt._system.locks import lock_file
from keymgmt._system.strict_json import JsonReader, dump, load_json
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError, FormatError, RollbackError
from keymgmt.sealed.times import check_time, utc_text

if TYPE_CHECKING:
    from keymgmt._config.config import Config

__all__ = ["Known", "ReleaseMemory", "release_memory"]

FORMAT: Final = "keymgmt-releases/1"
ANCHORED: Final = "keymgmt-releases/2"
MAX_FILE: Final = 1 << 20
_WAIT: Final = 30.0
_MAY_NOT_WRITE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_LITTLE: Final = timedelta(minutes=10)
_HOUR: Final = len("2026-01-01T00")
_DAY: Final = len("2026-01-01")


@dataclass(frozen=True)
class Known:
    """What is remembered; ``before`` is the anchor's value before this was bound to it."""

    releases: dict[str, int] = field(default_factory=dict)
    time: str | None = None
    before: bytes = b""

    def with_open(self, name: str, release: int, now: str, precision: int) -> Known | None:
        """With a release of ``name`` and a time, or None where that says nothing new."""
        later = now[:precision] > (self.time or "")[:precision]
        if not later and release <= self.releases.get(name, -1):
            return None
        highest = max(release, self.releases.get(name, -1))
        return replace(
            self, releases=self.releases | {name: highest}, time=now if later else self.time
        )

    @property
    def step(self) -> bytes:
        """The step of the anchor that binds this to it."""
        return sha256(dump({"releases": self.releases, "time": self.time})).digest()

    @property
    def after(self) -> bytes:
        """The anchor's value once it did."""
        return anchor_after(self.before, self.step)

    def to_json(self) -> dict[str, Any]:
        """``{before, releases, time}``."""
        return {"before": self.before.hex(), "releases": self.releases, "time": self.time}

    @classmethod
    def read(cls, reader: JsonReader, where: str) -> Known:
        """Reverse ``to_json``, ``before`` left out; FormatError."""
        entries = JsonReader(reader.members("releases"), f"releases in {where}")
        time = reader.text_or_none("time", limit=20)
        reader.end()
        check_time(time, f"time in {where}")
        return cls({name: entries.integer(name) for name in entries.names()}, time)


@dataclass(frozen=True)
class ReleaseMemory:
    """A file, and the anchor that says whether it is the newest.

    Attributes:
        path: the file; a missing one is an empty memory, but for an anchor that has moved.
        anchor: asks the provider that keeps the anchor, or None without one.
        provider: its name.
    """

    path: Path
    anchor: Callable[[Callable[[SupportsAnchor], Any]], Any] | None = None
    provider: str = ""

    def recall(self) -> Known:
        """What is remembered.

        Raises:
            ConfigError: the file is unreadable or damaged; it is never taken for an empty one.
            RollbackError: it is not the one that the anchor is of.
            ProviderError: the anchor cannot be read.
        """
        try:
            return self._held()[0]
        except RollbackError as error:
            # Another process may have moved it between the look at it and at the file.
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._locked())
                except ConfigError as problem:
                    # Whoever may not write here looks once; one who waited in vain knows nothing.
                    if getattr(problem.__cause__, "errno", None) in _MAY_NOT_WRITE:
                        raise error from None
                    raise
                return self._held()[0]

    def remember(
        self, name: str, release: int, *, time: bool = False, known: Known | None = None
    ) -> None:
        """Remember ``release`` of ``name`` if it is the highest, and ``time``, now, if it is later.

        The time is written once an hour at most, with an anchor once a day. ``known`` is what was
        recalled, if it was.

        Raises:
            ConfigError: it cannot be kept.
            RollbackError, ProviderError: as ``recall``; or the anchor does not move.
        """
        now = utc_text(datetime.now(UTC) - _LITTLE) if time else ""
        what = name, release, now, _DAY if self.anchor else _HOUR
        if self._counts(known or self.recall(), what):
            return
        with self._locked():
            held, value = self._held()
            if self._counts(held, what):
                return
            new = held.with_open(*what) or held  # the same is bound where nothing was yet
            if value is None or self.anchor is None:
                self._write({"format": FORMAT, "releases": new.releases, "time": new.time})
                return
            new = replace(new, before=value)
            states = [held, new] if held.before else [new]
            self._write({"format": ANCHORED, "states": [each.to_json() for each in states]})
            self.anchor(lambda provider: provider.move_anchor(value, new.step))

    def _counts(self, held: Known, what: tuple[str, int, str, int]) -> bool:
        """Whether ``held`` says that already, and is bound where there is an anchor."""
        return held.with_open(*what) is None and (self.anchor is None or bool(held.before))

    def _held(self) -> tuple[Known, bytes | None]:
        """What counts, and the anchor's value: read first, since a later file has its state too."""
        value = self.anchor(lambda provider: provider.anchor()) if self.anchor else None
        states = self._read()
        if value is None or value == ANCHOR_START:
            # Nothing is bound, whatever a file from before or a power cut says of itself.
            return (replace(states[-1], before=b"") if states else Known()), value
        for state in states:
            if state.before and state.after == value:
                return state, value
        error = RollbackError(
            f"the release memory {self.path} is {'not the newest' if states else 'gone'}: the "
            f"anchor of {self.provider!r} is of another one",
            hint="an old disk or backup was put back: restore the newest file; if it is lost, see "
            "the manual of the anchor's backend",
        )
        error.exit_code = ConfigError.exit_code  # this machine's, and no model's
        raise error

    def _read(self) -> list[Known]:
        """The states in the file, the newest last; none where there is no file."""
        path = self.path
        try:
            content = read_file(path, what="release memory", limit=MAX_FILE, access="trusted")
        except ConfigError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise
        try:
            reader = load_json(content, path.name, MAX_FILE)
            if reader.text("format", limit=32) == FORMAT:
                return [Known.read(reader, path.name)]
            reader = load_json(content, path.name, MAX_FILE)
            reader.version(ANCHORED, "another version of keymgmt wrote it")
            listed = reader.array("states", least=1, most=2)
            reader.end()
            states = []
            for each in listed:
                state = JsonReader(each, f"a state in {path.name}")
                before = state.hex("before", length=32)
                states.append(replace(Known.read(state, path.name), before=before))
        except FormatError as error:
            raise ConfigError(
                f"{path} is damaged: {error}",
                hint="restore it; without it an old release could be put back unnoticed",
            ) from error
        if self.anchor is None:
            raise ConfigError(
                f"{path} is bound to an anchor, and [policy] remember_releases names none",
                hint='write remember_releases = { file = "FILE", anchor = "PROVIDER" }',
            )
        return states

    def _write(self, data: dict[str, Any]) -> None:
        content = dump(data)
        if len(content) > MAX_FILE:
            raise ConfigError(
                f"{self.path} would have {len(content)} bytes, and at most {MAX_FILE} are read",
                hint="it remembers every name of a model that was opened here: use fewer names",
            )
        with self._kept():
            replace_file(self.path, content, mode=0o600, keep=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._kept():
                lock = self.path.with_name(f".{self.path.name}.lock")
                stack.enter_context(lock_file(lock, _WAIT))
            yield

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            waited = isinstance(error, TimeoutError)
            raise ConfigError(
                f"cannot remember the release in {self.path}: {error.strerror}",
                hint="try again, or see which program holds it"
                if waited
                else "[policy] remember_releases names a file that this user can write",
            ) from error


def release_memory(config: Config) -> ReleaseMemory | None:
    """The memory that a config names, or None."""
    named = config.policy.remember_releases
    if named is None:
        return None
    if named.anchor is None:
        return ReleaseMemory(named.file)
    name = named.anchor
    require(config, name, SupportsAnchor, "keeps no anchor")
    return ReleaseMemory(named.file, lambda call: call_provider(config, name, call), name)
