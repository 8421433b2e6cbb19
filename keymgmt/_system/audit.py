"""The logger ``keymgmt.audit``: one event for each wrap, unwrap, seal, rewrap, sign and load.

An event is one line of ``name=value`` pairs, with the same pairs as a dict in the record's
attribute ``audit``. No pair is ever secret.
"""

from __future__ import annotations

import logging
import re
from typing import Final

__all__ = ["audit"]

_WORD: Final = re.compile(r"[!-~]*")
_LOGGER: Final = logging.getLogger("keymgmt.audit")
# Whoever wants the events adds a handler; without one they must not land on stderr.
_LOGGER.addHandler(logging.NullHandler())


def _one_word(value: object) -> str:
    # A file name may hold line ends and spaces, which would make one event look like two.
    text = str(value)
    return text if _WORD.fullmatch(text) else ascii(text)


def audit(event: str, *, error: BaseException | None = None, **pairs: object) -> None:
    """Log one event at INFO, or at WARNING with the class of ``error`` as its outcome."""
    level = logging.INFO if error is None else logging.WARNING
    if not _LOGGER.isEnabledFor(level):
        return
    outcome = "ok" if error is None else type(error).__name__
    fields = {"event": event, **pairs, "outcome": outcome}
    _LOGGER.log(
        level,
        "%s",
        " ".join(f"{name}={_one_word(value)}" for name, value in fields.items()),
        extra={"audit": fields},
    )
