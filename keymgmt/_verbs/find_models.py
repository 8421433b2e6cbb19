"""The sealed models below some folders: each is yielded once, and worked on in parallel.

A folder that cannot be searched is a Failure: it is not the same as a folder without models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt._remote.location import BUCKETS, Location, is_location, need_folder
from keymgmt._system.files import target_of
from keymgmt._system.refused import translate
from keymgmt._trust.candidate import Candidate
from keymgmt.errors import ConfigError, KeymgmtError, SealedModelError
from keymgmt.sealed.folder import KEYS, MANIFEST, PAYLOAD, SIGNATURES
from keymgmt.sealed.manifest import MAX_MANIFEST

if TYPE_CHECKING:
    from keymgmt._config.remote import Remote
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = [
    "Failure",
    "Link",
    "Place",
    "Shard",
    "find_models",
    "guarded",
    "is_model",
    "over_models",
    "path_below",
    "read_models",
]

CHUNK: Final = 128
_THREADS: Final = 8
_OURS: Final = b'"keymgmt-'
_OF_A_MODEL: Final = frozenset({MANIFEST, KEYS, SIGNATURES, PAYLOAD})
_NAME: Final = operator.attrgetter("name")
T = TypeVar("T")
Place = Path | str
"""A folder; or, as a text, the location of a model elsewhere."""
Trees = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Failure:
    """A model or folder of a tree, and the error that it caused."""

    path: str
    error: KeymgmtError

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {"path": self.path, "error": self.error.to_json()}


@dataclass(frozen=True)
class Link:
    """A symbolic link to a folder, which was followed, and its target."""

    path: str
    target: str


@dataclass(frozen=True)
class Shard:
    """One of several parts of a tree; the path of a model decides in which part it is.

    A model is in part ``1 + h mod count``. h is the first 8 bytes, as a big-endian number, of the
    SHA-256 of the path from the tree to the model's folder.

    Attributes:
        number: number of the part, from 1.
        count: number of parts.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a text such as ``2/8``; ConfigError where it has another form."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"{text[:40]!r} is no part of a tree",
                hint="the first of eight parts is 1/8, and the last is 8/8",
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, tree: Place, path: Place) -> bool:
        """Whether a folder of the tree is in this part; it is the same one in a bucket."""
        digest = hashlib.sha256(os.fsencode(path_below(tree, path))).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


def path_below(tree: Place, path: str | os.PathLike[str]) -> str:
    """The path from a tree to a folder in it; it is the same one in a bucket."""
    if isinstance(path, str):
        return path.removeprefix(str(tree)).strip("/") or "."
    return str(Path(path).relative_to(tree))


def find_models(
    trees: Trees,
    links: list[Link] | None = None,
    shard: str | None = None,
    remote: Remote | None = None,
    etags: dict[str, str] | None = None,
) -> Iterator[Place | Failure]:
    """Every sealed model at or below the ``trees``, each once, even if several links lead to it.

    It has the path without links, where that is below a tree. Through a second mount of its folder
    it is found a second time. Links to folders are followed, and added to ``links``. These are
    Failures: a folder that cannot be read, a link without a target, and a tree without any model.
    A folder also counts as a model where files of it are missing or damaged, so that the caller
    gets the error. A model may contain others. The ``manifest.json`` of another program hides
    nothing. With a ``shard``, such as ``2/8``, only that part is yielded, and the Failures of a
    whole tree.

    With ``remote`` a tree may be in a bucket (``s3://BUCKET/PATH``, as a text). There every object
    named ``manifest.json`` counts as a model's, and a listing that fails is a Failure of the tree.
    Before a model is yielded, the ETag of its keys.json is put into ``etags``, if it is known.

    Raises:
        ConfigError: ``shard`` has another form.
    """
    part = Shard.parse(shard) if shard is not None else None
    roots: set[tuple[int, int]] = set()
    listed: list[str] = []
    links = links if links is not None else []
    for each in [trees] if isinstance(trees, (str, os.PathLike)) else trees:
        tree: Place = Path(each)
        found: Iterator[Place | Failure | None]
        try:
            there = isinstance(each, str) and is_location(each) and Location.parse(each)
            if remote is not None and there and there.scheme in BUCKETS:
                tree = str(there)
                found = _listed(there, remote, tuple(listed), etags)
                listed.append(tree)
            else:
                need_folder(each)
                found = _walk(Path(each), roots, links, frozenset(roots))
        except ConfigError as error:
            yield Failure(os.fspath(each), error)
            continue
        empty = True
        for model_or_failure in found:
            empty = False
            if model_or_failure is not None and (
                part is None or _is_in(part, tree, model_or_failure)
            ):
                yield model_or_failure
        if empty:
            message = f"there is no sealed model at or below {tree}"
            yield Failure(str(tree), ConfigError(message, hint="is this the right folder?"))


