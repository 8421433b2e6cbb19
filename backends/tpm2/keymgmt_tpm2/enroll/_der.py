"""Parts of certificates that a parser of certificates does not read.

Old authorities have DER that is not strictly ordered, and some makers an algorithm of keys that
parsers do not know. Whatever is read here was verified by OpenSSL, or is compared with bytes of our
own; ValueError for what is not DER at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from keymgmt_tpm2 import _structures as s

__all__ = [
    "BASIC",
    "KEY_USAGE",
    "NAMES",
    "PURPOSES",
    "elements",
    "extensions",
    "issuer_and_subject",
    "signature_algorithms",
    "tbs_fields",
]

BASIC: Final = bytes.fromhex("551d13")
KEY_USAGE: Final = bytes.fromhex("551d0f")
NAMES: Final = bytes.fromhex("551d1e")
PURPOSES: Final = bytes.fromhex("551d25")


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element, one after the other."""
    reader = s.Reader(data)
    while reader.left:
        tag, length = reader.number(1), reader.number(1)
        yield tag, reader.take(reader.number(length & 0x7F) if length & 0x80 else length)


def tbs_fields(certificate: bytes) -> list[tuple[int, bytes]]:
    """The fields of a certificate that are signed, without the version (RFC 5280, 4.1)."""
    ((_, outer),) = elements(certificate)
    (_, body), *_ = elements(outer)
    fields = [field for field in elements(body) if field[0] != 0xA0]
    if len(fields) < 6:
        raise ValueError("a certificate without all of its fields")
    return fields


def signature_algorithms(certificate: bytes) -> tuple[object, object]:
    """The algorithm that is signed, and the one beside it that is used (RFC 5280, 4.1.1.2)."""
    ((_, outer),) = elements(certificate)
    _, used, _ = elements(outer)
    return tbs_fields(certificate)[1], used


def issuer_and_subject(certificate: bytes) -> tuple[object, object]:
    """Both names, to be compared; the order within a set does not count."""
    issuer, subject = (tbs_fields(certificate)[place][1] for place in (2, 4))
    return _name(issuer), _name(subject)


def _name(content: bytes) -> list[list[tuple[int, bytes]]]:
    return [sorted(elements(part)) for _, part in elements(content)]


def extensions(certificate: bytes) -> dict[bytes, bytes]:
    """The extensions by the content of their object identifier; the values are DER."""
    values: dict[bytes, bytes] = {}
    for tag, content in tbs_fields(certificate):
        if tag == 0xA3:
            ((_, listed),) = elements(content)
            for _, extension in elements(listed):
                identifier, *_, value = (part for _, part in elements(extension))
                values[identifier] = value
    return values
