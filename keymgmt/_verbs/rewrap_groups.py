"""The groups of one model while a rewrap changes them, and what became of each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from keymgmt._crypto.dek import Dek
from keymgmt._trust.recipients import ProviderKey
from keymgmt._trust.unlock import Unlocker
from keymgmt._verbs.rewrap_task import Wanted
from keymgmt.errors import (
    AccessDenied,
    ConfigError,
    KeyRetired,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)
from keymgmt.sealed.keys import Group, NewGroup, UnlockPolicy, recipient_name

if TYPE_CHECKING:
    from keymgmt._config.calls import Answers
    from keymgmt._providers.data import WrappedKey
    from keymgmt._trust.candidate import Candidate
    from keymgmt._verbs.rewrap_task import Task
    from keymgmt.errors import Attempt, KeymgmtError
    from keymgmt.sealed.keys import Wrap

__all__ = ["EXIT_CODES", "GroupChange", "Work", "not_opened"]

_MEMBER: Final = re.compile(r"([^@#]+)(?:@([^#]+))?(?:#(.+))?")

State = Literal[
    "moved", "current", "added", "dropped", "kept", "foreign", "unreachable", "denied", "damaged"
]
# The states of groups that were not moved, the worst first, and their exit codes.
EXIT_CODES: Final[dict[State, int]] = {"unreachable": 6, "denied": 5, "damaged": 4}
_DENIED: Final = (AccessDenied, LockedOut, KeyRetired, UnsupportedOperation)


@dataclass(frozen=True)
class GroupChange:
    """The outcome of a rewrap for one group.

    Attributes:
        group: its recipients, as ``inspect`` shows them.
        state: ``moved`` to the newest key versions; ``current``: it has them already; ``added``;
            ``dropped``; ``kept`` without being opened. Not moved: ``foreign`` (no provider here
            holds its keys); ``unreachable`` or ``denied`` by a key service; ``damaged``, which may
            also mean that another key of that name made it: no cipher can tell the two apart.
        tested: whether the new group was opened here.
        note: an explanation for people.
        error: why the group was not moved.
    """

    group: str
    state: State
    tested: bool
    note: str = ""
    error: KeymgmtError | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        error = self.error
        return {
            "group": self.group,
            "state": self.state,
            "tested": self.tested,
            "note": self.note,
            "class": type(error).__name__ if error else None,
            "error": str(error) if error else None,
            "hint": error.hint if error else None,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> GroupChange:
        """Reverse ``to_json``, for a group without an error."""
        return cls(value["group"], value["state"], value["tested"], value["note"])


def _state_of(error: KeymgmtError, *, authentic: bool) -> State:
    """The state of a group for an error of a provider; an unknown error is not harmless."""
    if isinstance(error, WrongKey) or (authentic and isinstance(error, UnwrapFailed)):
        # It is not damaged if a holder of the data key wrote it: another key of that name made it.
        return "foreign"
    if isinstance(error, UnwrapFailed):
        return "damaged"
    return "denied" if isinstance(error, _DENIED) else "unreachable"


def not_opened(group: Group, index: int, unlocker: Unlocker, *, authentic: bool) -> GroupChange:
    """Why a group did not open here.

    One member that no provider here can ever open makes it foreign. Of several providers that might
    hold a member's key, the one counts that might still open it.
    """
    by_member: dict[int, list[Attempt]] = {}
    for attempt in unlocker.attempts:
        if attempt.group == index:
            by_member.setdefault(attempt.member, []).append(attempt)
    if not by_member:
        # Nothing was asked: what is wrong is told to whoever opens it.
        return GroupChange(str(group), "damaged", tested=False)

    def hope(error: KeymgmtError) -> int:
        state = _state_of(error, authentic=authentic)
        return 0 if state == "foreign" else EXIT_CODES[state]

    error = min((max((a.error for a in tried), key=hope) for tried in by_member.values()), key=hope)
    state = _state_of(error, authentic=authentic)
    return GroupChange(str(group), state, tested=False, error=None if state == "foreign" else error)


class Work:
    """The groups of one model while they are changed; ``states`` is in the order of the result.

    ``wrapped`` has the name of the recipient that each ``provider:key`` made.

    A context manager that wipes the shares of the new groups.
    """

    def __init__(
        self,
        task: Task,
        candidate: Candidate,
        groups: Sequence[Group],
        unlocker: Unlocker,
        dek: Dek,
        opened: int,
    ) -> None:
        self._task, self._hash, self._dek = task, candidate.hash, dek
        self._manifest = candidate.manifest
        self._unlocker, self._opened = unlocker, opened
        self.groups: dict[int, Group] = dict(enumerate(groups))
        self.states = {
            index: GroupChange(str(group), "kept", index == opened)
            for index, group in self.groups.items()
        }
        self.changed = False
        self._again: dict[int, tuple[bool, list[ProviderKey]]] = {}
        self._new: list[tuple[Sequence[Wrap], NewGroup]] = []
        self.wrapped: dict[str, str] = {}
        self._wanted = Wanted()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def check_opens_here(self, path: str) -> None:
        """Refuse to leave no group that opens with this config, or none that is known to.

        Raises:
            ConfigError: there is none.
            ProviderError: a key service that may hold a key does not answer.
        """
        doubt: KeymgmtError | None = None
        for index, group in self.groups.items():
            state = self.states[index]
            if state.tested or (state.state == "kept" and self._opens(index)):
                return
            if state.state == "kept":
                state = not_opened(group, index, self._unlocker, authentic=True)
            if state.state == "unreachable" or isinstance(state.error, LockedOut):
                doubt = state.error
        if isinstance(doubt, ProviderError):
            raise type(doubt)(
                f"nobody knows whether a group that would be left in {path} opens here: {doubt}",
                hint=doubt.hint or "try again when the key service answers",
            )
        raise ConfigError(
            f"no group that opens here would be left in {path}",
            hint="add another group in the same call, or give --force",
        )

    def _opens(self, index: int) -> bool:
        if index == self._opened:
            return True
        dek = self._unlocker.open_group(index)
        if dek is None:
            return False
        # A group that gives another key than the first has passed the same commitment: it cannot.
        dek.wipe()
        return True

    def look(self) -> None:
        """Find the groups to wrap again: those whose keys are here.

        Also where an older version opens no more: the group is that of who sealed, and the key is
        this provider's own.
        """
        for index, group in self.groups.items():
            opened = self._opens(index)
            names = self._unlocker.providers(index) if opened else self._unlocker.holders(index)
            if not opened:
                self.states[index] = not_opened(group, index, self._unlocker, authentic=True)
            if names is not None:
                wraps = [
                    ProviderKey(self._task.config, provider, wrapped.key)
                    for provider, wrapped in zip(names, group.recipients, strict=True)
                ]
                self._again[index] = opened, wraps

    def split(self) -> None:
        """Make new shares for every group that is wrapped again or added."""
        again: list[Sequence[Wrap]] = [wraps for _, wraps in self._again.values()]
        for wraps in (*again, *self._task.add):
            group = NewGroup(self._dek, self._hash, len(wraps))
            self._new.append((wraps, self._held.enter_context(group)))

    def wanted(self) -> Wanted:
        """The requests to wrap that providers can take many at once."""
        if self._task.tree:
            wraps = [
                (wrap.provider, wrap.key, share, context)
                for wraps, group in self._new
                for wrap, share, context in zip(wraps, group.shares, group.contexts, strict=True)
                if isinstance(wrap, ProviderKey) and wrap.provider in self._task.wrapping
            ]
            self._wanted = Wanted(wraps=wraps)
        return self._wanted

    def refresh(self) -> None:
        """Wrap again the groups that ``look`` found, and move those with newer key versions.

        A group that has the newest version already is left as it is.
        """
        for index, (opened, _) in self._again.items():
            group = self.groups[index]
            try:
                fresh = self._next()
            except ProviderError as error:
                state = _state_of(error, authentic=False)
                if state == "foreign":
                    # It opened a moment ago, or is known to be its own, so the key is here.
                    state = "unreachable"
                note = f"cannot wrap: {error}"
                self.states[index] = GroupChange(str(group), state, opened, note, error)
                continue
            if not _same(fresh, group):
                self._move(index, fresh)
            elif opened:
                self.states[index] = GroupChange(str(group), "current", tested=True)

    def _move(self, index: int, fresh: Group) -> None:
        was = self.groups[index]
        self.groups[index] = fresh
        self.states[index] = GroupChange(str(fresh), "moved", tested=True, note=f"was {was}")
        self.changed = True

    def _next(self) -> Group:
        wraps, group = self._new.pop(0)
        return group.wrap([self._careful(wrap) for wrap in wraps])

    def _careful(self, wrap: Wrap) -> Wrap:
        """A wrap that does not ask a service that another model could not reach."""
        down = self._task.down
        if not isinstance(wrap, ProviderKey):
            return wrap
        name, key = wrap.provider, wrap.key

        def call(dek: Dek, context: bytes) -> WrappedKey:
            answer = self._wanted.wrapped.pop((name, key, context), None)
            if answer is None and name in down:
                raise down[name]
            try:
                done = wrap(dek, context) if answer is None else wrap.answered(answer)
            except ProviderUnavailable as error:
                down[name] = error
                raise
            self.wrapped[f"{name}:{key}"] = recipient_name(done)
            return done

        return call

    def drop(self) -> tuple[str, ...]:
        """Take groups out; returns the remaining groups that contain a key of theirs."""
        dropped: list[Group] = []
        for text in self._task.drop:
            indices = self._named(text)
            if not indices:
                self._refuse_part(text)
                if self._task.tree:
                    continue
                shown = ", ".join(str(group) for group in list(self.groups.values())[:8])
                raise ConfigError(f"there is no group {text}", hint=f"the groups are: {shown}")
            self._task.dropped.add(text)
            dropped += [self._take_out(index) for index in indices]
        names = {_identity(wrapped) for group in dropped for wrapped in group.recipients}
        return tuple(
            str(group)
            for group in self.groups.values()
            if not names.isdisjoint(map(_identity, group.recipients))
        )

    def _take_out(self, index: int, note: str = "") -> Group:
        group = self.groups.pop(index)
        self.states[index] = GroupChange(str(group), "dropped", tested=False, note=note)
        self.changed = True
        return group

    def _named(self, text: str) -> list[int]:
        """The groups that ``text`` names, whatever their versions."""
        members = [_MEMBER.fullmatch(member) for member in text.split("+")]
        indices = [
            index
            for index, group in self.groups.items()
            if len(members) == len(group.recipients)
            and all(
                match is not None and self._is_named(match, wrapped)
                for match, wrapped in zip(members, group.recipients, strict=True)
            )
        ]
        public = {
            tuple(wrapped.params.get("pk") for wrapped in self.groups[index].recipients)
            for index in indices
        }
        if len(public) > 1:
            # The devices of a fleet have one key name, so the text may mean any of them.
            shown = ", ".join(str(self.groups[index]) for index in indices[:4])
            raise ConfigError(
                f"{text} names {len(indices)} groups",
                hint=f"write the one that is meant as `inspect` shows it: {shown}"
                + (", ..." if len(indices) > 4 else ""),
            )
        return indices

    def _is_named(self, match: re.Match[str], wrapped: WrappedKey) -> bool:
        name, version, public = match.groups()
        return (
            name == f"{wrapped.backend}:{wrapped.key}"
            and (version == wrapped.version or version is None or not self._task.exact)
            and (public is None or wrapped.params.get("pk", "").startswith(public))
        )

    def _refuse_part(self, text: str) -> None:
        match = _MEMBER.fullmatch(text) if "+" not in text else None
        for group in self.groups.values():
            if match is not None and any(self._is_named(match, w) for w in group.recipients):
                raise ConfigError(
                    f"{text} is one member of the group {group}",
                    hint="drop the whole group, and add the one that shall replace it",
                )

    def add(self) -> None:
        """Add groups under the keys' newest versions, or move those that are there already.

        Where the task says ``only``, take the others out.
        """
        wanted: set[int] = set()
        for wraps in self._task.add:
            fresh = self._next()
            same = [i for i, group in self.groups.items() if self._is(group, fresh, wraps)]
            older = [i for i, group in self.groups.items() if self._is_older(i, fresh, wraps)]
            if not same and older:
                same = [older.pop(0)]
                self._move(same[0], fresh)
            for index in older:
                self._take_out(index, note=f"moved to {fresh}")
            if not same:
                same = [len(self.states)]
                self.groups[same[0]] = fresh
                tested = all(isinstance(wrap, ProviderKey) for wrap in wraps)
                note = "" if tested else "written, not tested"
                self.states[same[0]] = GroupChange(str(fresh), "added", tested, note)
                self.changed = True
            wanted.update(same)
        if self._task.only:
            for index in set(self.groups) - wanted:
                self._take_out(index)

    def _is(self, group: Group, fresh: Group, wraps: Sequence[Wrap]) -> bool:
        # A public key's name says which it is; of others, only who holds it.
        return _same(group, fresh) and all(
            "pk" in wrapped.params or self._unlocker.asks_the_same_key(group, member, wrap.provider)
            for member, (wrap, wrapped) in enumerate(zip(wraps, group.recipients, strict=True))
            if isinstance(wrap, ProviderKey)
        )

    def _is_older(self, index: int, fresh: Group, wraps: Sequence[Wrap]) -> bool:
        """Whether a group is of other versions of the same keys, which only its opening proves."""
        group = self.groups[index]
        if _same(group, fresh) or [f"{w.backend}:{w.key}" for w in group.recipients] != [
            f"{w.backend}:{w.key}" for w in fresh.recipients
        ]:
            return False
        names = [wrap.provider if isinstance(wrap, ProviderKey) else None for wrap in wraps]
        # Other versions of a device look like other devices of that name.
        if None in names or self.states[index].state in ("added", "moved"):
            return False
        return self._opens(index) and self._unlocker.providers(index) == names

    def new_keys(self) -> tuple[bytes, UnlockPolicy]:
        """The content of the new keys.json, and the policy that a reader gets from it."""
        manifest = self._manifest
        groups = list(self.groups.values())
        data = UnlockPolicy.make(self._dek, manifest, self._hash, groups).to_bytes()
        policy = UnlockPolicy.from_bytes(data)
        policy.check_mac(self._dek, manifest.id)
        return data, policy

    def to_test(self) -> list[Group]:
        """The new groups that open here."""
        return [self.groups[index] for _, index in self._untested()]

    def _untested(self) -> list[tuple[int, int]]:
        return [
            (position, index)
            for position, index in enumerate(self.groups)
            if self.states[index].tested and self.states[index].state in ("moved", "added")
        ]

    def test(self, policy: UnlockPolicy, answers: Answers) -> None:
        """Open every new group that opens here, from the new keys.json.

        Raises:
            ProviderError: a group was wrapped and does not unwrap to the same data key.
        """
        unlocker = Unlocker(self._task.config, self._manifest, policy, answers, bounded=False)
        for position, index in self._untested():
            state = self.states[index]
            found = unlocker.open_group(position)
            if found is not None:
                found.wipe()
                continue
            reason = unlocker.attempts[-1].error
            if isinstance(reason, (UnwrapFailed, WrongKey)):
                raise ProviderError(
                    f"the group {state.group} does not open after wrapping, so nothing was "
                    f"written: {reason}",
                    hint=reason.hint,
                ) from reason
            # A user who may wrap need not be allowed to unwrap.
            note = f"written, not tested: {reason}"
            self.states[index] = replace(state, tested=False, note=note)


def _identity(wrapped: WrappedKey) -> tuple[str, str, str]:
    """The identity of a key: its name, and its public key if it has one."""
    return wrapped.backend, wrapped.key, wrapped.params.get("pk", "")


def _same(left: Group, right: Group) -> bool:
    return [recipient_name(w) for w in left.recipients] == [
        recipient_name(w) for w in right.recipients
    ]
