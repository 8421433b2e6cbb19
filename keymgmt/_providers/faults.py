"""The meaning of a key service's answers, as data: one table for each backend.

An answer is a code (a return code, a status, a word) to an operation. For each code a table says
whose fault it is (the class of the error), the message, the way out, and whether the fault is
passing: whether the same call may succeed on a new connection or after a while. A code that no
table has is never taken as harmless.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from keymgmt.errors import ProviderError

__all__ = ["Fault", "FaultTable"]

Code = TypeVar("Code", bound=Hashable)


@dataclass(frozen=True)
class Fault:
    """The meaning of one answer.

    Attributes:
        error: whose fault it is: a class of ``keymgmt.errors``.
        message: what happened, in a few words that follow the words for the operation.
        hint: the way out.
        passing: whether the same call may succeed on a new connection, another node or later.
    """

    error: type[ProviderError]
    message: str
    hint: str | None = None
    passing: bool = False


class FaultTable(Generic[Code]):
    """The faults of one backend: by operation and code, else by code alone."""

    def __init__(
        self,
        faults: Mapping[Code, Fault],
        *,
        unknown: Fault,
        operations: Mapping[tuple[str, Code], Fault] | None = None,
    ) -> None:
        """Keep the tables.

        Args:
            faults: the meaning of a code after any operation.
            unknown: the meaning of a code that is in neither table; the code is in the message.
            operations: the meaning of a code after one operation, where that differs.
        """
        self._faults = dict(faults)
        self._operations = dict(operations or {})
        self._unknown = unknown

    def __contains__(self, code: object) -> bool:
        return code in self._faults or any(known == code for _, known in self._operations)

    def find(self, code: Code, operation: str = "") -> Fault:
        """The meaning of ``code`` as the answer to ``operation``."""
        fault = self._operations.get((operation, code)) or self._faults.get(code)
        return fault or self._unknown

    def error(
        self, code: Code, doing: str, operation: str = "", *, shown: str = ""
    ) -> ProviderError:
        """The error for an answer; the caller raises it ``from`` the error of its library.

        Args:
            code: the answer.
            doing: words for the operation, in front of the message: "unwrapping with the key 'a'".
            operation: the operation, by which the table tells two meanings of a code apart.
            shown: the code as the service's manual spells it, else ``code`` itself.
        """
        fault = self.find(code, operation)
        message = f"{doing}: {fault.message} ({shown or code})"
        return fault.error(message, hint=fault.hint, passing=fault.passing)
