"""The files of the office's two steps, for one device or for a folder of them: all or nothing.

In a folder the files of one device have one name: ``NAME.request``, ``NAME.challenge``,
``NAME.state``, ``NAME.response``, ``NAME.recipient`` and ``NAME.recipient.sig``. A state file stays
until all of the answer is written, so a run that was interrupted, also between two files, goes on
where it was: what it left is recognised by its content, and anything else is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt.backend import (
    ConfigError,
    FormatError,
    IntegrityError,
    KeymgmtError,
    Recipient,
    SupportsSigning,
    find_signer,
    read_file,
    recipient_message,
    save_file,
    signatures_file,
)
from keymgmt_tpm2.enroll._certificates import Makers
from keymgmt_tpm2.enroll._exchange import Request, accept, challenge, read_state
from keymgmt_tpm2.enroll._office import Decision

__all__ = [
    "Attester",
    "Outcome",
    "accept_all",
    "accept_one",
    "challenge_all",
    "challenge_one",
    "read_any",
]

MAX_FILE: Final = 1 << 20
_THREADS: Final = 8


@dataclass(frozen=True)
class Attester:
    """The key by which the office states that a recipient was attested."""

    provider: SupportsSigning
    key: str

    def sign(self, recipient: Recipient) -> bytes:
        """The content of ``FILE.sig``; ProviderError where the key does not sign."""
        message = recipient_message(recipient, attested=True)
        return signatures_file([self.provider.sign(self.key, message)])

    def signed(self, recipient: Recipient, content: bytes) -> bool:
        """Whether the content of a ``FILE.sig`` is a signature of this key on the recipient."""
        trusted = {self.key: self.provider.public_key(self.key)}
        with contextlib.suppress(KeymgmtError):
            find_signer(recipient, content, trusted, attested=True)
            return True
        return False


@dataclass(frozen=True)
class Outcome:
    """The result for one file of a folder.

    Attributes:
        path: the device's file, a request or a response.
        done: the result of this run, or None where an earlier run made it.
        error: why there is no result, or None.
        waiting: whether the device has not answered yet.
    """

    path: Path
    done: tuple[Request, Recipient | None] | None = None
    error: KeymgmtError | None = None
    waiting: bool = False


def challenge_one(path: Path, output: Path, state: Path, makers: Makers) -> Request:
    """Write challenge and private state for a request, both or neither; returns the request.

    Raises:
        AttestationError: the request fails a check that needs no answer of the TPM.
        FormatError: it is malformed.
        ConfigError: a file cannot be read, exists, or cannot be written.
    """
    request = Request.from_bytes(read_any(path))
    secret = None
    if os.path.lexists(state) and not os.path.lexists(output):
        # The run that wrote the state wrote no challenge, or the challenge was lost.
        known, secret = read_state(_read_private(state))
        if known != request:
            raise ConfigError(f"{state} exists, and is of another request")
    sent, kept = challenge(request, makers, secret=secret)
    with contextlib.ExitStack() as undo:
        if secret is None:
            _save(undo, state, kept, mode=0o600)
        _save(undo, output, sent)
        undo.pop_all()
    return request


def accept_one(
    path: Path,
    output: Path,
    state: Path,
    makers: Makers,
    decide: Callable[[Request], Decision],
    attester: Attester | None,
) -> tuple[Request, Recipient]:
    """Write the attested recipient and its signature, both or neither; then the state is gone.

    Raises:
        AttestationError: the device is not proved, or not accepted.
        FormatError: a file is malformed.
        ConfigError: a file cannot be read, exists, or cannot be written.
        ProviderError: the attester's key does not sign.
    """
    kept = _read_private(state)
    request, _ = read_state(kept)
    recipient = accept(kept, read_any(path), makers, decide(request))
    content, beside = recipient.to_bytes(), output.with_name(output.name + ".sig")
    with contextlib.ExitStack() as undo:
        # The signature first: a recipient without one must never be left.
        if attester is not None and not _left(beside, lambda c: attester.signed(recipient, c)):
            _save(undo, beside, attester.sign(recipient))
        if not _left(output, lambda left: left == content):
            _save(undo, output, content)
        undo.pop_all()
    # The state is for one answer only.
    state.unlink()
    return request, recipient


def challenge_all(folder: Path, makers: Makers) -> Iterator[Outcome]:
    """A challenge for each request of a folder that has none, and was not answered for good."""

    def one(path: Path) -> Outcome:
        output, state = path.with_suffix(".challenge"), path.with_suffix(".state")
        answered = os.path.lexists(path.with_suffix(".recipient")) and not os.path.lexists(state)
        if answered or (os.path.lexists(output) and os.path.lexists(state)):
            return Outcome(path)
        return Outcome(path, (challenge_one(path, output, state, makers), None))

    return _each(_files(folder, ".request"), one)


def accept_all(
    folder: Path, makers: Makers, decision: Decision, attester: Attester | None
) -> Iterator[Outcome]:
    """An attested recipient for each response of a folder that has none; then who is waited for.

    Raises:
        ProviderError: the attester's key does not sign, so that nothing would be accepted.
    """

    def one(path: Path) -> Outcome:
        output, state = path.with_suffix(".recipient"), path.with_suffix(".state")
        if os.path.lexists(output) and not os.path.lexists(state):
            return Outcome(path)
        return Outcome(path, accept_one(path, output, state, makers, lambda _: decision, attester))

    unanswered = (
        Outcome(state.with_suffix(".request"), waiting=True)
        for state in _files(folder, ".state")
        if not os.path.lexists(state.with_suffix(".response"))
    )
    return itertools.chain(_each(_files(folder, ".response"), one), unanswered)


def _each(paths: list[Path], work: Callable[[Path], Outcome]) -> Iterator[Outcome]:
    """The outcomes in order. Several at once, since most of the time is waiting for the disk."""

    def one(path: Path) -> Outcome:
        try:
            return work(path)
        except (IntegrityError, FormatError, ConfigError) as error:
            # Kept for a long time, perhaps: without the frames, which hold whole files.
            return Outcome(path, error=error.with_traceback(None))

    pool = ThreadPoolExecutor(_THREADS, "enrolling")
    try:
        running: deque[Future[Outcome]] = deque()
        for path in paths:
            running.append(pool.submit(one, path))
            if len(running) > 2 * _THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        # What runs is finished; an error or an interrupt begins no more.
        pool.shutdown(cancel_futures=True)


def read_any(path: Path) -> bytes:
    """A file that a device or a maker sent; ConfigError."""
    return bytes(read_file(path, label="file", limit=MAX_FILE, access="any"))


def _read_private(path: Path) -> bytes:
    return bytes(read_file(path, label="state", limit=MAX_FILE, access="private"))


def _files(folder: Path, ending: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ending)
    except OSError as error:
        raise ConfigError(f"cannot read the folder {folder}: {error.strerror}") from error


def _left(path: Path, is_ours: Callable[[bytes], bool]) -> bool:
    """Whether an earlier run left this content; ``_save`` fails for any other content."""
    return os.path.lexists(path) and is_ours(read_any(path))


def _save(undo: contextlib.ExitStack, path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a new file, which is removed again unless ``undo`` is emptied."""
    save_file(path, content, mode=mode)
    undo.callback(path.unlink, missing_ok=True)
