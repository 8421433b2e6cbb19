"""What a key service's answers mean, as data: one table for each backend.

An answer is a code (a return code, a status, a word) to an operation. A table says for each whose
fault it is (the class of the error), what to say, the way out, and whether it passes: whether the
same call may succeed on a new connection or after a while. A code that no table knows is never
taken as harmless.
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
        message: what happened, in a few words that follow what was being done.
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
            faults: what a code means to any operation.
            unknown: what a code means that is not in them; the code is added to its message.
            operations: what a code means to one operation, where that differs.
        """
        self._faults = dict(faults)
        self._operations = dict(operations or {})
        self._unknown = unknown

    def __contains__(self, code: object) -> bool:
        return code in self._faults or any(known == code for _, known in self._operations)

    def find(self, code: Code, operation: str = "") -> Fault:
        """What ``code`` means in answer to ``operation``."""
        known = self._operations.get((operation, code)) or self._faults.get(code)
        return known or self._unknown

    def error(
        self, code: Code, doing: str, operation: str = "", *, shown: str = ""
    ) -> ProviderError:
        """The error for an answer; the caller raises it from the library's own.

        Args:
            code: the answer.
            doing: what was being done, in front of the message: "unwrapping with the key 'a'".
            operation: by which the table may tell two meanings of a code apart.
            shown: the code as the service's manual spells it, else ``code`` itself.
        """
        fault = self.find(code, operation)
        return fault.error(f"{doing}: {fault.message} ({shown or code})", hint=fault.hint)
