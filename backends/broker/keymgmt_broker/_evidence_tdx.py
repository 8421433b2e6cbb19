"""Evidence ``tdx``: a quote of this guest, from the kernel's configfs-tsm.

Each request has a folder of its own (Documentation/ABI/testing/configfs-tsm-report). The kernel
takes what is written when the file is closed, and drops an error then. So the ``generation`` of the
folder is compared: one write, and nobody else's, lies between question and answer.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import Field

from keymgmt.backend import (
    AccessDenied,
    ConfigPath,
    Deadline,
    Evidence,
    ProviderUnavailable,
    Settings,
)
from keymgmt_broker._quote_layout import MAX_QUOTE, padded, report_data_of, write_once

__all__ = ["TsmEvidence", "TsmSettings"]

log: Final = logging.getLogger("keymgmt.broker")
_PROVIDER: Final = "tdx_guest"
_PASSING: Final = frozenset({errno.EBUSY, errno.EINTR, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT})
"""One quote is made at a time in a guest, and the host may not answer: the same may work then."""
_NONE: Final = (
    "a TDX guest with Linux 6.7 or later has it: modprobe tdx_guest, and "
    "mount -t configfs none /sys/kernel/config"
)


class TsmSettings(Settings):
    """Settings of the evidence ``tdx``.

    Attributes:
        reports: the folder in which the kernel takes requests.
        timeout: seconds within which a quote is there; the kernel itself waits 30 for the host.
    """

    reports: ConfigPath = Path("/sys/kernel/config/tsm/report")
    timeout: Annotated[float, Field(ge=0.1, le=600, strict=False)] = 45.0


class TsmEvidence(Evidence[TsmSettings]):
    """A quote of the TDX guest that this program runs in."""

    kind: ClassVar[str] = "tdx"
    Settings: ClassVar[type[TsmSettings]] = TsmSettings

    def quote(self, report_data: bytes) -> bytes:
        """A quote with these 32 bytes, and 32 zeros behind them, as its report data.

        Raises:
            ProviderUnavailable: this is no TDX guest, or there is no quote in time.
            AccessDenied: this user may not ask the kernel for quotes.
        """
        wanted, pause = padded(report_data), 0.01
        deadline = Deadline(self.settings.timeout, "the quote of this guest")
        while True:
            try:
                return deadline.run(lambda: self._once(wanted))
            except OSError as error:
                if error.errno not in _PASSING or deadline.remaining <= pause:
                    raise _translated(error, self.settings.reports) from error
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _once(self, wanted: bytes) -> bytes:
        with self._folder() as folder:
            before = _number(folder / "generation")
            write_once(folder / "inblob", wanted)
            provider = (folder / "provider").read_text().strip()
            if provider != _PROVIDER:
                raise ProviderUnavailable(
                    f"no TDX guest: {self.settings.reports} has reports of {provider[:40]!r}",
                    hint="the evidence tdx is for guests of Intel TDX",
                )
            with (folder / "outblob").open("rb") as file:
                quote = file.read(MAX_QUOTE + 1)
            written = _number(folder / "generation") - before
        # After a failure of the host the file may be empty, or have an earlier quote.
        if written != 1 or len(quote) > MAX_QUOTE or report_data_of(quote) != wanted:
            raise OSError(errno.EIO, "the quote is not the one that was asked for")
        return quote

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = self.settings.reports / f"keymgmt-{os.getpid()}-{secrets.token_hex(8)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            try:
                folder.rmdir()
            except OSError as error:
                log.warning("%s stays behind: %s", folder, error.strerror)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except ValueError as error:
        raise OSError(errno.EIO, f"{path} holds no number") from error


def _translated(error: OSError, reports: Path) -> ProviderUnavailable | AccessDenied:
    if isinstance(error, PermissionError):
        return AccessDenied(
            f"no permission to ask for quotes in {reports}",
            hint="run as root, or give the folder to a group of this user",
        )
    if isinstance(error, FileNotFoundError):
        return ProviderUnavailable(f"no TDX guest: {reports} cannot be used", hint=_NONE)
    return ProviderUnavailable(
        f"the kernel gave no quote in {reports}: {error.strerror}",
        hint="look at the host's quote generation service (qgsd), and at dmesg",
    )
