"""One connection to a TPM, on which every wait ends at a deadline.

Strategy: libtss2 waits for a TPM without end, so its TCTI is used from a thread that can be left
behind. ESAPI talks to a TCTI in Python (``Line``) that hands each command to that thread and waits
for it until the deadline. When the time is over ESAPI gets an error and can be closed safely; the
thread closes the TCTI itself, should the TPM ever answer. A connection serves one operation:
nothing is held between operations, so a fork, a restart or a resource manager harms nothing.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from keymgmt.backend import AccessDenied, ConfigError, ProviderUnavailable
from keymgmt_tpm2._errors import TpmError

# libtss2 prints every refusal of the TPM on stderr, even those that are answers here.
os.environ.setdefault("TSS2_LOG", "all+NONE")
try:
    from tpm2_pytss import ESAPI, TSS2_Exception
    from tpm2_pytss.TCTI import PyTCTI
    from tpm2_pytss.TCTILdr import TCTILdr
except ImportError as error:
    raise ConfigError(
        f"the TPM libraries are not usable: {error}",
        hint="Debian: apt-get install libtss2-esys-3.0.2-0 libtss2-tctildr0 libtss2-fapi1; "
        "then pip install --force-reinstall tpm2-pytss",
    ) from error

__all__ = ["Connection", "TimeLimit", "is_resource_managed"]

_RESPONSE: Final = 4096
Job = Callable[[], Any] | None
Result = tuple[Any, BaseException | None]


class TimeLimit(Exception):
    """The TPM did not answer before the deadline."""


def is_resource_managed(tcti: str) -> bool:
    """Whether somebody behind this TCTI frees what a client leaves behind."""
    return tcti.startswith(("device:/dev/tpmrm", "tabrmd"))


def look_for_device(tcti: str) -> None:
    """Say plainly why a device cannot be used, which libtss2 does not.

    Raises:
        ProviderUnavailable: it is not there.
        AccessDenied: this user may not use it.
    """
    kind, _, conf = tcti.partition(":")
    if kind != "device":
        return
    path = Path(conf)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ProviderUnavailable(
            f"no TPM: {path} does not exist",
            hint="turn the TPM on in the firmware's setup, or name another tcti",
        ) from error
    except OSError as error:
        raise AccessDenied(f"no permission to look at {path}") from error
    if not stat.S_ISCHR(mode):
        raise ConfigError(f"{path} is no device")
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        raise AccessDenied(
            f"no permission to use {path}",
            hint="add this user to the device's group, tss on most systems",
        )


def _serve(jobs: queue.SimpleQueue[Job], results: queue.SimpleQueue[Result]) -> None:
    opened: list[Any] = []
    while (job := jobs.get()) is not None:
        try:
            value = job()
            if isinstance(value, TCTILdr):
                opened.append(value)
            results.put((value, None))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            results.put((None, error))
    for tcti in opened:
        tcti.close()


class Line(PyTCTI):  # type: ignore[misc]
    """A TCTI in Python that forwards to a TCTI of libtss2 and waits no longer than it may."""

    def __init__(self, tcti: str, seconds: float) -> None:
        self.failure: BaseException | None = None
        self._deadline = time.monotonic() + seconds
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._jobs, self._results), name="keymgmt tpm", daemon=True
        )
        self._thread.start()
        try:
            self._inner = self._run(lambda: TCTILdr.parse(tcti))
        except BaseException:
            self.close()
            raise
        super().__init__()

    def _run(self, job: Callable[[], Any]) -> Any:
        if self.failure is not None:
            raise self.failure
        self._jobs.put(job)
        try:
            value, error = self._results.get(timeout=max(0.0, self.left()))
        except queue.Empty:
            value, error = None, TimeLimit()
        except BaseException as interrupt:
            self.failure = interrupt
            raise
        if error is not None:
            # ESAPI passes on a number only, so the reason is kept here.
            self.failure = error
            raise error
        return value

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def close(self) -> None:
        """Let the thread end; where it is stuck, it closes the TCTI when it comes back."""
        self._jobs.put(None)
        if self.failure is None:
            # Closed before we return, so that a fork now inherits no connection.
            self._thread.join(1.0)

    def _called_back(self, job: Callable[[], Any]) -> Any:
        try:
            return self._run(job)
        except Exception:
            raise
        except BaseException:  # noqa: BLE001 - kept in `failure`
            # Nothing but an Exception crosses C: after an interrupt, ESAPI would see success and
            # read an empty response. It is raised again for whoever called ESAPI.
            raise RuntimeError("interrupted") from None

    def do_transmit(self, command: bytes) -> None:
        """See PyTCTI."""
        self._called_back(lambda: self._inner.transmit(command))

    def do_receive(self, timeout: int) -> bytes:
        """See PyTCTI; the deadline takes the place of ``timeout``."""
        del timeout
        response: bytes = self._called_back(lambda: self._inner.receive(size=_RESPONSE))
        return response


class Connection:
    """ESAPI over a ``Line``; whoever makes it closes it.

    Raises:
        TimeLimit: the TPM did not answer in time, now or in any later call.
        TpmError: not reached.
    """

    def __init__(self, tcti: str, seconds: float) -> None:
        look_for_device(tcti)
        self._esapi = None
        self._line = None
        try:
            self._line = Line(tcti, seconds)
            self._esapi = ESAPI(self._line)
        except TSS2_Exception as error:
            self.close()
            raise self._reason(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether no command has been cut off."""
        return self._line is not None and self._line.failure is None

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._line.left() if self._line else 0.0

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a function of ESAPI by its name.

        What it returns must stay referenced while parts of it are read: a chained read returns
        freed memory.

        Raises:
            TpmError: a response code that is not success, or a line that broke.
            TimeLimit: no answer before the deadline.
        """
        if not self.alive:
            raise TpmError(0xA000A)
        try:
            return getattr(self._esapi, name)(*args, **options)
        except TSS2_Exception as error:
            raise self._reason(error) from error

    def _reason(self, error: TSS2_Exception) -> BaseException:
        failure = self._line.failure if self._line else None
        if failure is None:
            return TpmError(int(error.rc))
        if isinstance(failure, TSS2_Exception):
            return TpmError(int(failure.rc))
        return failure

    def close(self) -> None:
        """Close ESAPI, and leave the line to its thread."""
        if self._esapi is not None:
            self._esapi.close()
            self._esapi = None
        if self._line is not None:
            self._line.close()
