"""A PKCS#11 library in this process: loaded once, initialised with locking, safe across fork.

Rules:
- One C_Initialize for each file and process, whoever asks, with CKF_OS_LOCKING_OK: without it a
  module may switch its mutexes off, and two threads crash the process. A module that cannot lock,
  or that somebody else initialised in a way that we cannot see, is called by one thread at a time.
- Every call is counted. A fork waits for calls in flight, for a mutex that is held inside the
  module would stay held in the child for ever. The child starts anew: PKCS#11 wants C_Initialize
  there, and handles of the parent are not used.
- It is never finalised at the end, since others may use it; only to find a lost token again, and
  only if we initialised it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import _pkcs11

from keymgmt.backend import ConfigError
from keymgmt_pkcs11._cryptoki import CkError, Cryptoki
from keymgmt_pkcs11._errors import translate

if TYPE_CHECKING:
    from pkcs11 import Slot

__all__ = ["Module", "open_module"]

FORK_WAIT: Final = 2.0
_USUAL: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so",
    "/usr/lib64/opensc-pkcs11.so",
    "/opt/cloudhsm/lib/libcloudhsm_pkcs11.so",
    "/opt/nfast/toolkits/pkcs11/libcknfast.so",
    "/usr/safenet/lunaclient/lib/libCryptoki2_64.so",
    "/usr/lib/x86_64-linux-gnu/pkcs11/yubihsm_pkcs11.so",
    "/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1",
)


class _Library(_pkcs11.lib):
    """python-pkcs11's library, which finds the module initialised by us."""

    def initialize(self) -> None:
        """Do nothing: python-pkcs11 would call C_Initialize(NULL)."""


class _Gate:
    """Counts calls in flight in all modules, so that fork and C_Finalize find none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._busy = 0
        self._closers = 0

    @contextlib.contextmanager
    def call(self) -> Iterator[_Ticket]:
        ticket = _Ticket(self)
        with self._condition:
            self._condition.wait_for(lambda: not self._closers)
            self._busy += 1
        try:
            yield ticket
        finally:
            ticket.give_back()

    def leave(self) -> None:
        with self._condition:
            self._busy -= 1
            if not self._busy:
                self._condition.notify_all()

    def close(self, seconds: float) -> tuple[bool, bool]:
        """Let no call begin, and wait for those in flight.

        Returns:
            Whether it is closed, in which case the caller opens it, and whether nothing is in
            flight any more.
        """
        deadline = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            return False, False
        self._closers += 1
        left = max(0.0, deadline - time.monotonic())
        return True, self._condition.wait_for(lambda: not self._busy, left)

    def open(self) -> None:
        """Undo ``close``, in the thread that closed it."""
        self._closers -= 1
        self._condition.notify_all()
        self._lock.release()


class _Ticket:
    """One call in flight; given back once, by whoever is first."""

    def __init__(self, gate: _Gate) -> None:
        self._gate: _Gate | None = gate

    def give_back(self) -> None:
        # dict.pop is atomic, so that a call abandoned as it ends is counted once.
        gate = self.__dict__.pop("_gate", None)
        if gate is not None:
            gate.leave()


class Module:
    """One library, initialised; made by ``open_module``.

    Attributes:
        path: the real path of the file.
        cryptoki: the calls that we make ourselves.
        library: python-pkcs11's view of it.
        generation: grows with every C_Initialize; handles of an older one are void.
        ours: whether we initialised it.
        locking: whether several threads may call it at once.
    """

    def __init__(self, path: str, init_args: str | None, *, forked: bool) -> None:
        self.path = path
        self.init_args = init_args
        try:
            self.cryptoki = Cryptoki(path)
        except OSError as error:
            raise ConfigError(
                f"cannot load the PKCS#11 module {path}: {error}",
                hint="name the library of your HSM for this kind of machine and its dependencies",
            ) from error
        except (AttributeError, CkError) as error:
            raise ConfigError(
                f"{path} is a library, but no PKCS#11 module: it gives no function list",
                hint=_usual(),
            ) from error
        self.generation = 0
        self.ours = True
        self.locking = True
        self._serial = threading.Lock()
        self._initialize(forked=forked)
        self.library: Any = _Library(path)

    def _initialize(self, *, forked: bool) -> None:
        try:
            try:
                self._ask(forked)
            except CkError as error:
                if error.reason != "CantLock":
                    raise
                self.locking = False
                self.cryptoki.initialize(self.init_args, locking=False)
        except CkError as error:
            raise translate(error, f"initialising {self.path}") from error
        self.generation += 1
        self._since = time.monotonic()

    def _ask(self, forked: bool) -> None:
        try:
            self.cryptoki.initialize(self.init_args, locking=True)
        except CkError as error:
            if error.reason != "CryptokiAlreadyInitialized":
                raise
            if forked:
                # What the child inherited is our parent's, and its handles are not used here.
                self.cryptoki.finalize()
                self.cryptoki.initialize(self.init_args, locking=True)
            else:
                self.ours = self.locking = False

    @contextlib.contextmanager
    def call(self) -> Iterator[_Ticket]:
        """Hold while calling the module; the ticket lets an abandoned call be counted out."""
        with contextlib.nullcontext() if self.locking else self._serial, _gate.call() as ticket:
            yield ticket

    def restart(self, seen: int, *, settled: float = 0.0) -> bool:
        """Finalise and initialise again, unless somebody did since generation ``seen``.

        For a module that looks for its tokens only then. Whether it was done by anybody; not
        while a call is in flight, nor within ``settled`` seconds of the last time, nor for a
        module that others initialised.
        """
        if not self.ours or time.monotonic() < self._since + settled:
            return False
        closed, idle = _gate.close(FORK_WAIT)
        try:
            if not idle:
                return False
            if self.generation == seen:
                with contextlib.suppress(CkError):
                    self.cryptoki.finalize()
                self._initialize(forked=False)
            return True
        finally:
            if closed:
                _gate.open()

    def slots(self) -> list[Slot]:
        """Slots with a token in them."""
        found: list[Slot] = self.library.get_slots(token_present=True)
        return found


_gate = _Gate()
_forking = threading.local()
_lock = threading.Lock()
_modules: dict[str, Module] = {}
_inherited: set[str] = set()


def open_module(path: Path, init_args: str | None) -> Module:
    """The module at ``path``, initialised once in this process.

    Raises:
        ConfigError: no such file, no PKCS#11 module, or open with other ``init_args``.
        ProviderUnavailable: it does not initialise.
    """
    real = os.path.realpath(path)
    if not Path(real).is_file():
        raise ConfigError(f"no PKCS#11 module at {path}", hint=_usual())
    with _lock:
        module = _modules.get(real)
        if module is None:
            module = Module(real, init_args, forked=real in _inherited)
            _modules[real] = module
        elif module.init_args != init_args:
            raise ConfigError(
                f"the module {path} is open with other init_args in this process",
                hint="give every provider of one module the same init_args",
            )
        return module


def _usual() -> str:
    found = [path for path in _USUAL if Path(path).is_file()]
    return f"here are: {', '.join(found)}" if found else "install your HSM's PKCS#11 library"


def _before_fork() -> None:
    # Should a call hang, the child may find a mutex of that module held; the parent goes on.
    _forking.closed, _ = _gate.close(FORK_WAIT)


def _in_parent() -> None:
    if _forking.closed:
        _gate.open()


def _in_child() -> None:
    global _gate, _lock
    _gate, _lock = _Gate(), threading.Lock()
    _inherited.update(path for path, module in _modules.items() if module.ours)
    _modules.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
