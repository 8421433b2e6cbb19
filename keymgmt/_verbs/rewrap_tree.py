"""Rewrap of many sealed models: in step, with few calls to a key service and many writes at once.

The models of a chunk take each step together, so that their requests to a provider go into one
call. Writing is mostly waiting for the disk: threads wait for it with one chunk while the next
takes its steps, and do little else, since they would take turns at the interpreter. A model is
locked only while its chunk is written, and no lock is waited for meanwhile, so two runs over one
tree never wait for each other in a circle. A model that another process changes is done again
under its lock when no other is held.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt._config.calls import unwrap_many, wrap_many
from keymgmt._config.config import use_config
from keymgmt._remote.location import Location, is_location
from keymgmt._system.steps import next_step, outcome
from keymgmt._verbs.find_models import CHUNK, Failure, Place, find_models, guarded
from keymgmt._verbs.journal import Journal
from keymgmt._verbs.rewrap import (
    ChangedMeanwhile,
    Rewrapped,
    rewrap_one,
    rewrap_steps,
)
from keymgmt._verbs.rewrap_task import Task, Wanted
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._crypto.dek import Dek
    from keymgmt._providers.data import WrappedKey
    from keymgmt._system.steps import Wait

__all__ = ["rewrap_tree"]

_THREADS: Final = 16
Result = Rewrapped | Failure


def rewrap_tree(
    tree: str | os.PathLike[str],
    *,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    to: Sequence[str] = (),
    exact: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    fingerprints: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    shard: str | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Iterator[Result]:
    """Rewrap every sealed model below ``tree``, many at once, and tell of each as it is done.

    An error in one model is yielded as a Failure and does not stop the others. If a model does not
    open here, the states of its groups have the reason. A key service that was not reached is not
    asked again in this run. A killed run may be started again: finished models are ``current``. A
    group to drop that no model had is a Failure of the tree. Arguments as for
    ``keymgmt.rewrap``.

    ``tree`` may be a path in a bucket, as the text ``s3://BUCKET/PATH``: its objects are listed in
    pages. A model of which somebody else replaces the groups meanwhile is done again; the second
    time that is a Failure.

    ``shard``, such as ``"2/8"``, selects one part of the tree by the paths of the models below it.
    The parts may run at the same time, on machines that mount the tree at different paths. It is
    then no Failure that no model of the part had a group to drop.

    ``resume`` is a file in which finished models are written down: a journal. It is made if it is
    missing. A later run of the same job passes over them, and yields each as ``skipped``, unless
    its ``keys.json`` was changed since then, or a key was rotated.

    Raises:
        ConfigError, ProviderError: the config, or a group to add, is wrong, or the journal is of
            another job, in use or damaged; nothing was changed.
    """
    if resume is not None and dry_run:
        raise ConfigError("a dry run finishes no model, so there is nothing to resume")
    with use_config(keys) as config, contextlib.ExitStack() as stack:
        task = Task.make(
            config,
            add=add,
            drop=drop,
            to=to,
            fingerprints=fingerprints,
            exact=exact,
            force=force,
            dry_run=dry_run,
            tree=True,
        )
        etags: dict[str, str] | None = None if resume is None else {}
        found = find_models(tree, shard=shard, remote=config.remote, etags=etags)
        if resume is None or etags is None:
            yield from _in_chunks(found, task)
            skipped = False
        else:
            journal = stack.enter_context(_open_journal(Path(resume), tree, shard, task))
            task = replace(task, journal=journal)
            yield from _in_chunks(_unfinished(found, journal, etags), task)
            if journal.broken is not None:
                yield Failure(str(resume), journal.broken)
            skipped = journal.skipped
        for text in drop if shard is None and not skipped else ():
            if text not in task.dropped:
                # The group was dropped by an earlier run, or it is misspelt.
                message = f"no model that was opened had a group {text} to drop"
                yield Failure(str(tree), ConfigError(message))


def _open_journal(
    file: Path, tree: str | os.PathLike[str], shard: str | None, task: Task
) -> Journal:
    place: Place = str(Location.parse(str(tree))) if is_location(tree) else Path(tree)
    address = place if isinstance(place, str) else os.path.realpath(place)
    job = {"verb": "rewrap", "tree": address, "shard": shard, **task.to_json()}
    return Journal(file, place, job, task.newest)


def _unfinished(
    found: Iterable[Place | Failure], journal: Journal, etags: dict[str, str]
) -> Iterator[Place | Result]:
    """What is left to do, and a result for each model that was finished before."""
    for item in found:
        etag = etags.get(str(item))
        etags.clear()
        if not isinstance(item, Failure) and journal.has(item, etag):
            yield Rewrapped(str(item), "", changed=False, skipped=True)
        else:
            yield item


def _in_chunks(found: Iterable[Place | Result], task: Task) -> Iterator[Result]:
    """The results of each chunk, in the order of the tree, while the next one is at work.

    No model is locked while a result is handed out.
    """
    found = iter(found)
    # While it is written each model has three files open, and one of the next chunk has one.
    size = min(CHUNK, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
    with ThreadPoolExecutor(2 * _THREADS, "keymgmt rewrap") as pool:
        chunk, following = _Chunk((), task, pool), _Chunk((), task, pool)
        try:
            while True:
                chunk.write()
                following = _Chunk(tuple(itertools.islice(found, size)), task, pool)
                while following.ask():
                    pass
                yield from chunk.results()
                if not following.models:
                    return
                chunk = following
        finally:
            chunk.close()
            following.close()


class _Model:
    """One model of a chunk: what it waits for, or its result."""

    def __init__(self, path: Place, task: Task) -> None:
        self.path = path
        self.wanted: Wanted | None = None
        self.wait: Wait | None = None
        self.failure: BaseException | None = None
        self.steps = rewrap_steps(path, task, locked=False)
        self._result: Result | None = None
        self._next = guarded(self._advance)

    def step(self) -> None:
        """Go on to the next requests or wait, or to the end; ``failure`` is of the last wait."""
        self._result = self._next(self.path)

    def _advance(self, _: Place) -> Any:
        self.wanted = self.wait = None
        try:
            step = next_step(self.steps, self.failure)
        except StopIteration as end:
            return end.value
        except ChangedMeanwhile:
            return None
        if isinstance(step, Wanted):
            self.wanted = step
        else:
            self.wait = step
        return None

    def result(self, task: Task) -> Result:
        """The result; waits for the process that changes the model."""
        return self._result or guarded(partial(rewrap_one, task=task))(self.path)


class _Chunk:
    """Models that take each step together."""

    def __init__(
        self, found: Sequence[Place | Result], task: Task, pool: ThreadPoolExecutor
    ) -> None:
        self._task, self._pool = task, pool
        self.models = [each if isinstance(each, Result) else _Model(each, task) for each in found]
        self._asking = [model for model in self.models if isinstance(model, _Model)]
        self._writing: deque[_Model] = deque()
        self._threads: list[Future[None]] = []

    def ask(self) -> bool:
        """Take each model one step further, but to no write; False where all are as far as that."""
        # A provider that takes one request at a time gets those of several models in parallel, and
        # so does a bucket.
        far = any(isinstance(model.path, str) for model in self._asking)
        each = map if self._task.in_few_calls and not far else self._pool.map
        list(each(_Model.step, self._asking))
        self._writing.extend(m for m in self._asking if m.wanted and m.wanted.last)
        self._asking = [m for m in self._asking if m.wanted and not m.wanted.last]
        _ask(self._task, [model.wanted for model in self._asking if model.wanted])
        return bool(self._asking)

    def write(self) -> None:
        """Lock and write each model up to where it waits for the disk; threads do the rest."""
        for model in self._writing:
            model.step()
        threads = min(_THREADS, len(self._writing))
        self._threads = [self._pool.submit(self._finish) for _ in range(threads)]

    def _finish(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                model = self._writing.popleft()
                while model.wait is not None:
                    model.failure = outcome(model.wait)
                    model.step()

    def results(self) -> Iterator[Result]:
        """The result of each model, in order, when all are written."""
        for thread in self._threads:
            thread.result()
        for model in self.models:
            yield model.result(self._task) if isinstance(model, _Model) else model

    def close(self) -> None:
        """Leave every unfinished model unchanged and unlocked."""
        self._writing.clear()
        wait(self._threads)
        for model in self.models:
            if isinstance(model, _Model):
                model.steps.close()


def _ask(task: Task, wanted: Sequence[Wanted]) -> None:
    """Send the requests of all these models to providers, and give each model its answers."""
    unwraps: dict[str, list[tuple[Wanted, WrappedKey, bytes]]] = {}
    wraps: dict[tuple[str, str], list[tuple[Wanted, Dek, bytes]]] = {}
    for each in wanted:
        for name, wrapped, context in each.unwraps:
            unwraps.setdefault(name, []).append((each, wrapped, context))
        for name, key, dek, context in each.wraps:
            wraps.setdefault((name, key), []).append((each, dek, context))
    for name, recipients in unwraps.items():
        if name not in task.down:
            opened = unwrap_many(task.config, name, [item[1:] for item in recipients])
            for (each, wrapped, context), share in zip(recipients, opened, strict=False):
                each.unwrapped[name, wrapped.blob, context] = share
    for (name, key), shares in wraps.items():
        if name not in task.down:
            made = wrap_many(task.config, name, key, [item[1:] for item in shares])
            for (each, _, context), recipient in zip(shares, made, strict=False):
                each.wrapped[name, key, context] = recipient
