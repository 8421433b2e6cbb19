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
- Nothing here is shared by two modules, so one that hangs does not hold another up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt.backend import ConfigError, ForkSafe, ProviderUnavailable
from keymgmt_pkcs11._cryptoki import Cryptoki, LibraryInfo
from keymgmt_pkcs11._errors import CkError, Ckr, translate
from keymgmt_pkcs11._quirks import Quirks, quirks_of

if TYPE_CHECKING:
    from typing import Self

__all__ = ["CallInFlight", "Module", "open_module"]

IDLE_WAIT: Final = 2.0
"""Seconds that a fork or a C_Finalize waits for calls in flight."""
RESTART_PAUSES: Final = (0.0, 0.0, 0.0, 1.0, 2.0, 4.0)
"""Seconds until the next C_Finalize, by how many brought nothing; the last is for all more."""
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


class CallInFlight:
    """One call that a module has not answered yet; counted in on entry, and out once.

    A set changes in one step, so a lock is wanted only where somebody holds calls up: whoever
    begins says so before it looks for that, and whoever holds up says so before it counts.
    """

    __slots__ = ("_module", "_serial")

    def __init__(self, module: Module) -> None:
        self._module = module
        self._serial = None if module.locking else module._serial

    def __enter__(self) -> Self:
        module = self._module
        if self._serial is not None:
            self._serial.acquire()
        module._in_flight.add(self)
        if module._holders:
            self.end()
            with module._state:
                while module._holders:
                    module._state.wait()
                module._in_flight.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._serial is not None:
            self._serial.release()

    def end(self) -> None:
        """Count it out: it was answered, or it is given up."""
        module = self._module
        module._in_flight.discard(self)
        if module._holders:
            with module._state:
                module._state.notify_all()


class Module(ForkSafe):
    """One library; made by ``open_module``.

    Attributes:
        path: the real path of the file.
        cryptoki: its functions; there once ``start`` came back.
        info: what it says of itself.
        quirks: what is known to be different about it.
        generation: grows with every C_Initialize; handles of an older one are void.
        ours: whether we initialised it.
        locking: whether several threads may call it at once.
        in_vain: how often it was restarted since a call last succeeded.
    """

    cryptoki: Cryptoki
    info: LibraryInfo
    quirks: Quirks

    def __init__(self, path: str, init_args: str | None) -> None:
        self.path = path
        self.init_args = init_args
        self.generation = 0
        self.ours = self.locking = True
        self.in_vain = 0
        self._loaded = self._ready = False
        super().__init__()

    def _renew(self) -> None:
        self._inherited = self._ready and self.ours
        self._ready = False
        self._starting = threading.Lock()
        self._serial = threading.Lock()
        self._state = threading.Condition(threading.Lock())
        self._in_flight: set[CallInFlight] = set()
        self._holders = 0
        self._held = False

    def start(self) -> None:
        """Load and initialise it, unless that was done in this process.

        Raises:
            ProviderUnavailable: it cannot be loaded, is no PKCS#11 module, or does not initialise.
        """
        if self._ready:
            return
        with self._starting:
            if not self._ready:
                self._load()
                self._initialize()
                self._ready = True

    def _load(self) -> None:
        if self._loaded:
            return
        try:
            self.cryptoki = Cryptoki(self.path)
        except OSError as error:
            raise ProviderUnavailable(
                f"cannot load the PKCS#11 module {self.path}: {error}",
                hint="name the library of your HSM for this kind of machine and its dependencies",
            ) from error
        except (AttributeError, CkError) as error:
            raise ProviderUnavailable(
                f"{self.path} is a library, but no PKCS#11 module: it gives no function list",
                hint=_usual(),
            ) from error
        self._loaded = True

    def _initialize(self) -> None:
        try:
            try:
                self._initialize_once()
            except CkError as error:
                if error.code != Ckr.CANT_LOCK:
                    raise
                self.locking = False
                self.cryptoki.initialize(self.init_args, locking=False)
            self.info = self.cryptoki.info()
            self.quirks = quirks_of(self.info)
            if self.quirks.one_at_a_time:
                self.locking = False
        except CkError as error:
            raise translate(error, f"initialising {self.path}") from error
        self.generation += 1
        self._since = time.monotonic()

    def _initialize_once(self) -> None:
        try:
            self.cryptoki.initialize(self.init_args, locking=True)
        except CkError as error:
            if error.code != Ckr.CRYPTOKI_ALREADY_INITIALIZED:
                raise
            if self._inherited:
                # What the child inherited is our parent's, and its handles are not used here.
                self.cryptoki.finalize()
                self.cryptoki.initialize(self.init_args, locking=True)
            else:
                self.ours = self.locking = False

    def call(self) -> CallInFlight:
        """Hold while calling the module."""
        return CallInFlight(self)

    def _hold(self, seconds: float) -> tuple[bool, bool]:
        """Let no call begin, and wait for those in flight.

        Returns:
            Whether calls are held up, in which case ``_let_go`` follows, and whether none is in
            flight any more.
        """
        end = time.monotonic() + seconds
        if not self._state.acquire(timeout=seconds):
            return False, False
        self._holders += 1
        left = max(0.0, end - time.monotonic())
        return True, self._state.wait_for(lambda: not self._in_flight, left)

    def _let_go(self) -> None:
        self._holders -= 1
        self._state.notify_all()
        self._state.release()

    def _before_fork(self) -> None:
        # Should a call hang, the child may find a mutex of that module held; the parent goes on.
        held, _ = self._hold(IDLE_WAIT)
        self._held = held or self._held

    def _after_fork(self) -> None:
        if self._held:
            self._held = False
            self._let_go()

    def restart(self, seen: int) -> bool:
        """C_Finalize and C_Initialize, unless somebody did so since generation ``seen``.

        For a module that looks for its tokens, or connects to its HSM, only then.

        Returns:
            Whether it was done, by anybody. Not for a module that others initialised, since their
            sessions would end; nor while a call is in flight, nor again and again.
        """
        pause = RESTART_PAUSES[min(self.in_vain, len(RESTART_PAUSES) - 1)]
        if not self.ours or time.monotonic() < self._since + pause:
            return False
        held, idle = self._hold(IDLE_WAIT)
        try:
            if not idle:
                return False
            if self.generation == seen:
                with contextlib.suppress(CkError):
                    self.cryptoki.finalize()
                self.in_vain += 1
                self._initialize()
            return True
        finally:
            if held:
                self._let_go()


_modules: Final[dict[str, Module]] = {}
"""Those of this process, by real path."""


def open_module(path: Path, init_args: str | None) -> Module:
    """The module at ``path``, initialised once in this process.

    Raises:
        ProviderUnavailable: no such file, no PKCS#11 module, or it does not initialise.
        ConfigError: it is open with other ``init_args``.
    """
    real = os.path.realpath(path)
    if not Path(real).is_file():
        raise ProviderUnavailable(f"no PKCS#11 module at {path}", hint=_usual())
    # dict.setdefault is atomic, so that there is one for all threads.
    module = _modules.get(real) or _modules.setdefault(real, Module(real, init_args))
    if module.init_args != init_args:
        raise ConfigError(
            f"the module {path} is open with other init_args in this process",
            hint="give every provider of one module the same init_args",
        )
    module.start()
    return module


def _usual() -> str:
    found = [path for path in _USUAL if Path(path).is_file()]
    return f"here are: {', '.join(found)}" if found else "install your HSM's PKCS#11 library"
