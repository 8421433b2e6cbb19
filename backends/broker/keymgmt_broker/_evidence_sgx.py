"""Evidence ``sgx``: a quote of this enclave, from the files that Gramine makes of SGX.

A quote takes two files, one written and one read, and nothing ties the two together: with threads
that do not wait for each other most quotes hold another thread's report data. So one thread of
the process at a time, whichever provider asks, and the report data is compared before the quote
is given away: another library of this enclave may use the same files.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import Field

from keymgmt.backend import (
    AccessDenied,
    ConfigPath,
    Deadline,
    Evidence,
    ForkSafe,
    ProviderUnavailable,
    Settings,
)
from keymgmt_broker._quote_layout import MAX_QUOTE, padded, report_data_of, write_once

__all__ = ["GramineEvidence", "GramineSettings"]

_TRIES: Final = 3
_HINT: Final = 'the manifest needs sgx.remote_attestation = "dcap", and the host an AESM service'


class GramineSettings(Settings):
    """Settings of the evidence ``sgx``.

    Attributes:
        user_report_data: the file to which report data is written.
        quote: the file that a quote of this enclave is then read from.
        timeout: seconds within which a quote is there, waiting for other threads included.
    """

    user_report_data: ConfigPath = Path("/dev/attestation/user_report_data")
    quote: ConfigPath = Path("/dev/attestation/quote")
    timeout: Annotated[float, Field(ge=0.1, le=600, strict=False)] = 20.0


class _Turn(ForkSafe):
    """The lock of the process; a child that Gramine forks is an enclave with files of its own."""

    def _renew(self) -> None:
        self.lock = threading.Lock()


_turn: Final = _Turn()


class GramineEvidence(Evidence[GramineSettings]):
    """A quote of the SGX enclave that Gramine runs this program in."""

    kind: ClassVar[str] = "sgx"
    Settings: ClassVar[type[GramineSettings]] = GramineSettings

    def quote(self, report_data: bytes) -> bytes:
        """A quote with these 32 bytes, and 32 zeros behind them, as its report data.

        Raises:
            ProviderUnavailable: this is not an enclave under Gramine, it makes no quotes, or not in
                time; or something else in it writes report data at the same time.
            AccessDenied: Gramine refused, and says no more than that.
        """
        wanted = padded(report_data)
        deadline = Deadline(self.settings.timeout, "the quote of this enclave")
        return deadline.run(lambda: self._in_turn(wanted, deadline))

    def _in_turn(self, wanted: bytes, deadline: Deadline) -> bytes:
        with deadline.hold(_turn.lock):
            for _ in range(_TRIES):
                quote = self._read(wanted)
                if report_data_of(quote) == wanted:
                    return quote
        raise ProviderUnavailable(
            f"{self.settings.quote} does not hold the report data that was written for it",
            hint="something else in this enclave writes to "
            f"{self.settings.user_report_data}: let one program use it",
        )

    def _read(self, wanted: bytes) -> bytes:
        path = self.settings.user_report_data
        try:
            write_once(path, wanted)
            path = self.settings.quote
            with path.open("rb") as file:
                quote = file.read(MAX_QUOTE + 1)
        except FileNotFoundError as error:
            raise ProviderUnavailable(f"no enclave: there is no {path}", hint=_HINT) from error
        except PermissionError as error:
            raise AccessDenied(f"Gramine refused the use of {path}", hint=_HINT) from error
        except OSError as error:
            reason = f"cannot use {path}: {error.strerror}"
            raise ProviderUnavailable(reason, hint=_HINT) from error
        if len(quote) > MAX_QUOTE:
            raise ProviderUnavailable(f"{path} holds more than {MAX_QUOTE} bytes, and no quote")
        return quote
