"""Other processes, and a look into this one: fork, spawn, audit events, objects, imports."""

from __future__ import annotations

import ast
import contextlib
import importlib
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import Dek, WrappedKey

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = [
    "NOT_IMPORTABLE",
    "holds",
    "imported_by",
    "in_fork",
    "in_spawn",
    "modules_of",
    "watched",
]

Task = tuple[str, str, str, WrappedKey, bytes, bytes]
NOT_IMPORTABLE: Final = "not importable"

_WATCHED: Final = {
    "open",
    "os.listdir",
    "os.scandir",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.posix_spawn",
    "ctypes.dlopen",
    "sqlite3.connect",
}
_watching: threading.local = threading.local()
_installed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    events: list[str] | None = getattr(_watching, "events", None)
    if events is not None and event in _WATCHED:
        shown = str(arguments[0])[:120] if arguments else ""
        if not shown.endswith((".py", ".pyc", ".so")):  # importing a module late is allowed
            events.append(f"{event} {shown}")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collect what this thread opens, connects to or starts (audit events, PEP 578)."""
    global _installed  # an audit hook is never removed, so there is one
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    events: list[str] = []
    _watching.events = events
    try:
        yield events
    finally:
        _watching.events = None


def in_fork(call: Callable[[], str], seconds: float) -> str:
    """Run ``call`` in a forked child and return its answer, or how the child died."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Forking with threads alive is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - the child must not return into pytest
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(write)
    try:
        if not select.select([read], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            return f"no answer within {seconds:g} seconds"
        return os.read(read, 4096).decode() or "it died"
    finally:
        os.close(read)
        os.waitpid(child, 0)


def in_spawn(task: Task, expected: bytes, seconds: float) -> str:
    """Unwrap in a new process with a provider made there; return its answer, or how it died."""
    context = multiprocessing.get_context("spawn")
    connection, child_connection = context.Pipe()
    process = context.Process(target=_spawned, args=(child_connection, *task), daemon=True)
    process.start()
    child_connection.close()
    try:
        if not connection.poll(seconds):
            return f"no answer within {seconds:g} seconds"
        answer = connection.recv()
    except EOFError:
        return "it died"
    else:
        if isinstance(answer, str):
            return answer
        return "right" if answer == expected else "unwrap() gave another key"
    finally:
        process.kill()
        process.join()
        connection.close()


def _spawned(
    connection: Connection,
    module: str,
    kind: str,
    name: str,
    wrapped: WrappedKey,
    context: bytes,
    settings: bytes,
) -> None:
    try:
        provider_made = getattr(importlib.import_module(module), kind)(name, pickle.loads(settings))  # noqa: S301 - ours
        with provider_made as provider, provider.unwrap(wrapped, context) as dek:
            connection.send(bytes(dek.view()))
    except Exception as error:  # noqa: BLE001 - reported by the check
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        text = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
        connection.send(NOT_IMPORTABLE if missing else text)


def holds(root: object, dek: Dek) -> str | None:
    """Say where under ``root`` a copy of ``dek`` is held, or None."""
    secret = bytes(dek.view())
    seen: set[int] = set()
    queue: list[tuple[str, object, int]] = [(f"<{type(root).__name__}>", root, 0)]
    while queue:
        path, item, depth = queue.pop()
        if id(item) in seen or depth > 6:
            continue
        seen.add(id(item))
        if isinstance(item, Dek):
            with contextlib.suppress(ValueError):
                if item is not dek and item == dek:
                    return path
        elif isinstance(item, bytes | bytearray | memoryview):
            with contextlib.suppress(ValueError, TypeError):
                if secret in bytes(item):
                    return path
        elif isinstance(item, dict):
            queue += [(f"{path}[{key!r:.40}]", value, depth + 1) for key, value in item.items()]
            queue += [(f"a key of {path}", key, depth + 1) for key in item]
        elif isinstance(item, list | tuple | set | frozenset):
            queue += [(f"{path}[...]", value, depth + 1) for value in item]
        elif not isinstance(item, str | int | float | type | Callable):
            queue += [
                (f"{path}.{k}", v, depth + 1) for k, v in getattr(item, "__dict__", {}).items()
            ]
    return None


def modules_of(package: str) -> list[Path]:
    """The source files of an installed package, or of a module."""
    spec = find_spec(package)
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return [path for folder in folders for path in folder.rglob("*.py")] or [Path(str(spec.origin))]


def imported_by(module: Path) -> list[str]:
    """The modules that a source file imports, in whatever line."""
    names: list[str] = []
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = node.module == "keymgmt"  # `from keymgmt import backend` names a module
            names += [f"keymgmt.{a.name}" for a in node.names] if inner else [node.module]
    return names