def _is_in(shard: Shard, tree: Place, model_or_failure: Place | Failure) -> bool:
    if not isinstance(model_or_failure, Failure):
        return shard.has(tree, model_or_failure)
    # A Failure of the whole tree belongs to every part.
    path = model_or_failure.path if isinstance(tree, str) else Path(model_or_failure.path)
    return path == tree or shard.has(tree, path)


def _listed(
    tree: Location, remote: Remote, before: Sequence[str], etags: dict[str, str] | None
) -> Iterator[Place | Failure | None]:
    """What is at or below ``tree`` in a bucket; None for a model of a tree in ``before``."""
    from keymgmt._remote.listing import list_models

    try:
        for item in list_models(tree, remote, etags):
            if isinstance(item, KeymgmtError):
                yield Failure(str(tree), item)
            else:
                had = any(f"{item}/".startswith(f"{earlier}/") for earlier in before)
                yield None if had else item
    except KeymgmtError as error:
        yield Failure(str(tree), error)


def _walk(
    tree: Path, roots: set[tuple[int, int]], links: list[Link], before: frozenset[tuple[int, int]]
) -> Iterator[Path | Failure | None]:
    """Models and Failures at or below ``tree``; None for what a root in ``before`` leads to.

    Not every folder is remembered, since there may be millions, but the ``roots`` are: the trees,
    and the targets of links that lie elsewhere. A walk from a root leads to each folder below once.
    """
    # Not os.walk, which recurses: folders may be nested deeper than Python's stack. Texts and not
    # Paths, since a folder may hold a million models.
    waiting: list[str] = []
    try:
        if _root_of(str(tree), roots) is None:
            waiting.append(str(tree))
        else:
            yield None
    except OSError as error:
        # A tree that does not exist was named wrongly; a folder in it may be damaged.
        yield _unreadable(tree, error, ConfigError)
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                children = sorted(entries, key=_NAME, reverse=True)
        except OSError as error:
            kind = ConfigError if folder == str(tree) else SealedModelError
            yield _unreadable(Path(folder), error, kind)
            continue
        below = []
        for entry in children:
            root = None
            try:
                if entry.is_symlink():
                    # Unlike DirEntry.is_dir, stat raises where a link has no target.
                    if not stat.S_ISDIR(entry.stat().st_mode):
                        continue
                    links.append(Link(str(Path(entry.path)), os.path.realpath(entry.path)))
                    root = _root_of(entry.path, roots)
                elif entry.is_dir(follow_symlinks=False):
                    identity = _identity(entry.stat(follow_symlinks=False))
                    root = identity if identity in roots else None
                else:
                    continue
            except OSError as error:
                yield _unreadable(Path(entry.path), error)
                continue
            if root is None:
                below.append(entry.path)
            elif root in before:
                yield None
        ours = _OF_A_MODEL.intersection(entry.name for entry in children)
        if ours and _is_model(Path(folder), ours):
            yield Path(folder)
        waiting += below


