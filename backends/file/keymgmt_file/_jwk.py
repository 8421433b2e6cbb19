"""One key as a JWK Set: all its versions, oldest first, and nothing but bytes in and out.

The members are those of RFC 7517 (JWK), RFC 7518 (``oct``), RFC 8037 (``OKP``) and, for ML-DSA,
``AKP`` with the 32-byte seed as ``priv``. ``kid`` is the version, counted from 1; ``iat`` is when
it was made and ``revoked`` that it was retired, both as OpenID Federation 1.0 uses them in a JWK
Set. Members that are not known here are kept when the file is rewritten.

What Python keeps: JSON text and the base64 strings in it are immutable ``str``, so a copy of the
secrets stays in freed memory until something else overwrites it. What is decoded from them lives
in a ``bytearray`` that its user wipes.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from keymgmt.backend import KeyInfo, KeyVersion, ProviderError, fill_random, wipe

__all__ = ["KINDS", "MAX_FILE", "KeySet", "Kind", "SigningKey", "signing_key"]

MAX_FILE: Final = 4 << 20
_KID: Final = re.compile(r"[1-9][0-9]{0,8}")
_LATEST: Final = 253402300799  # the last second that datetime can show

SigningKey = Ed25519PrivateKey | MLDSA65PrivateKey


@dataclass(frozen=True)
class Kind:
    """A kind of key: what it is for, and how its JWK looks.

    Attributes:
        name: the kind in an operator's words.
        purpose: what a key of it may be used for, and nothing else.
        marks: the members by which a JWK is known to be of it.
        secret: the member that holds the secret.
        length: bytes of the secret.
        public: the member that holds the public key, where it has one.
        operations: ``key_ops`` of its JWK.
    """

    name: str
    purpose: Literal["wrap", "sign"]
    marks: Mapping[str, str]
    secret: str
    length: int
    public: str | None
    operations: tuple[str, ...]


KINDS: Final[Mapping[str, Kind]] = {
    kind.name: kind
    for kind in (
        # RFC 7517 lets `alg` be a name of one's own; A256GCM would say that the key encrypts
        # directly, and it only ever derives.
        Kind(
            "aes256",
            "wrap",
            {"kty": "oct", "alg": "HKDF-SHA256-A256GCM"},
            "k",
            32,
            None,
            ("wrapKey", "unwrapKey"),
        ),
        Kind(
            "ed25519",
            "sign",
            {"kty": "OKP", "crv": "Ed25519", "alg": "Ed25519"},
            "d",
            32,
            "x",
            ("sign",),
        ),
        Kind("ml-dsa-65", "sign", {"kty": "AKP", "alg": "ML-DSA-65"}, "priv", 32, "pub", ("sign",)),
    )
}


def signing_key(kind: Kind, secret: bytearray) -> SigningKey:
    """The key object of a signing kind."""
    if kind.name == "ed25519":
        return Ed25519PrivateKey.from_private_bytes(secret)
    return MLDSA65PrivateKey.from_seed_bytes(secret)


@dataclass
class KeySet:
    """All versions of one key as they stand in its file."""

    key: str
    kind: Kind
    versions: list[dict[str, Any]] = field(default_factory=list, repr=False)
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, key: str, content: bytes | bytearray) -> KeySet:
        """Read a JWK Set.

        Raises:
            ProviderError: it is damaged, empty, of mixed kinds or of a kind unknown here.
        """
        try:
            data = json.loads(content, object_pairs_hook=_members)
            versions = data.pop("keys")
            kind = _kind_of(versions[0])
            last = 0
            for jwk in versions:
                _check(jwk, kind, last)
                last = int(jwk["kid"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            # Whatever the parser said may quote the content: no cause, no detail.
            raise ProviderError(
                f"the key file of {key!r} is damaged or of an unknown kind",
                hint="put it back from a backup; until then this key opens nothing",
            ) from None
        return cls(key, kind, versions, data)

    def dump(self) -> bytes:
        """The JWK Set as the file holds it."""
        return json.dumps({**self.extra, "keys": self.versions}, indent=1).encode() + b"\n"

    def add_version(self) -> None:
        """Make the next version; new wraps and signatures use it."""
        last = int(self.versions[-1]["kid"]) if self.versions else 0
        secret = bytearray(self.kind.length)
        try:
            fill_random(secret)
            jwk: dict[str, Any] = {
                **self.kind.marks,
                "kid": str(last + 1),
                "key_ops": list(self.kind.operations),
                "iat": int(time.time()),
                self.kind.secret: _encode(secret),
            }
            if self.kind.public:
                public = signing_key(self.kind, secret).public_key().public_bytes_raw()
                jwk[self.kind.public] = _encode(public)
        finally:
            wipe(secret)
        self.versions.append(jwk)

    @property
    def newest(self) -> str:
        """The version that new wraps and signatures use."""
        return str(self.versions[-1]["kid"])

    def find(self, version: str) -> dict[str, Any] | None:
        """The JWK of one version, or None."""
        return next((jwk for jwk in self.versions if jwk["kid"] == version), None)

    def secret(self, version: str) -> bytearray:
        """The secret bytes of one version; the caller wipes them."""
        jwk = self.find(version)
        assert jwk is not None  # noqa: S101 - callers looked it up
        return bytearray(_decode(jwk[self.kind.secret]))

    def retire(self, version: str) -> None:
        """Mark one version as retired; its material stays, so that it can be undone by hand."""
        jwk = self.find(version)
        if jwk is not None and "revoked" not in jwk:
            jwk["revoked"] = {"revoked_at": int(time.time())}

    def info(self) -> KeyInfo:
        """What may be said of the key."""
        return KeyInfo(
            key=self.key,
            purpose=self.kind.purpose,
            kind=self.kind.name,
            versions=tuple(
                KeyVersion(str(jwk["kid"]), self._state(jwk), _iso(jwk.get("iat")))
                for jwk in self.versions
            ),
        )

    def _state(self, jwk: dict[str, Any]) -> Literal["active", "old", "retired"]:
        if "revoked" in jwk:
            return "retired"
        return "active" if jwk is self.versions[-1] else "old"


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member twice")
    return members


def _kind_of(jwk: Mapping[str, Any]) -> Kind:
    for kind in KINDS.values():
        if all(jwk.get(name, value) == value for name, value in kind.marks.items()) and (
            kind.secret in jwk and jwk["kty"] == kind.marks["kty"]
        ):
            return kind
    raise ValueError("unknown kind")


def _check(jwk: Mapping[str, Any], kind: Kind, last: int) -> None:
    if _kind_of(jwk) is not kind or not _KID.fullmatch(jwk["kid"]) or int(jwk["kid"]) <= last:
        raise ValueError("not the next version")
    if len(jwk[kind.secret]) != -(-kind.length * 4 // 3):
        raise ValueError("length")
    wipe(bytearray(_decode(jwk[kind.secret])))
    if "iat" in jwk and not (type(jwk["iat"]) is int and 0 <= jwk["iat"] <= _LATEST):
        raise ValueError("time")


def _encode(data: bytes | bytearray) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return binascii.a2b_base64(
        text.translate({45: 43, 95: 47}) + "=" * (-len(text) % 4), strict_mode=True
    )


def _iso(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
