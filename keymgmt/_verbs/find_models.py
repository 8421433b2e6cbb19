"""Many sealed models below some folders: every one found once, and worked on in parallel.

What could not be looked at is told as a Failure: not seen is not the same as not there.
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

from keymgmt._remote.location import need_folder
from keymgmt._system.files import target_of
from keymgmt._trust.candidate import Candidate
from keymgmt.errors import ConfigError, KeymgmtError, SealedModelError
from keymgmt.sealed.folder import KEYS, MANIFEST, PAYLOAD, SIGNATURES
from keymgmt.sealed.manifest import MAX_MANIFEST

if TYPE_CHECKING:
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = [
    "Failure",
    "Link",
    "Shard",
    "find_models",
    "guarded",
    "is_model",
    "over_models",
    "read_models",
]

CHUNK: Final = 128
_THREADS: Final = 8
_OURS: Final = b'"keymgmt-'
_NAME: Final = operator.attrgetter("name")
T = TypeVar("T")
Trees = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Failure:
    """A model, or folder, of a tree with which something was wrong."""

    path: str
    error: KeymgmtError

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {"path": self.path, "error": self.error.to_json()}


@dataclass(frozen=True)
class Link:
    """A symbolic link of a tree to a folder, which was followed, and where it leads."""

    path: str
    target: str


@dataclass(frozen=True)
class Shard:
    """One of several parts of a tree, into which its models fall by their paths.

    A model is in the part ``1 + h mod count``, where h is the number that the first 8 bytes of the
    SHA-256 of its path are, big-endian, and the path is that of its folder below the tree.

    Attributes:
        number: which part, from 1.
        count: how many there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/8``; ConfigError where it is not that."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"{text[:40]!r} is no part of a tree",
                hint="the first of eight parts is 1/8, and the last is 8/8",
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, tree: Path, path: Path) -> bool:
        """Whether a folder of the tree is in this part."""
        digest = hashlib.sha256(os.fsencode(path.relative_to(tree))).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


def find_models(
    trees: Trees, links: list[Link] | None = None, shard: Shard | None = None
) -> Iterator[Path | Failure]:
    """Every sealed model at or below the ``trees``, each once, however many ways lead to it.

    Links to folders are followed, and told in ``links``. A Failure is a folder that cannot be read,
    a link that leads nowhere, and a tree without any model. A folder counts as a model also where
    half of it is missing or damaged, so that whoever opens it finds out; one model may lie inside
    of another. A ``manifest.json`` of some other program hides nothing. With a ``shard`` only what
    falls into it, and what is wrong with a tree as a whole.
    """
    seen: set[tuple[int, int]] = set()
    links = links if links is not None else []
    for tree in map(Path, [trees] if isinstance(trees, (str, os.PathLike)) else trees):
        try:
            need_folder(tree)
        except ConfigError as error:
            yield Failure(str(tree), error)
            continue
        found = False
        for item in _walk(tree, seen, links, frozenset(seen)):
            found = True
            if item is not None and (shard is None or _is_in(shard, tree, item)):
                yield item
        if not found:
            message = f"there is no sealed model at or below {tree}"
            yield Failure(str(tree), ConfigError(message, hint="is this the right folder?"))


def _is_in(shard: Shard, tree: Path, item: Path | Failure) -> bool:
    if isinstance(item, Path):
        return shard.has(tree, item)
    # What is wrong with the tree as a whole is wrong with every part.
    return Path(item.path) == tree or shard.has(tree, Path(item.path))