def _root_of(folder: str, roots: set[tuple[int, int]]) -> tuple[int, int] | None:
    """The root that leads to a folder; None if there is none, and then the folder becomes one."""
    path = Path(os.path.realpath(folder, strict=True))
    identities = [_identity(each.stat()) for each in (path, *path.parents)]
    root = next((identity for identity in identities if identity in roots), None)
    if root is None:
        roots.add(identities[0])
    return root


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _unreadable(path: Path, error: OSError, kind: type[KeymgmtError] = SealedModelError) -> Failure:
    if isinstance(error, PermissionError):
        return Failure(str(path), translate(error, path))
    action = "follow the link" if os.path.islink(path) else "read"  # noqa: PTH114 - raises never
    return Failure(str(path), kind(f"cannot {action} {path}: {error.strerror}"))


def is_model(folder: Path) -> bool:
    """Whether a folder is, or was, a sealed model; true where it cannot be read."""
    try:
        return _is_model(folder, _OF_A_MODEL.intersection(entry.name for entry in folder.iterdir()))
    except OSError:
        return True


def _is_model(folder: Path, ours: frozenset[str]) -> bool:
    if not ours:
        return False
    if ours >= {MANIFEST, KEYS, PAYLOAD}:
        return True
    if any(_says_so(folder / name, alone=len(ours) == 1) for name in ours - {PAYLOAD}):
        return True
    # A seal that was killed, or is at work, has written no recipient yet.
    if PAYLOAD not in ours or target_of(folder.name):
        return False
    try:
        return any(file.suffix == ".floe" for file in (folder / PAYLOAD).iterdir())
    except NotADirectoryError:
        return False
    except OSError:
        return True


def _says_so(file: Path, *, alone: bool) -> bool:
    """Whether a file is of our format; true where it cannot be read and so may be."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST)
    except OSError:
        return True
    if _OURS in content or alone:
        return _OURS in content
    try:
        # Is it a file of ours that was cut off before its format, or another program's?
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


def over_models(
    found: Iterable[Place | Failure],
    prepare: Callable[[Sequence[Place]], Callable[[Place], T]],
    doing: str,
    *,
    threads: int = _THREADS,
) -> Iterator[T | Failure]:
    """Work on many models in parallel, and yield each result as it is ready.

    An error in one model is a Failure and does not stop the others.

    Args:
        found: the models, and the Failures of the search.
        prepare: gives the function that is called with each of some models.
        doing: the verb, for the names of threads.
        threads: how many models at once.
    """
    found = iter(found)
    with ThreadPoolExecutor(threads, f"keymgmt {doing}") as pool:
        while chunk := list(itertools.islice(found, CHUNK)):
            yield from (item for item in chunk if isinstance(item, Failure))
            paths = [item for item in chunk if not isinstance(item, Failure)]
            yield from pool.map(guarded(prepare(paths)), paths)


def guarded(work: Callable[[Place], T]) -> Callable[[Place], T | Failure]:
    def guarded_work(path: Place) -> T | Failure:
        try:
            return work(path)
        except KeymgmtError as error:
            return Failure(str(path), error)
        except OSError as error:
            return Failure(str(path), translate(error, path))

    return guarded_work


def read_models(
    found: Iterable[Place | Failure], remote: Remote | None = None
) -> Iterator[tuple[Place, UnlockPolicy] | Failure]:
    """The unlock policy of each model, from its small files; nothing of it is authenticated."""

    def read(path: Place) -> tuple[Place, UnlockPolicy]:
        with Candidate.read(path, remote) as candidate:
            return path, candidate.policy()

    if remote is not None:
        # In parallel, because most of the time each request waits for the server.
        yield from over_models(found, lambda _: read, "read")
        return
    guarded_read = guarded(read)
    for item in found:
        yield item if isinstance(item, Failure) else guarded_read(item)
