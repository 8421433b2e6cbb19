"""Counters by which an approver outdates older approvals, and that nobody else moves.

A counter is an NV index that takes no authorisation but its policy, PolicyAuthorize(approver): not
the owner's, which is often empty. A *raise* is what the approver signs, once for all devices: it
starts the counter where it was never written, and counts it up while it is lower than a value; no
other counter of his. It does nothing more after that, so it may lie and be sent anywhere.

A counter starts where the highest counter that this TPM ever had left off (Part 3, 31.8), so the
owner, who can undefine it, brings no old value back.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ConfigError, JsonReader, KeyNotFound
from keymgmt_tpm2._structures import ecdsa_pair
from keymgmt_tpm2.policy._index import NV_COUNTER, NV_WRITTEN, NvIndex
from keymgmt_tpm2.policy._policy import (
    Approver,
    Counter,
    first_digest,
    increment_hash,
    raise_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._provider import Tpm2Provider

__all__ = ["DEFAULT_INDEX", "Raise", "create_counter", "raise_counter", "read_counter"]

DEFAULT_INDEX: Final = 0x01800100
FORMAT: Final = "keymgmt.tpm2-counter/1"
SECONDS: Final = 300.0
"""Each step takes seven commands, of some milliseconds each on a chip."""
_CREATE: Final = "make it with: keymgmt tpm counter create PROVIDER FILE"


@dataclass(frozen=True)
class Raise:
    """The signatures of an approver that start a counter and raise it to a value, in DER."""

    counter: Counter
    approver: Approver
    first: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def sign(cls, counter: Counter, approver: Approver, sign: Callable[[bytes], bytes]) -> Raise:
        """Have it signed; ConfigError where ``sign`` is not the approver's."""
        made = cls(counter, approver, *map(sign, cls.messages(counter, approver)))
        made.check()
        return made

    @staticmethod
    def messages(counter: Counter, approver: Approver) -> tuple[bytes, bytes]:
        """The two messages that are signed: to start the counter, and to raise it."""
        if not counter.value > 0:
            raise ValueError("a counter is raised to 1 or more")
        ref = approver.counter_ref
        return first_digest(counter, approver) + ref, raise_digest(counter, approver) + ref

    def check(self) -> None:
        """ConfigError unless both signatures are the approver's; the TPM checks them again."""
        for message, signature in zip(
            self.messages(self.counter, self.approver), (self.first, self.signature), strict=True
        ):
            self.approver.check(message, signature, "raise of a counter")

    def __str__(self) -> str:
        return f"counter {self.counter.index:#010x} to {self.counter.value}"

    def to_bytes(self) -> bytes:
        """The file."""
        data = {
            "format": FORMAT,
            "counter": self.counter.to_json(),
            "approver": self.approver.to_json(),
            "first": base64.b64encode(self.first).decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(data, indent=2).encode() + b"\n"

    @classmethod
    def read(cls, data: JsonReader) -> Raise:
        """Reverse ``to_bytes``; ValueError or FormatError."""
        data.version(FORMAT, "a newer keymgmt may have written it")
        signed = cls(
            Counter.read(JsonReader(data.members("counter"), "the counter")),
            Approver.read(JsonReader(data.members("approver"), "the approver")),
            data.base64("first", limit=128),
            data.base64("signature", limit=128),
        )
        data.end()
        signed.approver.check_ecdsa()
        cls.messages(signed.counter, signed.approver)
        for signature in (signed.first, signed.signature):
            ecdsa_pair(signature)
        return signed


def create_counter(provider: Tpm2Provider, wanted: Raise) -> int:
    """Define a counter as its owner, start it, and raise it; returns its value.

    That may be higher already: a TPM starts a counter above all that it ever had. One of the same
    approver that is there is raised alone, since what made it may have been cut.

    Raises:
        ConfigError: the index is in use, or ``wanted`` is not signed by its approver.
        AccessDenied: the owner hierarchy has a password, and it was not or wrongly given.
    """
    wanted.check()
    index = wanted.counter.nv_index(wanted.approver)

    def operation(tpm: Tpm) -> int:
        there = tpm.persistent(index.number)
        if there is None or tpm.name_of(there) != index.name:
            hint = "name another when it is signed: --index 0x018001.."
            tpm.nv_define(index, tpm.session(), hint)
        return _raise(tpm, index, wanted)

    return provider.service.run(
        f"making the counter {index}",
        operation,
        seconds=SECONDS,
        passwords={"owner": provider.settings.owner_auth},
    )


def raise_counter(provider: Tpm2Provider, wanted: Raise) -> int:
    """Count up to what the approver signed, which takes no password; returns the new value.

    Every approval for a lower value is outdated. One that is as high or higher is left alone.

    Raises:
        KeyNotFound: there is no such counter of that approver.
        ConfigError: ``wanted`` is not signed by its approver.
    """
    wanted.check()
    index = wanted.counter.nv_index(wanted.approver)

    def operation(tpm: Tpm) -> int:
        handle = _find(tpm, index.number)
        if tpm.name_of(handle) != index.name:
            raise KeyNotFound(
                f"the counter {index} is not of the approver who signed this",
                hint="an approver raises the counters that were made with his raise alone",
            )
        return _raise(tpm, index, wanted)

    return provider.service.run(f"raising the counter {index}", operation, seconds=SECONDS)


def read_counter(provider: Tpm2Provider, index: int = DEFAULT_INDEX) -> int:
    """The present value; KeyNotFound where there is no counter."""
    return provider.service.run(
        f"reading the counter {index:#010x}", lambda tpm: _value(tpm, _find(tpm, index))
    )


def _find(tpm: Tpm, index: int) -> Any:
    handle = tpm.persistent(index)
    if handle is None:
        tpm.check_owner_enabled()
        raise KeyNotFound(f"the TPM has no counter {index:#010x}", hint=_CREATE)
    attributes, size = tpm.nv_attributes(handle)
    if attributes & ~NV_WRITTEN != NV_COUNTER or size != 8:
        raise ConfigError(
            f"the NV index {index:#010x} is none of ours: attributes {attributes:#010x}",
            hint="name another: --index 0x018001..",
        )
    if not attributes & NV_WRITTEN:
        raise KeyNotFound(f"the counter {index:#010x} was never started", hint=_CREATE)
    return handle


def _value(tpm: Tpm, handle: Any) -> int:
    return int.from_bytes(tpm.nv_read(handle), "big")


def _raise(tpm: Tpm, index: NvIndex, wanted: Raise) -> int:
    counter, approver = wanted.counter, wanted.approver
    handle = tpm.persistent(index.number)
    attributes, _ = tpm.nv_attributes(handle)
    if not attributes & NV_WRITTEN:
        approved = _approved(tpm, approver, first_digest(counter, approver), wanted.first)
        session = tpm.session(policy=True, once=True)
        tpm.call("policy_nv_written", session, written_set=False)
        _increment(tpm, session, handle, index.new_name, approved)
        handle = tpm.persistent(index.number)  # its name has changed, which ESAPI does not know
    value = _value(tpm, handle)
    if value < counter.value:
        # A slow chip checks the signature once for all increments.
        approved = _approved(tpm, approver, raise_digest(counter, approver), wanted.signature)
        lower = Counter(counter.index, counter.value - 1).operand
        while value < counter.value:
            session = tpm.session(policy=True, once=True)
            tpm.policy_nv(session, handle, lower)
            _increment(tpm, session, handle, index.name, approved)
            value = _value(tpm, handle)
    return value


def _approved(tpm: Tpm, approver: Approver, digest: bytes, signature: bytes) -> tuple[Any, ...]:
    """The arguments of PolicyAuthorize for a digest that the approver signed."""
    key, ref = approver.structure(), approver.counter_ref
    return digest, key.name, tpm.verify(key, digest + ref, signature), ref


def _increment(tpm: Tpm, session: Any, handle: Any, name: bytes, approved: tuple[Any, ...]) -> None:
    """One increment of the index ``name``, in a session that meets the signed condition."""
    tpm.call("policy_cp_hash", session, increment_hash(name))
    tpm.call("policy_authorize", session, *approved)
    tpm.use_once(session, "nv_increment", handle, auth_handle=handle)
