"""Rewrap: new wraps of the same data key. Only keys.json is replaced; the payload is not touched.

The model is opened first, as anybody would open it, and the MAC of the policy is checked, so
nothing is ever wrapped to a recipient that a holder of the data key did not put there. What was
written is read back and opened again, before it takes its place and after.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from keymgmt._admit import admit
from keymgmt._audit import audit
from keymgmt._config import use_config
from keymgmt._dek import Dek
from keymgmt._files import left_behind
from keymgmt._recipients import ProviderKey, resolve_groups
from keymgmt._unlock import Answers, Unlocker
from keymgmt.errors import (
    ConfigError,
    IntegrityError,
    ProviderError,
    UnwrapFailed,
    WrongKey,
)
from keymgmt.sealed.folder import KEYS
from keymgmt.sealed.keys import MAX_KEYS, Group, UnlockPolicy, recipient_name, wrap_group

if TYPE_CHECKING:
    from keymgmt._admit import Candidate
    from keymgmt._config import Config
    from keymgmt.sealed.keys import Wrap

__all__ = ["GroupChange", "Rewrapped", "rewrap"]

_VERSION: Final = re.compile(r"@[A-Za-z0-9._-]+")

Change = Literal["kept", "rewrapped", "added", "dropped"]


@dataclass(frozen=True)
class GroupChange:
    """What became of one group, and whether it was opened here afterwards."""

    group: str
    change: Change
    tested: bool
    note: str = ""


@dataclass(frozen=True)
class Rewrapped:
    """What a rewrap did, or would do, to one sealed model."""

    path: str
    name: str
    changed: bool
    groups: tuple[GroupChange, ...] = field(default=())


def rewrap(
    path: str | os.PathLike[str],
    *,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    keys: Config | str | os.PathLike[str] | None = None,
    name: str | None = None,
    fingerprints: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Rewrapped:
    """Change who opens a sealed model, or move every group that opens here to newest key versions.

    With neither ``add`` nor ``drop`` every group that opens here is wrapped again where one of its
    keys has a newer version. Running it again changes nothing more.

    Args:
        path: the sealed model's folder.
        add: groups to add, written as for ``keymgmt.seal``.
        drop: groups to take out, written as ``inspect`` shows them, with or without versions.
        keys: a loaded config, or the path of one.
        name: the model name that is expected.
        fingerprints: of recipient files that no trusted signer vouches for.
        force: allow that no group is left that opens here.
        dry_run: say what would be done, and write nothing.

    Raises:
        ConfigError: a group to drop is not there, is only part of a group, or is the last that
            opens here; or the config is wrong.
        CannotUnlock, SealedModelError: as ``keymgmt.open``; nothing was changed.
        ProviderError: a group to add cannot be wrapped to; nothing was changed.
    """
    with use_config(keys) as config:
        groups = resolve_groups(add, config, fingerprints) if add else []
        return rewrap_one(
            path, config, add=groups, drop=drop, name=name, force=force, dry_run=dry_run
        )


def rewrap_one(
    path: str | os.PathLike[str],
    config: Config,
    *,
    add: Sequence[Sequence[Wrap]] = (),
    drop: Sequence[str] = (),
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    seen: set[str] | None = None,
    answers: Answers | None = None,
) -> Rewrapped:
    """Rewrap one model with a loaded config; raises as ``rewrap``.

    ``seen`` takes a group to drop that is not there for one already dropped, and is told of those
    that were. ``answers`` holds data keys that were unwrapped ahead, many in one call.
    """
    candidate, _ = admit(path, config, name)
    with candidate:
        candidate.folder.lock()
        for abandoned in left_behind(Path(path) / KEYS):
            # Nobody else writes keys.json while the lock is held, so a killed rewrap left it.
            abandoned.unlink(missing_ok=True)
        policy = candidate.policy()
        unlocker = Unlocker(config, candidate.manifest, policy, answers)
        dek, opened = unlocker.unlock()
        with dek:
            work = _Work(config, candidate, policy.groups, unlocker, dek, opened)
            if not add and not drop:
                work.refresh()
            work.drop(drop, seen)
            work.add(add)
            if not work.groups:
                raise ConfigError(
                    f"no group that opens {path} would be left, so nobody could ever open it",
                    hint="delete the folder instead, if that is what is wanted",
                )
            data = work.new_keys() if work.changed else b""
            if not force and not work.opens_here():
                raise ConfigError(
                    f"no group that opens here would be left in {path}",
                    hint="add another group in the same call, or give --force",
                )
            if work.changed and not dry_run:
                _replace_keys(Path(path), candidate, data)
                audit("rewrap", model=candidate.manifest.id.hex(), name=candidate.manifest.name)
            return Rewrapped(
                str(path), candidate.manifest.name, work.changed, tuple(work.states.values())
            )


class _Work:
    """The groups of one model while they are changed; ``states`` is in the order of the result."""

    def __init__(
        self,
        config: Config,
        candidate: Candidate,
        groups: Sequence[Group],
        unlocker: Unlocker,
        dek: Dek,
        opened: int,
    ) -> None:
        self._config, self._hash, self._dek = config, candidate.hash, dek
        self._manifest = candidate.manifest
        self._unlocker, self._opened = unlocker, opened
        self.groups: dict[int, Group] = dict(enumerate(groups))
        self.states = {
            index: GroupChange(str(group), "kept", index == opened)
            for index, group in self.groups.items()
        }
        self.changed = False

    def opens_here(self) -> bool:
        """Whether any group that is left was opened, or opens, with this config."""
        return any(
            self.states[index].tested
            or (self.states[index].change == "kept" and self._opens(index))
            for index in self.groups
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

    def refresh(self) -> None:
        """Wrap again every group that opens here and has a key with a newer version."""
        for index, group in list(self.groups.items()):
            if not self._opens(index):
                self.states[index] = GroupChange(str(group), "kept", tested=False)
                continue
            wraps = [
                ProviderKey(self._config, provider, wrapped.key)
                for provider, wrapped in zip(
                    self._unlocker.providers(index), group.recipients, strict=True
                )
            ]
            try:
                fresh = wrap_group(self._dek, self._hash, wraps)
            except ProviderError as error:
                note = f"cannot wrap: {error}"
                self.states[index] = GroupChange(str(group), "kept", tested=True, note=note)
                continue
            if _same(fresh, group):
                self.states[index] = GroupChange(str(group), "kept", tested=True)
                continue
            self.groups[index] = fresh
            self.states[index] = GroupChange(
                str(fresh), "rewrapped", tested=True, note=f"was {group}"
            )
            self.changed = True

    def drop(self, texts: Sequence[str], seen: set[str] | None) -> None:
        """Take groups out; ``seen`` as in ``rewrap_one``."""
        for text in texts:
            found = [index for index, group in self.groups.items() if text == str(group)]
            if not found:
                found = self._without_version(text)
            if not found:
                self._refuse_part(text)
                if seen is not None:
                    continue
                shown = ", ".join(str(group) for group in list(self.groups.values())[:8])
                raise ConfigError(f"there is no group {text}", hint=f"the groups are: {shown}")
            if seen is not None:
                seen.add(text)
            for index in found:
                self.states[index] = GroupChange(str(self.groups.pop(index)), "dropped", False)
                self.changed = True

    def _without_version(self, text: str) -> list[int]:
        """The one group that ``text`` names without versions, if there is one."""
        found = [
            index
            for index, group in self.groups.items()
            if text in (_without_versions(group), _VERSION.sub("", str(group)))
        ]
        if len(found) > 1:
            # A fleet's devices have one key name: which of them must go is not to be guessed.
            shown = ", ".join(str(self.groups[index]) for index in found[:4])
            raise ConfigError(
                f"{text} names {len(found)} groups",
                hint=f"write the one that is meant as `inspect` shows it: {shown}"
                + (", ..." if len(found) > 4 else ""),
            )
        return found

    def _refuse_part(self, text: str) -> None:
        for group in self.groups.values():
            for wrapped in group.recipients:
                if len(group.recipients) > 1 and text in (
                    recipient_name(wrapped),
                    f"{wrapped.backend}:{wrapped.key}",
                ):
                    raise ConfigError(
                        f"{text} is one member of the group {group}",
                        hint="drop the whole group, and add the one that shall replace it",
                    )

    def add(self, groups: Sequence[Sequence[Wrap]]) -> None:
        """Add groups that are not there yet, under the keys' newest versions."""
        for wraps in groups:
            fresh = wrap_group(self._dek, self._hash, wraps)
            if any(self._is(group, fresh, wraps) for group in self.groups.values()):
                continue
            index = len(self.states)
            self.groups[index] = fresh
            tested = all(isinstance(wrap, ProviderKey) for wrap in wraps)
            note = "" if tested else "written, not tested"
            self.states[index] = GroupChange(str(fresh), "added", tested, note)
            self.changed = True

    def _is(self, group: Group, fresh: Group, wraps: Sequence[Wrap]) -> bool:
        # A public key's name says which it is; of others, only who holds it.
        return _same(group, fresh) and all(
            "pk" in wrapped.params or self._unlocker.may_hold(group, member, wrap.provider)
            for member, (wrap, wrapped) in enumerate(zip(wraps, group.recipients, strict=True))
            if isinstance(wrap, ProviderKey)
        )

    def new_keys(self) -> bytes:
        """The new keys.json, after every new group in it that opens here was opened from it.

        Raises:
            ProviderError: a group was wrapped and does not unwrap to the same data key.
        """
        manifest = self._manifest
        groups = list(self.groups.values())
        data = UnlockPolicy.make(self._dek, manifest.id, self._hash, groups).to_bytes()
        policy = UnlockPolicy.from_bytes(data)
        policy.check_mac(self._dek, manifest.id)
        unlocker = Unlocker(self._config, manifest, policy, bounded=False)
        for position, index in enumerate(self.groups):
            state = self.states[index]
            if not state.tested or state.change not in ("rewrapped", "added"):
                continue
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
            # Who may wrap need not be who may unwrap.
            note = f"written, not tested: {reason}"
            self.states[index] = replace(state, tested=False, note=note)
        return data


def _same(left: Group, right: Group) -> bool:
    return [recipient_name(w) for w in left.recipients] == [
        recipient_name(w) for w in right.recipients
    ]


def _without_versions(group: Group) -> str:
    return "+".join(f"{wrapped.backend}:{wrapped.key}" for wrapped in group.recipients)


def _replace_keys(path: Path, candidate: Candidate, data: bytes) -> None:
    candidate.folder.replace(KEYS, data)
    if candidate.folder.read(KEYS, MAX_KEYS) != data:
        raise IntegrityError(
            f"{path / KEYS} does not read back as it was written",
            hint="look at the disk; the other files of the model were not touched",
        )