def _walk(
    tree: Path, seen: set[tuple[int, int]], links: list[Link], before: frozenset[tuple[int, int]]
) -> Iterator[Path | Failure | None]:
    """What is at or below ``tree``; None for a folder that an earlier tree, in ``before``, had."""
    # Not os.walk, which recurses: folders may be nested deeper than Python's stack. Texts and not
    # Paths, since a folder may hold a million models.
    waiting = [str(tree)]
    while waiting:
        folder = waiting.pop()
        try:
            info = os.stat(folder)  # noqa: PTH116 - a text
            place = (info.st_dev, info.st_ino)
            if place in seen:
                if place in before:
                    yield None
                continue
            with os.scandir(folder) as entries:
                found = sorted(entries, key=_NAME, reverse=True)
        except OSError as error:
            # A tree that is not there was named wrongly; a folder in it may be damaged.
            kind = ConfigError if folder == str(tree) else SealedModelError
            yield _unreadable(Path(folder), error, kind)
            continue
        below = []
        for entry in found:
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                if entry.is_symlink():
                    # Unlike DirEntry.is_dir, this fails where a link leads nowhere.
                    is_folder = stat.S_ISDIR(entry.stat().st_mode)
                    if is_folder:
                        links.append(Link(str(Path(entry.path)), os.path.realpath(entry.path)))
            except OSError as error:
                yield _unreadable(Path(entry.path), error)
                continue
            if is_folder:
                below.append(entry.path)
        model = _is_model(Path(folder), {entry.name for entry in found})
        if model or below:
            # Nothing is lost by looking twice at a folder with nothing in it, and there are many.
            seen.add(place)
        if model:
            yield Path(folder)
        waiting += below


def _unreadable(path: Path, error: OSError, kind: type[KeymgmtError] = SealedModelError) -> Failure:
    what = "follow the link" if os.path.islink(path) else "read"  # noqa: PTH114 - raises never
    return Failure(str(path), kind(f"cannot {what} {path}: {error.strerror}"))


def is_model(folder: Path) -> bool:
    """Whether a folder is a sealed model's, or what is left of one; yes where nobody can look."""
    try:
        return _is_model(folder, {entry.name for entry in folder.iterdir()})
    except OSError:
        return True


def _is_model(folder: Path, names: set[str]) -> bool:
    ours = names & {MANIFEST, KEYS, SIGNATURES, PAYLOAD}
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
    """Whether a file is of our format; yes where it cannot be read, as then nobody knows."""
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
        # Cut off where the format is not yet written, or of another program?
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


def over_models(
    found: Iterable[Path | Failure],
    prepare: Callable[[Sequence[Path]], Callable[[Path], T]],
    doing: str,
    *,
    threads: int = _THREADS,
) -> Iterator[T | Failure]:
    """Work on many models in parallel, and tell of each as it is done.

    What goes wrong with one is a Failure and stops no other.

    Args:
        found: the models, and what was wrong with finding them.
        prepare: makes of some models at once what is done with each of them.
        doing: the verb, for messages.
        threads: how many models at once.
    """
    found = iter(found)
    with ThreadPoolExecutor(threads, f"keymgmt {doing}") as pool:
        while chunk := list(itertools.islice(found, CHUNK)):
            yield from (item for item in chunk if isinstance(item, Failure))
            paths = [item for item in chunk if isinstance(item, Path)]
            yield from pool.map(guarded(prepare(paths), doing), paths)


def guarded(work: Callable[[Path], T], doing: str) -> Callable[[Path], T | Failure]:
    def one(path: Path) -> T | Failure:
        try:
            return work(path)
        except KeymgmtError as error:
            return Failure(str(path), error)
        except OSError as error:
            message = f"cannot {doing} {path}: {error.strerror}"
            return Failure(str(path), SealedModelError(message))

    return one


def read_models(found: Iterable[Path | Failure]) -> Iterator[tuple[Path, UnlockPolicy] | Failure]:
    """Who may open each model, from its small files alone; nothing of it is authenticated."""

    def read(path: Path) -> tuple[Path, UnlockPolicy]:
        with Candidate.read(path) as candidate:
            return path, candidate.policy()

    one = guarded(read, "read")
    for item in found:
        yield item if isinstance(item, Failure) else one(item)
