"""One key as a JWK Set with all its versions, oldest first; this module opens no file.

The members are those of RFC 7517 (JWK), RFC 7518 (``oct``), RFC 8037 (``OKP``) and, for ML-DSA,
``AKP`` with the seed as ``priv``. ``kid`` is the version, counted from 1; ``iat`` is the time when
it was created, and ``revoked`` says that it was retired, both as in a JWK Set of OpenID Federation
1.0. Unknown members are kept when the file is rewritten.

JSON text and the base64 strings in it are immutable ``str``, so a copy of the secrets stays in
freed memory until other data overwrites it. Decoded secrets are in a ``bytearray``, which its user
wipes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA87PrivateKey

from keymgmt.backend import (
    HPKE_KINDS,
    FormatError,
    JsonReader,
    KeyInfo,
    KeyVersion,
    fill_random,
    hpke_generate,
    hpke_public,
    load_json,
    wipe,
    wrong_purpose,
)
from keymgmt_file._errors import damaged

__all__ = ["KINDS", "MAX_FILE", "KeySet", "SigningKey", "random_key", "read_json", "signing_key"]

MAX_FILE: Final = 4 << 20
_KID: Final = re.compile(r"[1-9][0-9]{0,8}")
_LATEST: Final = 253402300799  # the last second that datetime can show

SigningKey = Ed25519PrivateKey | MLDSA65PrivateKey | MLDSA87PrivateKey


@dataclass(frozen=True)
class Kind:
    """A kind of key: its purpose, and the members of its JWK.

    Attributes:
        name: the value of ``--kind``.
        purpose: what a key of this kind is for; it has only one purpose.
        marks: the members by which a JWK is recognised as of this kind.
        secret: the member that holds the secret.
        length: bytes of the secret.
    """

    name: str
    purpose: Literal["wrap", "sign"]
    marks: Mapping[str, str]
    secret: str
    length: int = 32

    @property
    def is_hpke(self) -> bool:
        """Whether others can wrap for the key with its public key."""
        return self.name in HPKE_KINDS

    @property
    def operations(self) -> list[str]:
        """``key_ops`` of its JWK (RFC 7517, section 4.3)."""
        if self.purpose == "sign":
            return ["sign"]
        return ["deriveKey"] if self.is_hpke else ["wrapKey", "unwrapKey"]


# The `alg` of a wrapping key is the mechanism of its wraps. It is not a registered name, which
# RFC 7517 allows: the registered A256GCM is a key that encrypts content directly.
_KINDS: Final = (
    Kind("aes256", "wrap", {"kty": "oct", "alg": "HKDF-SHA384-A256GCM"}, "k"),
    Kind("hpke-p256", "wrap", {"kty": "EC", "crv": "P-256", "alg": "hpke-p256"}, "d"),
    Kind("hpke-p384", "wrap", {"kty": "EC", "crv": "P-384", "alg": "hpke-p384"}, "d", 48),
    Kind("hpke-x25519", "wrap", {"kty": "OKP", "crv": "X25519", "alg": "hpke-x25519"}, "d"),
    Kind("hpke-mlkem768-x25519", "wrap", {"kty": "AKP", "alg": "hpke-mlkem768-x25519"}, "priv"),
    Kind("hpke-mlkem1024", "wrap", {"kty": "AKP", "alg": "hpke-mlkem1024"}, "priv", 64),
    Kind("ed25519", "sign", {"kty": "OKP", "crv": "Ed25519", "alg": "Ed25519"}, "d"),
    Kind("ml-dsa-65", "sign", {"kty": "AKP", "alg": "ML-DSA-65"}, "priv"),
    Kind("ml-dsa-87", "sign", {"kty": "AKP", "alg": "ML-DSA-87"}, "priv"),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _KINDS}


def signing_key(kind: Kind, secret: bytearray) -> SigningKey:
    """The key object of a signing kind."""
    if kind.name == "ed25519":
        return Ed25519PrivateKey.from_private_bytes(secret)
    kind_of_key = MLDSA87PrivateKey if kind.name == "ml-dsa-87" else MLDSA65PrivateKey
    return kind_of_key.from_seed_bytes(secret)


def _public_members(kind: Kind, secret: bytearray) -> dict[str, str]:
    if kind.name == "aes256":
        return {}
    if kind.purpose == "sign":
        public = signing_key(kind, secret).public_key().public_bytes_raw()
    else:
        public = hpke_public(kind.name, secret)
    if kind.marks["kty"] == "EC":
        return {"x": _encode(public[1 : 1 + kind.length]), "y": _encode(public[1 + kind.length :])}
    return {"pub" if kind.marks["kty"] == "AKP" else "x": _encode(public)}


def _stated_public(kind: Kind, jwk: Mapping[str, Any]) -> bytes | None:
    try:
        if kind.marks["kty"] == "EC":
            # An uncompressed point: 4, x, y (SEC 1, section 2.3.3).
            return b"\4" + _decode(jwk["x"]) + _decode(jwk["y"])
        return _decode(jwk["pub" if kind.marks["kty"] == "AKP" else "x"])
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


@dataclass
class KeySet:
    """All versions of one key, as in its file."""

    key: str
    kind: Kind
    versions: list[dict[str, Any]] = field(default_factory=list, repr=False)
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, key: str, reader: JsonReader) -> KeySet:
        """Read a JWK Set.

        Raises:
            ProviderError: the set is damaged, empty, of mixed kinds or of an unknown kind.
        """
        # The error is raised outside of the frames that hold secrets, since error trackers show
        # the variables of all frames of a traceback.
        keys = _parse(key, reader)
        if keys is None:
            raise damaged(f"the key file of {key!r}")
        return keys

    def dump(self) -> bytearray:
        """The content of the file; the caller wipes it."""
        return bytearray(json.dumps({**self.extra, "keys": self.versions}, indent=1).encode())

    def add_version(self, after: int) -> None:
        """Add the version for new wraps and signatures, numbered above ``after`` and all others."""
        last = max(after, *map(int, self.numbers), 0)
        secret = hpke_generate(self.kind.name) if self.kind.is_hpke else random_key()
        try:
            self.versions.append(
                {
                    **self.kind.marks,
                    "kid": str(last + 1),
                    "key_ops": self.kind.operations,
                    "iat": int(time.time()),
                    **_public_members(self.kind, secret),
                    self.kind.secret: _encode(secret),
                }
            )
        finally:
            wipe(secret)

    def require(self, purpose: str | None) -> KeySet:
        """The key itself; UnsupportedOperation if it has another purpose than ``purpose``."""
        if purpose not in (None, self.kind.purpose):
            kinds = {kind.name: kind.purpose for kind in _KINDS}
            raise wrong_purpose(self.key, self.kind.name, str(purpose), kinds)
        return self

    @property
    def newest(self) -> str:
        """The version that new wraps and signatures use."""
        return str(self.versions[-1]["kid"])

    @property
    def numbers(self) -> list[str]:
        """The versions, from oldest to newest."""
        return [jwk["kid"] for jwk in self.versions]

    @contextlib.contextmanager
    def secret(self, version: str) -> Iterator[bytearray]:
        """The secret bytes of an existing version, wiped at the end of the block."""
        secret = bytearray(_decode(self._find(version)[self.kind.secret]))
        try:
            yield secret
        finally:
            wipe(secret)

    def hpke_public(self, version: str) -> bytes:
        """The public key of one version of an HPKE kind, derived from its secret.

        Raises:
            ProviderError: the file states another public key.
        """
        public = None
        with contextlib.suppress(ValueError), self.secret(version) as secret:
            public = hpke_public(self.kind.name, secret)
        # A model that is sealed to a public key without its secret would never open again.
        if public is None or public != self.stated_public(version):
            raise damaged(f"the key file of {self.key!r}")
        return public

    def stated_public(self, version: str) -> bytes:
        """The public key in the file, which need not be derived."""
        public = _stated_public(self.kind, self._find(version))
        if public is None:
            raise damaged(f"the key file of {self.key!r}")
        return public

    def is_retired(self, version: str) -> bool:
        """Whether an existing version is retired."""
        return "revoked" in self._find(version)

    def retire(self, version: str) -> None:
        """Mark one version as retired; its material stays, so that this can be undone by hand."""
        self._find(version).setdefault("revoked", {"revoked_at": int(time.time())})

    def info(self) -> KeyInfo:
        """The key as a KeyInfo, without secrets."""
        return KeyInfo(
            key=self.key,
            purpose=self.kind.purpose,
            kind=self.kind.name,
            versions=tuple(
                KeyVersion(str(jwk["kid"]), self._state(jwk), _iso(jwk.get("iat")))
                for jwk in self.versions
            ),
        )

    def _find(self, version: str) -> dict[str, Any]:
        return next(jwk for jwk in self.versions if jwk["kid"] == version)

    def _state(self, jwk: dict[str, Any]) -> Literal["active", "old", "retired"]:
        if "revoked" in jwk:
            return "retired"
        return "active" if jwk is self.versions[-1] else "old"


def random_key() -> bytearray:
    """32 random bytes; the caller wipes them."""
    key = bytearray(32)
    fill_random(key)
    return key


def read_json(content: bytes | bytearray, label: str) -> JsonReader:
    """Read a JSON object, canonical or not; else ProviderError, which quotes nothing."""
    reader = None
    with contextlib.suppress(FormatError):
        reader = load_json(content, label, MAX_FILE, canonical=False)
    if reader is None:
        raise damaged(label)
    return reader


def _parse(key: str, reader: JsonReader) -> KeySet | None:
    try:
        versions = reader.array("keys", least=1, most=MAX_FILE)
        kind, last = _kind_of(versions[0]), 0
        for jwk in versions:
            _check(jwk, kind, last)
            last = int(jwk["kid"])
    except (FormatError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return KeySet(key, kind, versions, reader.rest())


def _kind_of(jwk: Mapping[str, Any]) -> Kind:
    for kind in KINDS.values():
        if all(jwk.get(name) == value for name, value in kind.marks.items()):
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
    """Base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Strict base64url without padding; ValueError or AttributeError for anything else."""
    if "+" in text or "/" in text or "=" in text:
        raise ValueError("not base64url")
    return binascii.a2b_base64(
        text.translate({45: 43, 95: 47}) + "=" * (-len(text) % 4), strict_mode=True
    )


def _iso(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
