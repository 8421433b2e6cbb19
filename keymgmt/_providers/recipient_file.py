"""A recipient: the public part of a wrapping key, to which anyone seals without its provider.

A recipient file is canonical JSON (RFC 8785) of everything that a device states about one version
of one key. Whoever seals to it must know that it is genuine: by its fingerprint, which covers the
whole file, or by a detached signature beside it (``FILE.sig``) of a signer that the config trusts.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from keymgmt._crypto.context_binding import inner_wrap
from keymgmt._crypto.hpke import HPKE_KINDS, check_public, hpke_seal
from keymgmt._crypto.signatures import pre_authentication, verify_signature
from keymgmt._providers.data import Signature, WrappedKey
from keymgmt._providers.names import is_key, is_name, is_version
from keymgmt._system.files import save_file
from keymgmt._system.strict_json import JsonReader, dump_json, load_json
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import FormatError, UntrustedPublisher

if TYPE_CHECKING:
    from keymgmt._crypto.dek import Dek

__all__ = [
    "RECIPIENT_KINDS",
    "RSA_OAEP_256",
    "Recipient",
    "find_signer",
    "plain_fingerprint",
    "public_key_id",
    "read_recipient",
    "recipient_message",
    "signatures_file",
    "wrap_for",
]

FORMAT: Final = "keymgmt.recipient/1"
SIGNATURE_FORMAT: Final = "keymgmt.recipient-signatures/1"
PAYLOAD_TYPE: Final = "application/vnd.keymgmt.recipient+json"
ATTESTED_PAYLOAD_TYPE: Final = "application/vnd.keymgmt.attested-recipient+json"
RSA_OAEP_256: Final = "RSA-OAEP-256"
RECIPIENT_KINDS: Final = (*HPKE_KINDS, RSA_OAEP_256)
MAX_FILE: Final = 32768
MAX_ATTRIBUTES: Final = 32
MAX_SIGNATURES: Final = 16
_NEWER: Final = "a newer keymgmt may have written it"
_ATTRIBUTE: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_VALUE: Final = re.compile(r"[\x20-\x7e]{0,512}")
_OAEP: Final = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


@dataclass(frozen=True)
class Recipient:
    """The public part of one version of a key, as a device exports it.

    Attributes:
        kind: how to wrap for it: one of ``RECIPIENT_KINDS``.
        backend: kind of key service that unwraps.
        key: the KEK's name there.
        version: the version of the KEK.
        public_key: as ``keymgmt._crypto.hpke`` serialises it; DER SubjectPublicKeyInfo for RSA.
        attributes: statements of the device about the key: at most 32, in printable ASCII. They
            prove nothing by themselves.

    Raises:
        FormatError: a member does not have its grammar, or the public key is not of ``kind``.
    """

    kind: str
    backend: str
    key: str
    version: str
    public_key: bytes = field(repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value, valid, member in (
            (self.backend, is_name, "backend name"),
            (self.key, is_key, "key name"),
            (self.version, is_version, "key version"),
        ):
            if not valid(value):
                raise FormatError(f"the recipient has no valid {member}: {str(value)[:80]!r}")
        if self.kind == RSA_OAEP_256:
            _load_rsa(self.public_key)
        else:
            check_public(self.kind, self.public_key)
        if len(self.attributes) > MAX_ATTRIBUTES or not all(
            _ATTRIBUTE.fullmatch(name) and isinstance(value, str) and _VALUE.fullmatch(value)
            for name, value in self.attributes.items()
        ):
            raise FormatError(
                f"the attributes of the recipient are not at most {MAX_ATTRIBUTES} short texts of "
                "printable ASCII with plain names"
            )

    def __str__(self) -> str:
        return f"{self.backend}:{self.key}@{self.version}"

    def to_bytes(self) -> bytes:
        """The recipient file: canonical JSON of every member."""
        return dump_json(
            {
                "format": FORMAT,
                "kind": self.kind,
                "backend": self.backend,
                "key": self.key,
                "version": self.version,
                "public_key": base64.b64encode(self.public_key).decode(),
                "attributes": dict(self.attributes),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Recipient:
        """Read a recipient file; FormatError for bytes that ``to_bytes`` would not make."""
        reader = load_json(content, "the recipient file", MAX_FILE)
        reader.version(FORMAT, _NEWER)
        recipient = cls(
            reader.text("kind", limit=64),
            reader.text("backend", limit=64),
            reader.text("key", limit=64),
            reader.text("version", limit=128),
            reader.base64("public_key", limit=MAX_FILE),
            reader.texts("attributes", most=MAX_ATTRIBUTES, key_limit=32, limit=512),
        )
        reader.end()
        return recipient

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipient:
        """Read a recipient file.

        Raises:
            ConfigError: the file cannot be read.
            FormatError: the file is too large, or is not a recipient file; the message names it.
        """
        content = read_recipient(Path(path))
        try:
            return cls.from_bytes(content)
        except FormatError as error:
            raise FormatError(f"{path}: {error}", hint=error.hint) from error

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a recipient file, readable by all; without ``force`` ConfigError if it exists."""
        save_file(Path(path), self.to_bytes(), force=force)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the whole file in hex, in 8 groups of 8 with '-' between them."""
        digest = hashlib.sha256(self.to_bytes()).hexdigest()
        return "-".join(digest[start : start + 8] for start in range(0, 64, 8))


def plain_fingerprint(text: str) -> str:
    """A fingerprint as a person typed it, without separators and in lower case."""
    return re.sub(r"[\s:-]", "", text).lower()


def public_key_id(public_key: bytes) -> str:
    """The parameter ``pk`` of a wrap: 128 bits of SHA-384 over the serialised public key, in hex.

    The keys of many devices have the same backend and the same name. By this parameter a provider
    knows without decrypting whether a wrap is for its own key.
    """
    return hashlib.sha384(public_key).hexdigest()[:32]


def wrap_for(recipient: Recipient, dek: Dek, context: bytes) -> WrappedKey:
    """Wrap ``dek`` for a recipient, bound to ``context``, with nothing but its public key.

    An HPKE kind binds the context as ``info``; RSA-OAEP-256 (RFC 8017, MGF1-SHA-256, empty label)
    wraps an InnerKey that carries it.
    """
    if recipient.kind == RSA_OAEP_256:
        public = _load_rsa(recipient.public_key)
        blob = inner_wrap(dek, context, lambda inner: public.encrypt(bytes(inner.view()), _OAEP))
    else:
        blob = hpke_seal(recipient.kind, recipient.public_key, dek, context)
    return WrappedKey(
        recipient.backend,
        recipient.key,
        recipient.version,
        recipient.kind,
        blob,
        {"pk": public_key_id(recipient.public_key)},
    )


def recipient_message(recipient: Recipient, *, attested: bool = False) -> bytes:
    """The bytes that a signer of a recipient file signs (DSSE over the whole file).

    With ``attested`` the signer states that hardware proved to hold the key, else that the file is
    genuine. Each statement has its own payload type, so that neither can stand for the other.
    """
    kind = ATTESTED_PAYLOAD_TYPE if attested else PAYLOAD_TYPE
    return pre_authentication(kind, recipient.to_bytes())


def signatures_file(signatures: Sequence[Signature]) -> bytes:
    """The content of ``FILE.sig``: signatures over ``recipient_message``, with their key ids."""
    return dump_json(
        {
            "format": SIGNATURE_FORMAT,
            "signatures": [
                {
                    "key": public_key_id(signature.public_key),
                    "signature": base64.b64encode(signature.signature).decode(),
                }
                for signature in signatures
            ],
        }
    )


def find_signer(
    recipient: Recipient,
    signatures: bytes,
    trusted: Mapping[str, bytes],
    *,
    attested: bool = False,
) -> str:
    """The name of a trusted key that signed this recipient file.

    Args:
        recipient: the content of the recipient file.
        signatures: content of the ``.sig`` file beside it.
        trusted: name -> DER SubjectPublicKeyInfo of each signer that the config trusts for this
            statement.
        attested: the statement, as in ``recipient_message``.

    Raises:
        FormatError: ``signatures`` is not a signature file.
        UntrustedPublisher: the file has no valid signature of a trusted key.
        ConfigError: a trusted key is of a kind that cannot sign.
    """
    reader = load_json(signatures, "the signature file", MAX_FILE)
    reader.version(SIGNATURE_FORMAT, _NEWER)
    entries = [
        JsonReader(entry, "a signature in the signature file")
        for entry in reader.array("signatures", least=0, most=MAX_SIGNATURES)
    ]
    reader.end()
    signed = [
        (entry.text("key", limit=32), entry.base64("signature", limit=MAX_FILE))
        for entry in entries
    ]
    for entry in entries:
        entry.end()
    known = {public_key_id(public): (name, public) for name, public in trusted.items()}
    message = recipient_message(recipient, attested=attested)
    forged = None
    for key_id, signature in signed:
        # The id in the file only says which trusted key to try. The algorithm follows from that
        # key, and never from the file.
        name, public = known.get(key_id, (None, b""))
        if name is None:
            continue
        if verify_signature(public, message, signature):
            return name
        forged = name
    if forged is not None:
        raise UntrustedPublisher(
            f"the signature of {forged} on the recipient {recipient} is not valid",
            hint="the recipient file is not the one that was signed; export and sign it again",
        )
    raise UntrustedPublisher(
        f"nobody whom this config trusts signed the recipient {recipient}",
        hint="have whoever runs the device read its fingerprint out, and give that: "
        "--fingerprint HEX",
    )


def _load_rsa(data: bytes) -> rsa.RSAPublicKey:
    try:
        key = load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError("the recipient has no RSA public key (DER)") from error
    if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 8192:
        raise FormatError("the recipient has no RSA public key of 2048 to 8192 bits")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != data:
        raise FormatError("the recipient's RSA public key is not encoded in the canonical way")
    return key


def read_recipient(path: Path) -> bytes:
    """The bytes of a recipient file or of its signatures; ConfigError where it cannot be read."""
    return bytes(read_file(path, label="recipient file", limit=MAX_FILE, access="any"))
