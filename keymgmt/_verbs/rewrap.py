"""Rewrap: wrap the same data key again. Only keys.json is replaced; the payload is not touched.

The model is opened first, like any model, and the MAC of the policy is checked. So the data key is
only wrapped to recipients that a holder of the data key put there. The new keys.json is read back
and opened before it replaces the old one, and again afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from keymgmt._config.calls import Answers, has_ability
from keymgmt._config.config import use_config
from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import SupportsBatchUnwrap, SupportsBatchWrap
from keymgmt._system.audit import audit
from keymgmt._trust.candidate import admit
from keymgmt._trust.policy import load_publishers
from keymgmt._trust.recipients import ProviderKey, resolve_groups
from keymgmt._trust.unlock import Unlocker
from keymgmt.errors import (
    AccessDenied,
    CannotUnlock,
    ConfigError,
    IntegrityError,
    KeyRetired,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)
from keymgmt.sealed.folder import KEYS
from keymgmt.sealed.keys import MAX_KEYS, Group, NewGroup, UnlockPolicy, recipient_name

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.data import WrappedKey
    from keymgmt._trust.candidate import Candidate
    from keymgmt._trust.policy import Publisher
    from keymgmt.errors import Attempt, KeymgmtError
    from keymgmt.sealed.keys import Wrap

__all__ = ["GroupChange", "Rewrapped", "Task", "Wanted", "rewrap"]

# A model with more recipients asks for them in batches of its own, apart from other models.
_FEW: Final = 64
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


@dataclass(frozen=True)
class Rewrapped:
    """The result of a rewrap, or of a dry run, for one sealed model.

    Attributes:
        path: the model's folder.
        name: the model's name.
        changed: whether keys.json was, or would be, replaced.
        groups: the outcome for each group.
        left: groups that still contain a key of a group that was dropped.
    """

    path: str
    name: str
    changed: bool
    groups: tuple[GroupChange, ...] = field(default=())
    left: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """6 if a group was unreachable, else 5 if one was denied, 4 if one is damaged, else 0."""
        states = {group.state for group in self.groups}
        return next((code for state, code in EXIT_CODES.items() if state in states), 0)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "path": self.path,
            "name": self.name,
            "changed": self.changed,
            "groups": [group.to_json() for group in self.groups],
            "left": list(self.left),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rewrapped:
        """Reverse ``to_json``, for a result without an error."""
        groups = tuple(map(GroupChange.from_json, value["groups"]))
        return cls(value["path"], value["name"], value["changed"], groups, tuple(value["left"]))


@dataclass(frozen=True)
class Wanted:
    """The requests of one model to providers, and the answers that came in advance.

    A caller with many models can make the requests of all of them in few calls. A request without
    an answer is made alone.

    Attributes:
        unwraps: provider, recipient and context of each request to unwrap.
        wraps: provider, key, data key or share, and context of each request to wrap.
        unwrapped: answers to ``unwraps``; the unlocker removes each that it uses.
        wrapped: (provider, key, context) -> answer.
        writes: there are no more requests: the next step writes to the disk, and waits for it.
    """

    unwraps: Sequence[tuple[str, WrappedKey, bytes]] = ()
    wraps: Sequence[tuple[str, str, Dek, bytes]] = ()
    unwrapped: Answers = field(default_factory=dict)
    wrapped: dict[tuple[str, str, bytes], WrappedKey | ProviderError] = field(default_factory=dict)
    writes: bool = False


Steps = Generator[Wanted, None, "Rewrapped"]


@dataclass(frozen=True)
class Task:
    """The arguments of a rewrap of one model, or of each model of a tree.

    Attributes:
        config: the loaded config.
        add: groups to add.
        drop: groups to take out, as texts.
        exact: take out only the version that is written.
        only: leave no group but those of ``add``.
        force: allow that no group is left that opens here.
        dry_run: write nothing.
        tree: whether this is one of many models: then a group to drop may be missing, and a model
            that does not open here is reported and not raised.
        dropped: texts of ``drop`` that some model had.
        down: providers that could not be reached, and are not asked again.
    """

    config: Config
    add: Sequence[Sequence[Wrap]] = ()
    drop: Sequence[str] = ()
    exact: bool = False
    only: bool = False
    force: bool = False
    dry_run: bool = False
    tree: bool = False
    dropped: set[str] = field(default_factory=set)
    down: dict[str, ProviderError] = field(default_factory=dict)

    @functools.cached_property
    def publishers(self) -> list[Publisher]:
        """The publishers of the config, read once for all models."""
        return load_publishers(self.config) if self.config.policy.require_signature else []

    @functools.cached_property
    def unwrapping(self) -> dict[str, list[str]]:
        """By backend, the providers that unwrap many recipients in one call."""
        found: dict[str, list[str]] = {}
        for name in self.config.provider_names:
            if has_ability(self.config, name, SupportsBatchUnwrap):
                found.setdefault(self.config.backend_of(name), []).append(name)
        return found

    @functools.cached_property
    def wrapping(self) -> frozenset[str]:
        """The providers that wrap many data keys in one call."""
        names = self.config.provider_names
        return frozenset(n for n in names if has_ability(self.config, n, SupportsBatchWrap))

    @property
    def in_few_calls(self) -> bool:
        """Whether every provider takes many requests in one call."""
        unwrapping = {name for names in self.unwrapping.values() for name in names}
        return unwrapping & self.wrapping >= set(self.config.provider_names)

    def wanted(self, policy: UnlockPolicy, groups: Iterable[Group]) -> Wanted:
        """The recipients of some groups that providers can unwrap many at once."""
        if not self.tree:
            return Wanted()
        found = [
            (name, wrapped, group.context(policy.manifest, member))
            for group in groups
            for member, wrapped in enumerate(group.recipients)
            for name in self.unwrapping.get(wrapped.backend, ())
        ]
        return Wanted(found if len(found) <= _FEW else ())

    @classmethod
    def make(
        cls,
        config: Config,
        *,
        add: Sequence[str],
        drop: Sequence[str],
        to: Sequence[str],
        fingerprints: Sequence[str],
        exact: bool,
        force: bool,
        dry_run: bool,
        tree: bool = False,
    ) -> Task:
        """Look up the groups; raises as ``rewrap``."""
        if to and (add or drop):
            raise ConfigError("--set names all groups, so there is none to add or to drop")
        texts = [*add, *to]
        return cls(
            config,
            add=resolve_groups(texts, config, fingerprints) if texts else (),
            drop=drop,
            exact=exact,
            only=bool(to),
            force=force,
            dry_run=dry_run,
            tree=tree,
        )


def rewrap(
    path: str | os.PathLike[str],
    *,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    to: Sequence[str] = (),
    exact: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    name: str | None = None,
    fingerprints: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Rewrapped:
    """Change who opens a sealed model, or move every group that opens here to newest key versions.

    With none of ``add``, ``drop`` and ``to`` every group that opens here is wrapped again where one
    of its keys has a newer version. Running it again changes nothing more.

    Args:
        path: the sealed model's folder.
        add: groups to add, written as for ``keymgmt.seal``. One that is there with older versions
            of the same keys is moved.
        drop: groups to take out, written as ``inspect`` shows them. A version in it does not count:
            all versions of its keys are taken out.
        to: exactly these groups open it from now on.
        exact: take out only the version that ``drop`` writes.
        keys: a loaded config, or the path of one.
        name: the model name that is expected.
        fingerprints: of recipient files that no trusted signer vouches for.
        force: allow that no group is left that opens here.
        dry_run: say what would be done, and write nothing.

    Raises:
        ConfigError: a group to drop is not there, is only part of a group, or is the last that
            opens here; or the config is wrong.
        CannotUnlock, SealedModelError: as ``keymgmt.open``; nothing was changed.
        ProviderError: a group to add cannot be wrapped to, or nobody knows whether a group is left
            that opens here; nothing was changed.
    """
    with use_config(keys) as config:
        task = Task.make(
            config,
            add=add,
            drop=drop,
            to=to,
            fingerprints=fingerprints,
            exact=exact,
            force=force,
            dry_run=dry_run,
        )
        return rewrap_one(path, task, name)


class ChangedMeanwhile(Exception):
    """Another process changes the model, or was killed while doing so: begin again, ``locked``."""


def rewrap_one(path: str | os.PathLike[str], task: Task, name: str | None = None) -> Rewrapped:
    """Rewrap one model; raises as ``rewrap``."""
    steps = rewrap_steps(path, task, name)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: Rewrapped = end.value
            return done


def rewrap_steps(
    path: str | os.PathLike[str],
    task: Task,
    name: str | None = None,
    *,
    locked: bool = True,
) -> Steps:
    """Rewrap one model step by step; before each step it yields its requests to providers.

    It is ``locked`` from the beginning, or only for writing, so that no lock is held while a key
    service is asked. Raises as ``rewrap``; ChangedMeanwhile where another process changed it.
    """
    candidate, _ = admit(path, task.config, name, task.publishers)
    with candidate:
        if locked and not task.dry_run:
            candidate.folder.lock()
            candidate.folder.clean(KEYS)
        policy, manifest = candidate.policy(), candidate.manifest
        yield (wanted := task.wanted(policy, policy.groups))
        unlocker = Unlocker(task.config, manifest, policy, wanted.unwrapped, down=task.down)
        try:
            dek, opened = unlocker.unlock()
        except CannotUnlock:
            if not task.tree:
                raise
            states = tuple(
                _not_opened(group, index, unlocker, authentic=False)
                for index, group in enumerate(policy.groups)
            )
            return Rewrapped(str(path), manifest.name, changed=False, groups=states)
        with dek, _Work(task, candidate, policy.groups, unlocker, dek, opened) as work:
            if not task.add and not task.drop:
                work.look()
            left = work.drop()
            work.split()
            yield work.wanted()
            work.refresh()
            work.add()
            if not work.groups:
                raise ConfigError(
                    f"no group that opens {path} would be left, so nobody could ever open it",
                    hint="delete the folder instead, if that is what is wanted",
                )
            data = b""
            if work.changed:
                data, made = work.new_keys()
                yield (wanted := task.wanted(made, work.to_test()))
                work.test(made, wanted.unwrapped)
            if not task.force:
                work.check_opens_here(str(path))
            if work.changed and not task.dry_run:
                yield Wanted(writes=True)
                if not locked:
                    candidate.folder.lock()
                    candidate.folder.clean(KEYS)
                    if candidate.folder.read(KEYS, MAX_KEYS) != policy.to_bytes():
                        raise ChangedMeanwhile
                _replace_keys(candidate, data)
                audit("rewrap", model=manifest.id.hex(), name=manifest.name)
            elif not (locked or task.dry_run) and candidate.folder.in_use(KEYS):
                raise ChangedMeanwhile
            states = tuple(work.states.values())
            return Rewrapped(str(path), manifest.name, work.changed, states, left)


def _state_of(error: KeymgmtError, *, authentic: bool) -> State:
    """The state of a group for an error of a provider; an unknown error is not harmless."""
    if isinstance(error, WrongKey) or (authentic and isinstance(error, UnwrapFailed)):
        # It is not damaged if a holder of the data key wrote it: another key of that name made it.
        return "foreign"
    if isinstance(error, UnwrapFailed):
        return "damaged"
    return "denied" if isinstance(error, _DENIED) else "unreachable"


def _not_opened(group: Group, index: int, unlocker: Unlocker, *, authentic: bool) -> GroupChange:
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


class _Work:
    """The groups of one model while they are changed; ``states`` is in the order of the result.

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
                state = _not_opened(group, index, self._unlocker, authentic=True)
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
                self.states[index] = _not_opened(group, index, self._unlocker, authentic=True)
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
                return wrap(dek, context) if answer is None else wrap.answered(answer)
            except ProviderUnavailable as error:
                down[name] = error
                raise

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


def _replace_keys(candidate: Candidate, data: bytes) -> None:
    candidate.folder.replace(KEYS, data)
    if candidate.folder.read(KEYS, MAX_KEYS) != data:
        raise IntegrityError(
            f"{candidate.folder.path}/{KEYS} does not read back as it was written",
            hint="look at the disk; the other files of the model were not touched",
        )
