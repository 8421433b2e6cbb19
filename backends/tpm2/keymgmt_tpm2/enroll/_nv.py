"""Certificates of endorsement keys and their chain, which the maker stored in NV indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from keymgmt_tpm2._errors import TpmError
from keymgmt_tpm2._templates import EK_PROFILES
from keymgmt_tpm2.enroll._certificates import MAX_CHAIN, split_chain

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["certificates", "read_chain", "read_nv"]

# "TCG EK Credential Profile", 2.2.1.5.2.
_CHAIN: Final = range(0x01C00100, 0x01C00200)


def certificates(tpm: Tpm) -> Iterator[tuple[str, bytes]]:
    """The EK certificates that the TPM holds: the name of their profile, and the NV content."""
    for name, profile in EK_PROFILES.items():
        if (content := read_nv(tpm, profile.index)) is not None:
            yield name, content


def read_chain(tpm: Tpm) -> bytes:
    """The certificates of issuers in the TPM, DER one after the other (2.2.1.5.2).

    An index that was never written, or that its owner alone reads, is passed over: the office says
    which issuer is missing.
    """
    content = b""
    for index in tpm.handles(_CHAIN.start):
        if index in _CHAIN:
            try:
                content += read_nv(tpm, index) or b""
            except TpmError as error:
                if error.lost or error.fault.passing:
                    raise
    issuers: list[bytes] = []
    at = 0
    while at < len(content) and len(issuers) < MAX_CHAIN:
        end = at + 4 + int.from_bytes(content[at + 2 : at + 4], "big")
        try:
            issuers += split_chain(content[at:end])
            at = end
        except ValueError:
            at += 1  # padding, or other content of a maker, is no reason to send nothing
    return b"".join(issuers)


def read_nv(tpm: Tpm, index: int) -> bytes | None:
    """The content of an NV index, or None where there is no such index; TpmError."""
    handle = tpm.persistent(index)
    return None if handle is None else tpm.nv_read(handle)
