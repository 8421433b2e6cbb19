"""Failing with a demand: every failure of a check repeats the check's own docstring.

This module also searches texts for secrets, in the spellings in which they usually leak.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import pytest
from pydantic import BaseModel

from keymgmt.backend import Dek, KeyProvider, SecretSource, WrappedKey
from keymgmt.errors import KeymgmtError

__all__ = [
    "Demand",
    "describe",
    "find_secret",
    "join",
    "printed",
    "raised",
    "secrets_of",
    "strings_in",
]

R = TypeVar("R")
E = TypeVar("E", bound=BaseException)
_TICK: Final = 0.02


class Demand:
    """The demand of a check, and assertions that repeat it when they fail."""

    def __init__(self, doc: str | None) -> None:
        """Take the check's docstring; it becomes the second half of every failure."""
        self.text = " ".join(inspect.cleandoc(doc or "").split())

    def fail(self, seen: str) -> NoReturn:
        """Fail with what was seen, then what was demanded and where to look."""
        # Without a cause: the error that was seen is in the sentence.
        raise pytest.fail.Exception(f"seen: {seen}\ndemanded: {self.text}", False) from None

    def that(self, condition: object, seen: str) -> None:
        """Fail with ``seen`` unless ``condition`` holds."""
        if not condition:
            self.fail(seen)

    def same_key(self, dek: object, expected: Dek, subject: str) -> None:
        """Fail unless ``dek`` is the data key that was wrapped; nothing of either is shown."""
        self.that(isinstance(dek, Dek), f"{subject} gave {type(dek).__name__}, not a Dek")
        self.that(dek == expected, f"{subject} gave another data key than the one that was wrapped")

    def works(self, call: Callable[[], R], subject: str) -> R:
        """Return what ``call`` returns; fail where it raises."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - reported whatever it is
            self.fail(f"{subject} raised {describe(error)}")

    def wraps(
        self,
        provider: KeyProvider[Any],
        key: str,
        dek: Dek,
        subject: str = "wrap()",
        *,
        context: bytes = b"c",
    ) -> WrappedKey:
        """Return the wrapped ``dek``; fail where ``wrap`` raises."""
        return self.works(lambda: provider.wrap(key, dek, context), subject)

    def unwraps(
        self,
        provider: KeyProvider[Any],
        wrapped: WrappedKey,
        dek: Dek,
        subject: str = "unwrap()",
        *,
        context: bytes = b"c",
    ) -> None:
        """Fail unless ``wrapped`` unwraps to ``dek``."""
        self.same_key(self.works(lambda: provider.unwrap(wrapped, context), subject), dek, subject)

    def hides(self, text: str | bytes, secrets: Iterable[bytes], where: str) -> None:
        """Fail where one of ``secrets`` is in ``text``, in whatever spelling."""
        spelling = find_secret(text, secrets)
        self.that(not spelling, f"a secret stands in {where} {spelling}")

    def refused(self, call: Callable[[], object], subject: str, *kinds: type[E]) -> E:
        """Return the error with which ``call`` refuses; fail where it is of another kind or none.

        A subclass of a named kind is of that kind.
        """
        expected = " or ".join(kind.__name__ for kind in kinds)
        try:
            call()
        except kinds as error:
            return error
        except Exception as error:  # noqa: BLE001 - reported whatever it is
            self.fail(f"{subject} raised {describe(error)}; expected {expected}")
        else:
            self.fail(f"{subject} was accepted; expected {expected}")

    def ends(self, seconds: float, call: Callable[[], R], subject: str) -> R:
        """Run ``call`` and pass on its outcome; fail where it has not ended after ``seconds``."""
        box: list[R] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                box.append(call())
            except BaseException as error:  # noqa: BLE001 - raised again below
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        join([thread], seconds)
        if failure:
            raise failure[0]
        if not box:
            self.fail(f"{subject} has not ended after {seconds:g} seconds")
        return box[0]


def join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads, at most ``seconds`` in all.

    The time is counted in ticks: a machine that stalls for a while stalls the count together with
    the threads, where a clock would run on and blame the threads.
    """
    for _ in range(int(seconds / _TICK) + 1):
        alive = next((thread for thread in threads if thread.is_alive()), None)
        if alive is None:
            return
        alive.join(_TICK)


def describe(error: BaseException) -> str:
    """Name an error; one that is not of keymgmt has leaked from a library, and this says so."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, KeymgmtError):
        return f"{type(error).__name__}: {error}"
    return f"{kind}, which is not a KeymgmtError and leaked out of the provider: {error}"


def printed(error: BaseException) -> str:
    """All that a log could show of an error: traceback, causes, arguments, attributes, and locals.

    Error trackers send the local variables of every frame, so a secret that a frame still holds
    when it raises has leaked. Frames of the kit itself are left out: they hold secrets on purpose.
    """
    seen: list[str] = traceback.format_exception(error)
    chain: list[BaseException | None] = [error]
    for item in chain:
        if item is not None and len(chain) < 20:
            seen.append(f"{item!r} {item.args!r} {vars(item)!r}")
            chain += [item.__cause__, item.__context__]
            seen += _locals_of(item)
    return "\n".join(seen)


def _locals_of(error: BaseException) -> Iterable[str]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        file = Path(frame.f_code.co_filename)
        if module.startswith("keymgmt.testing."):
            continue
        for name, value in list(frame.f_locals.items()):
            with contextlib.suppress(Exception):  # __repr__ of other people's classes may raise
                yield f"{file.name}:{line} {name} = {value!r}"


def raised(call: Callable[[], object]) -> str:
    """All that a log could show of the error that ``call`` raises; "" where it raises none.

    Other checks judge whether it is the right error.
    """
    try:
        call()
    except Exception as error:  # noqa: BLE001 - shown, not handled
        return printed(error)
    return ""


def find_secret(text: str | bytes, secrets: Iterable[bytes]) -> str | None:
    """The spelling in which one of ``secrets`` is in ``text``, in words; None where it is not."""
    data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    for secret in secrets:
        for spelling, form in _spellings(secret):
            if form and form in data:
                return spelling
    return None


def _spellings(secret: bytes) -> Iterable[tuple[str, bytes]]:
    yield "as it is", secret
    yield "in hex", secret.hex().encode()
    yield "in hex", secret.hex().upper().encode()
    yield "in base64", base64.b64encode(secret).rstrip(b"=")
    yield "in base64url", base64.urlsafe_b64encode(secret).rstrip(b"=")
    yield "as a Python literal", repr(secret)[2:-1].encode()
    yield "as a list of numbers", str(list(secret))[1:-1].encode()


def strings_in(value: Any) -> Iterable[str]:
    """Every string inside a nest of mappings and sequences (keys of mappings left out)."""
    if isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from strings_in(item)
    elif value is not None and not isinstance(value, bool | int | float | bytes):
        yield str(value)


def secrets_of(settings: object) -> Iterable[bytes]:
    """The secrets of all secret sources in some settings that can be read without a question."""
    if isinstance(settings, SecretSource):
        if settings.prompt is None and settings.keyring is None:
            with contextlib.suppress(KeymgmtError):
                yield bytes(settings.read())
    elif isinstance(settings, BaseModel):
        for _, value in settings:
            yield from secrets_of(value)
    elif isinstance(settings, list | tuple | dict):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from secrets_of(value)
