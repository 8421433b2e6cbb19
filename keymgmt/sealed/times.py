"""Times in a sealed model: UTC, whole seconds, one spelling, so that texts compare as times do."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from keymgmt.errors import FormatError

__all__ = ["check_time", "is_time", "utc_text"]

_TIME: Final = re.compile(
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ", re.ASCII
)


def is_time(text: str) -> bool:
    """Whether ``text`` is ``YYYY-MM-DDThh:mm:ssZ`` in ASCII digits, each part in its range."""
    return bool(_TIME.fullmatch(text))


def check_time(text: str | None, label: str) -> None:
    """FormatError unless ``text`` is a time as ``is_time`` describes, or None."""
    if text is not None and not is_time(text):
        raise FormatError(f"{label} is not a UTC time in seconds")


def utc_text(moment: datetime | None = None) -> str:
    """The text of a moment, by default of now."""
    return (moment or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
