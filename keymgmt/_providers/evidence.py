"""Evidence: what a machine's hardware signs of what runs on it, now, for somebody who asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from keymgmt._providers.contract import Settings

__all__ = ["Evidence"]

S = TypeVar("S", bound="Settings")


class Evidence(ABC, Generic[S]):
    """One kind of evidence; an entry point of the group ``keymgmt.evidence`` names it.

    Making one is cheap and does no I/O. It is safe to use from several threads, and survives
    ``fork``. It raises only errors of ``keymgmt.errors``, with the system's own as ``__cause__``.

    Attributes:
        kind: its name, which a config writes: ``evidence = "sgx"``.
        Settings: the strict model of its table.
    """

    kind: ClassVar[str]
    Settings: ClassVar[type[Any]]

    def __init__(self, settings: S) -> None:
        """Keep its settings; no I/O."""
        self.settings = settings

    @abstractmethod
    def quote(self, report_data: bytes) -> bytes:
        """What proves this machine to whoever chose ``report_data``.

        Args:
            report_data: 32 bytes, which the hardware signs with the rest; where its structure has
                more room, zero bytes follow.

        Raises:
            ProviderUnavailable: this machine has no such hardware, or it did not answer.
            AccessDenied: it is there, and this user may not ask it.
        """
