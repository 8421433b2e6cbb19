"""A PKCS#11 library in this process: loaded once, initialised with locking, safe across fork.

Rules:
- One C_Initialize for each file and process, whichever provider asks, with CKF_OS_LOCKING_OK:
  without it a module may switch its mutexes off, and two threads crash the process. A module that
  cannot lock, or that other code initialised with flags that cannot be read back, is called by one
  thread at a time.
- Every call is counted. A fork waits for calls in flight, since a mutex that is held inside the
  module would stay held in the child for ever. PKCS#11 requires the child to call C_Initialize
  again; handles of the parent are not used there.
- A module is not finalised at the end of the process, since other code may use it. It is finalised
  only to find a lost token again, and only if this package initialised it.
- Two modules share nothing here, so a module that hangs does not delay another.
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
"""Seconds before the next C_Finalize, by how many had no success; the last one repeats."""
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
    """One call that a module has not answered yet: added to a set on entry, and removed once.

    Python adds to a set and removes from it atomically, so a lock is needed only while a fork or a
    restart holds calls up. To miss none, a call adds itself before it looks for holders, and a
    holder announces itself before it counts the calls.
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
        """Remove the call from the set: it was answered, or it is given up."""
        module = self._module
        module._in_flight.discard(self)
        if module._holders:
            with module._state:
                module._state.notify_all()


_UNCONFIGURED: Final = (
    "see whether this user may read the module's own configuration, and what that names; SoftHSM's "
    "is the file that SOFTHSM2_CONF names, or /etc/softhsm/softhsm2.conf"
)


class Module(ForkSafe):
    """One library; ``open_module`` gives it.

    Attributes:
        path: the real path of the file.
        cryptoki: its functions; set when ``start`` has returned.
        info: the module's own description.
        quirks: its known differences from the standard.
        generation: grows with every C_Initialize; handles of an older generation are void.
        ours: whether this package initialised it.
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
        """Load and initialise the library, unless that was done in this process.

        Raises:
            ProviderUnavailable: it cannot be loaded, is not a PKCS#11 module, or does not
                initialise.
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
                hint="see whether the library is for this kind of machine, and whether all "
                "libraries that it needs are installed",
            ) from error
        except (AttributeError, CkError) as error:
            raise ProviderUnavailable(
                f"{self.path} is a library, but not a PKCS#11 module: it gives no function list",
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
            translated = translate(error, f"initialising {self.path}")
            raise type(translated)(str(translated), hint=_UNCONFIGURED) from error
        self.generation += 1
        self._since = time.monotonic()

    def _initialize_once(self) -> None:
        try:
            self.cryptoki.initialize(self.init_args, locking=True)
        except CkError as error:
            if error.code != Ckr.CRYPTOKI_ALREADY_INITIALIZED:
                raise
            if self._inherited:
                # The child inherited the initialised state of its parent, which is of no use here.
                self.cryptoki.finalize()
                self.cryptoki.initialize(self.init_args, locking=True)
            else:
                self.ours = self.locking = False

    def call(self) -> CallInFlight:
        """A context manager around each call of the module."""
        return CallInFlight(self)

    def _hold(self, seconds: float) -> tuple[bool, bool]:
        """Let no call begin, and wait for the calls in flight.

        Returns:
            Whether calls are held up now, so that ``_let_go`` must follow; and whether all calls in
            flight have ended.
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
        # If a call hangs, the fork happens anyway, and the child may find a mutex of the module
        # held.
        held, _ = self._hold(IDLE_WAIT)
        self._held = held or self._held

    def _after_fork(self) -> None:
        if self._held:
            self._held = False
            self._let_go()

    def restart(self, seen: int) -> bool:
        """C_Finalize and C_Initialize, unless another thread did so since generation ``seen``.

        For modules that look for their tokens, or connect to their HSM, only in C_Initialize.

        Returns:
            Whether the module was restarted, by any thread. It is not restarted if other code
            initialised it, since the sessions of that code would end; nor while a call is in
            flight; nor within ``RESTART_PAUSES`` of the last time.
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
"""The modules of this process, by real path."""


def open_module(path: Path, init_args: str | None) -> Module:
    """The module at ``path``, initialised once in this process.

    Raises:
        ProviderUnavailable: there is no such file, it is not a PKCS#11 module, or it does not
            initialise.
        ConfigError: the module is open with other ``init_args``.
    """
    real = os.path.realpath(path)
    if not Path(real).is_file():
        raise ProviderUnavailable(f"no PKCS#11 module at {path}", hint=_usual())
    # dict.setdefault is atomic, so all threads get the same Module.
    module = _modules.get(real) or _modules.setdefault(real, Module(real, init_args))
    if module.init_args != init_args:
        raise ConfigError(
            f"the module {path} is open with other init_args in this process",
            hint="give every provider of one module the same init_args",
        )
    module.start()
    return module


def _usual() -> str:
    present = [path for path in _USUAL if Path(path).is_file()]
    if present:
        return f"modules on this machine: {', '.join(present)}"
    return "install your HSM's PKCS#11 library"
