"""Rewrap: wrap the same data key again. Only keys.json is replaced; the payload is not touched.

The model is opened first, like any model, and the MAC of the policy is checked. So the data key is
only wrapped to recipients that a holder of the data key put there. The new keys.json is read back
and opened before it replaces the old one, and again afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._system.audit import audit
from keymgmt._system.steps import finish
from keymgmt._trust.candidate import admit
from keymgmt._trust.unlock import Unlocker
from keymgmt._verbs.rewrap_groups import EXIT_CODES, GroupChange, Work, not_opened
from keymgmt._verbs.rewrap_task import Task, Wanted
from keymgmt.errors import CannotUnlock, ConfigError, IntegrityError
from keymgmt.sealed.folder import KEYS
from keymgmt.sealed.keys import MAX_KEYS

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._system.steps import Wait

__all__ = ["ChangedMeanwhile", "Rewrapped", "rewrap", "rewrap_one", "rewrap_steps"]


@dataclass(frozen=True)
class Rewrapped:
    """The result of a rewrap, or of a dry run, for one sealed model.

    Attributes:
        path: the model's folder.
        name: the model's name.
        changed: whether keys.json was, or would be, replaced.
        groups: the outcome for each group.
        left: groups that still contain a key of a group that was dropped.
        skipped: it was finished before, as a journal says, and not looked at; nothing else is said
            of it.
    """

    path: str
    name: str
    changed: bool
    groups: tuple[GroupChange, ...] = field(default=())
    left: tuple[str, ...] = ()
    skipped: bool = False

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
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rewrapped:
        """Reverse ``to_json``, for a result without an error."""
        groups = tuple(map(GroupChange.from_json, value["groups"]))
        left, skipped = tuple(value["left"]), value["skipped"]
        return cls(value["path"], value["name"], value["changed"], groups, left, skipped)


Steps = Generator["Wanted | Wait", None, "Rewrapped"]


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
    """Another process changes the model, or was killed while doing so: begin again, ``locked``.

    Where nothing can be locked, as in a bucket, the second time it is an IntegrityError.
    """


def rewrap_one(path: str | os.PathLike[str], task: Task, name: str | None = None) -> Rewrapped:
    """Rewrap one model; raises as ``rewrap``."""
    return finish(rewrap_steps(path, task, name))


def rewrap_steps(
    path: str | os.PathLike[str],
    task: Task,
    name: str | None = None,
    *,
    locked: bool = True,
) -> Steps:
    """Rewrap one model step by step; before each step it yields its requests to providers.

    It is ``locked`` from the beginning, or only for writing, so that no lock is held while a key
    service is asked; then it does not wait for the lock either, so that a caller may write many
    models at once. Raises as ``rewrap``; ChangedMeanwhile where another process changes it.
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
                not_opened(group, index, unlocker, authentic=False)
                for index, group in enumerate(policy.groups)
            )
            return Rewrapped(str(path), manifest.name, changed=False, groups=states)
        with dek, Work(task, candidate, policy.groups, unlocker, dek, opened) as work:
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
                yield Wanted(last=True)
                if not locked:
                    if not candidate.folder.lock(wait=False):
                        raise ChangedMeanwhile
                    candidate.folder.clean(KEYS)
                    folder = candidate.folder
                    if folder.locks and folder.read(KEYS, MAX_KEYS) != policy.to_bytes():
                        raise ChangedMeanwhile
                try:
                    yield from candidate.folder.replacing(KEYS, data)
                except IntegrityError as error:
                    if locked or candidate.folder.locks:
                        raise
                    raise ChangedMeanwhile from error
                audit("rewrap", model=manifest.id.hex(), name=manifest.name)
            elif not (locked or task.dry_run) and candidate.folder.in_use(KEYS):
                raise ChangedMeanwhile
            states = tuple(work.states.values())
            result = Rewrapped(str(path), manifest.name, work.changed, states, left)
            if task.journal is not None and not result.exit_code:
                task.journal.add(path, candidate.folder.stamp(KEYS), work.wrapped)
            return result
