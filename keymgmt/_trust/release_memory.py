"""The memory of a machine against rollback: the highest release of each name, and a time.

The time is the highest that the clock showed when a model that expires was opened, less ten
minutes, so that setting the clock back by a little is no fault.

Whoever restores a disk restores the file too. With an anchor, the file counts only if it matches
the anchor's value, which is a hash chain over every state that the file had. A new state is first
written to the file, beside the state that counts, and then the anchor moves. So whenever the power
fails, exactly one of the two states matches the anchor, and no older file ever does
(docs/decisions/release-memory.md).
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
from keymgmt._system.strict_json import JsonReader, dump_json, load_json
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError, FormatError, RollbackError
from keymgmt.sealed.times import check_time, utc_text

if TYPE_CHECKING:
    from keymgmt._config.config import Config

__all__ = ["ReleaseMemory", "Remembered", "release_memory"]

FORMAT: Final = "keymgmt-releases/1"
ANCHORED: Final = "keymgmt-releases/2"
MAX_FILE: Final = 1 << 20
_WAIT: Final = 30.0
_MAY_NOT_WRITE: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_LITTLE: Final = timedelta(minutes=10)
_HOUR: Final = len("2026-01-01T00")
_DAY: Final = len("2026-01-01")


@dataclass(frozen=True)
class Remembered:
    """One state of the memory; ``before`` is the anchor's value before it was bound to it."""

    releases: dict[str, int] = field(default_factory=dict)
    time: str | None = None
    before: bytes = b""

    def with_open(self, name: str, release: int, now: str, precision: int) -> Remembered | None:
        """The state after a release of ``name`` was opened now; None where nothing changes."""
        later = now[:precision] > (self.time or "")[:precision]
        if not later and release <= self.releases.get(name, -1):
            return None
        highest = max(release, self.releases.get(name, -1))
        return replace(
            self, releases=self.releases | {name: highest}, time=now if later else self.time
        )

    @property
    def step(self) -> bytes:
        """The step of the anchor that binds it to this state."""
        return sha256(dump_json({"releases": self.releases, "time": self.time})).digest()

    @property
    def after(self) -> bytes:
        """The anchor's value after that step."""
        return anchor_after(self.before, self.step)

    def to_json(self) -> dict[str, Any]:
        """``{before, releases, time}``."""
        return {"before": self.before.hex(), "releases": self.releases, "time": self.time}

    @classmethod
    def read(cls, reader: JsonReader, where: str) -> Remembered:
        """Read the members of ``to_json`` other than ``before``; FormatError where one is wrong."""
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
        anchor: calls a function with the provider that keeps the anchor; None without an anchor.
        provider: the name of that provider.
    """

    path: Path
    anchor: Callable[[Callable[[SupportsAnchor], Any]], Any] | None = None
    provider: str = ""

    def recall(self) -> Remembered:
        """The state that counts.

        Raises:
            ConfigError: the file is unreadable or damaged; it is never taken for an empty one.
            RollbackError: the file does not match the anchor.
            ProviderError: the anchor cannot be read.
        """
        try:
            return self._state()[0]
        except RollbackError as error:
            # Another process may have moved the anchor after it was read here and before the file
            # was read. So both are read once more, under the lock.
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._locked())
                except ConfigError as refusal:
                    # A user who may not write the lock file cannot wait for the other process: the
                    # first answer stands. After a wait in vain nothing is known.
                    if getattr(refusal.__cause__, "errno", None) in _MAY_NOT_WRITE:
                        raise error from None
                    raise
                return self._state()[0]

    def remember(
        self, name: str, release: int, *, time: bool = False, known: Remembered | None = None
    ) -> None:
        """Remember ``release`` of ``name`` if it is the highest, and with ``time`` the time now.

        The time is written once an hour at most, with an anchor once a day. ``known`` is the result
        of ``recall``, if the caller has it.

        Raises:
            ConfigError: the file cannot be written.
            RollbackError, ProviderError: as ``recall``; or the anchor does not move.
        """
        now = utc_text(datetime.now(UTC) - _LITTLE) if time else ""
        opened = name, release, now, _DAY if self.anchor else _HOUR
        if self._is_current(known or self.recall(), opened):
            return
        with self._locked():
            held, value = self._state()
            if self._is_current(held, opened):
                return
            # An unchanged state is written too where the anchor was not bound to any state yet.
            new = held.with_open(*opened) or held
            if value is None or self.anchor is None:
                self._write({"format": FORMAT, "releases": new.releases, "time": new.time})
                return
            new = replace(new, before=value)
            states = [held, new] if held.before else [new]
            self._write({"format": ANCHORED, "states": [each.to_json() for each in states]})
            self.anchor(lambda provider: provider.move_anchor(value, new.step))

    def _is_current(self, held: Remembered, opened: tuple[str, int, str, int]) -> bool:
        """Whether ``held`` needs no change by ``opened``, and is bound where there is an anchor."""
        return held.with_open(*opened) is None and (self.anchor is None or bool(held.before))

    def _state(self) -> tuple[Remembered, bytes | None]:
        """The state that counts, and the value of the anchor.

        The anchor is read first: a file that is written later still has the state of this value.
        """
        value = self.anchor(lambda provider: provider.anchor()) if self.anchor else None
        states = self._read()
        if value is None or value == ANCHOR_START:
            # The anchor is bound to no state yet. A file that says otherwise is from before the
            # anchor was set up, or was written just before the power failed.
            return (replace(states[-1], before=b"") if states else Remembered()), value
        for state in states:
            if state.before and state.after == value:
                return state, value
        error = RollbackError(
            f"the release memory {self.path} is {'not the newest' if states else 'gone'}: the "
            f"anchor of {self.provider!r} is of another one",
            hint="an old disk or backup was put back: restore the newest file; if it is lost, see "
            "the manual of the anchor's backend",
        )
        # The fault is this machine's and not the model's, so it ends with the exit code of those.
        error.exit_code = ConfigError.exit_code
        raise error

    def _read(self) -> list[Remembered]:
        """The states in the file, the newest last; none where there is no file."""
        path = self.path
        try:
            content = read_file(path, label="release memory", limit=MAX_FILE, access="trusted")
        except ConfigError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise
        try:
            reader = load_json(content, path.name, MAX_FILE)
            if reader.text("format", limit=32) == FORMAT:
                return [Remembered.read(reader, path.name)]
            reader = load_json(content, path.name, MAX_FILE)
            reader.version(ANCHORED, "another version of keymgmt wrote it")
            listed = reader.array("states", least=1, most=2)
            reader.end()
            states = []
            for each in listed:
                state = JsonReader(each, f"a state in {path.name}")
                before = state.hex("before", length=32)
                states.append(replace(Remembered.read(state, path.name), before=before))
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
        content = dump_json(data)
        if len(content) > MAX_FILE:
            raise ConfigError(
                f"{self.path} would have {len(content)} bytes, and at most {MAX_FILE} are read",
                hint="it remembers every name of a model that was opened here: use fewer names",
            )
        with self._naming_file():
            replace_file(self.path, content, mode=0o600, keep=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._naming_file():
                lock = self.path.with_name(f".{self.path.name}.lock")
                stack.enter_context(lock_file(lock, _WAIT))
            yield

    @contextlib.contextmanager
    def _naming_file(self) -> Iterator[None]:
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
    """The release memory that a config names, or None."""
    named = config.policy.remember_releases
    if named is None:
        return None
    if named.anchor is None:
        return ReleaseMemory(named.file)
    name = named.anchor
    require(config, name, SupportsAnchor, "keeps no anchor")
    return ReleaseMemory(named.file, lambda call: call_provider(config, name, call), name)
