"""Looking after Transit keys, and signing with them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt.backend import (
    RSA_OAEP_256,
    AccessDenied,
    ConfigError,
    KeyInfo,
    KeyNotFound,
    KeyVersion,
    ProviderError,
    ProviderUnavailable,
    PublicKey,
    Recipient,
    Signature,
    UnsupportedOperation,
    check_kind,
    check_options,
    check_retirable,
    key_exists,
    no_public_part,
    no_version,
    wrong_purpose,
)
from keymgmt_vault._errors import Refusal, Verb, refused
from keymgmt_vault._login import text_of
from keymgmt_vault._settings import KINDS, RSA

if TYPE_CHECKING:
    from keymgmt_vault._session import Session

__all__ = ["Described", "Keys"]

_PERIOD: Final = re.compile(r"[1-9][0-9]{0,5}[smh]")
_SIGNATURE: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]{4,8000}={0,2})")
_MAX_VERSIONS: Final = 10_000
_AT_ONCE: Final = 8
_DELETED: Final = "soft-deleted"
log: Final = logging.getLogger("keymgmt.vault")


@dataclass(frozen=True)
class Described:
    """The server's description of a Transit key.

    Attributes:
        info: the key as keymgmt describes it.
        native: its name in Transit.
        floor: the oldest version that decrypts (``min_decryption_version``).
        versions: the server's own entry of each version.
    """

    info: KeyInfo
    native: str
    floor: int
    versions: Mapping[str, Any]

    def public_key(self, version: str | None = None) -> bytes:
        """A version's public key, by default the newest's, as DER SubjectPublicKeyInfo."""
        if version not in (None, *self.versions):
            raise no_version(self.native, str(version), sorted(self.versions, key=int))
        entry = self.versions.get(version or self.info.newest)
        text = text_of(entry if isinstance(entry, dict) else {}, "public_key")
        try:
            if self.info.kind == "ed25519":
                raw = Ed25519PublicKey.from_public_bytes(binascii.a2b_base64(text))
                return raw.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return PublicKey.from_pem(text.encode()).der
        except (ValueError, ConfigError) as error:
            raise ProviderUnavailable("the server's answer is not a public key") from error

    def recipient(self) -> Recipient:
        """The public part of the newest version of an RSA key."""
        key, newest = self.info.key, self.info.newest
        return Recipient(RSA_OAEP_256, "vault", key, newest, self.public_key())


class Keys:
    """Transit's key endpoints for one provider; every ``key`` has matched its grammar.

    Each request has a time limit of its own: creating an RSA key may take longer than ``timeout``.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._settings = session.settings

    def read(self, key: str, *, fresh: bool = False) -> Described:
        """Read one key.

        Args:
            key: the key name.
            fresh: ask the leader, since a standby may lag behind.

        Raises:
            KeyNotFound: there is no such key.
            UnsupportedOperation: the key is of a type that keymgmt does not use.
        """
        native = self._settings.native(key)
        data = self._session.transit("read", native, "get", f"keys/{native}", fresh=fresh)
        kind, versions = data.get("type"), data.get("keys")
        if str(kind) not in KINDS or not isinstance(versions, dict) or data.get("derived"):
            raise UnsupportedOperation(
                f"the Transit key {native!r} is {str(kind)[:40]}, or derived, and is not usable",
                hint=f"usable are keys that are not derived, of the kinds {', '.join(KINDS)}",
            )
        return self._describe(key, native, str(kind), data)

    def _describe(self, key: str, native: str, kind: str, data: Mapping[str, Any]) -> Described:
        newest = _number(data, "latest_version")
        floor = _number(data, "min_decryption_version")
        oldest = max(1, _number({"min_available_version": 0, **data}, "min_available_version"))
        if not oldest <= newest < oldest + _MAX_VERSIONS:
            raise ProviderUnavailable("the server's answer has no sensible versions")
        settings, known = self._settings, data["keys"]
        entry = settings.keys.get(key)
        purpose: Literal["wrap", "sign"] = KINDS[kind]
        if kind in RSA and entry and entry.purpose:
            purpose = entry.purpose
        detail = {"transit": f"{settings.mount}/{native}"}
        if data.get("exportable"):
            detail["exportable"] = "yes: whoever may read transit/export has this key"
        if data.get("allow_plaintext_backup"):
            detail["plaintext backup"] = "allowed: whoever may read transit/backup has this key"
        if data.get("deletion_allowed"):
            detail["deletion"] = "allowed"
        if period := data.get("auto_rotate_period"):
            detail["auto-rotate"] = f"{period} s"
        if data.get("soft_deleted") is True:
            detail[_DELETED] = "yes: restore it before it is used"

        def state(number: int) -> Literal["active", "old", "retired"]:
            if _DELETED in detail or number < floor:
                return "retired"
            return "active" if number == newest else "old"

        versions = tuple(
            KeyVersion(str(number), state(number), _created(known.get(str(number))))
            for number in range(oldest, newest + 1)
        )
        return Described(KeyInfo(key, purpose, kind, versions, detail), native, floor, known)

    def usable(self, key: str, purpose: str | None = None, *, fresh: bool = False) -> Described:
        """``read`` a key that is not soft-deleted, and that is for ``purpose`` if that is given.

        Raises:
            KeyRetired: it was soft-deleted.
            UnsupportedOperation: it is for something else.
        """
        described = self.read(key, fresh=fresh)
        info = described.info
        if _DELETED in info.detail:
            raise refused("soft-deleted", "read", described.native, self._settings, "", "")
        if purpose is not None and purpose != info.purpose:
            error = wrong_purpose(key, info.kind, purpose, KINDS)
            if info.kind in RSA:
                error.hint = (
                    "the config says what an RSA key is for: "
                    f'[providers.{self._session.name}.keys.{key}] purpose = "{purpose}"'
                )
            raise error
        return described

    def create(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """Create a key that cannot be exported; ConfigError if the key exists."""
        check_kind(kind, KINDS, "vault")
        check_options(options, {"auto-rotate": "2160h"}, "vault")
        period = options.get("auto-rotate")
        if period is not None and not _PERIOD.fullmatch(period):
            raise ConfigError(f"{period!r} is not a period", hint="write it as 2160h")
        native = self._settings.native(key)
        # For a key that exists, Transit answers success and changes nothing, so look first.
        with contextlib.suppress(KeyNotFound):
            with contextlib.suppress(UnsupportedOperation):
                self.read(key)
            raise key_exists(key, f"Transit as {native!r}", self._session.name)
        never = ("exportable", "allow_plaintext_backup", "derived")
        body: dict[str, Any] = {"type": kind, **dict.fromkeys(never, False)}
        if period is not None:
            body["auto_rotate_period"] = period
        self._write("create", native, "", body)
        return self.read(key).info

    def _write(self, verb: Verb, native: str, rest: str, body: Mapping[str, Any]) -> None:
        path = f"keys/{native}{rest}"
        self._session.transit(verb, native, "post", path, json=body, operation="change")

    def list(self) -> list[KeyInfo]:
        """Every usable key that may be read, by name; the log names those that may not be read."""
        try:
            data = self._session.transit("list", "", "list", "keys")
        except ProviderError as error:
            # Transit answers 404 without a reason while it has no key at all.
            if isinstance(error.__cause__, Refusal) and error.__cause__.code == "absent":
                return []
            raise
        names = data.get("keys")
        keys = map(self._settings.ours, map(str, names if isinstance(names, list) else []))
        ours = sorted({key for key in keys if key is not None and self._settings.may_hold(key)})
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [info for info in pool.map(self._look, ours) if info is not None]

    def _look(self, key: str) -> KeyInfo | None:
        try:
            return self.read(key).info
        except AccessDenied:
            log.warning("the policy does not allow to read the key %s", key)
        except (UnsupportedOperation, KeyNotFound) as error:
            log.info("left out: %s", error)
        return None

    def rotate(self, key: str) -> KeyInfo:
        """Add a version."""
        before = self.usable(key)
        self._write("rotate", before.native, "/rotate", {})
        return self.read(key).info

    def retire(self, key: str, version: str) -> KeyInfo:
        """Raise ``min_decryption_version`` past the oldest version that is in use."""
        # A standby that lags may answer with an older floor, which would lower the present floor.
        before = self.usable(key, fresh=True)
        known = {entry.version: entry.state for entry in before.info.versions}
        check_retirable(key, version, list(known), self._session.name)
        if known[version] == "retired":
            return before.info
        floor = max(before.floor, int(before.info.versions[0].version))
        if int(version) != floor:
            raise ConfigError(
                f"retiring version {version} would retire the versions before it too",
                hint=f"Transit retires all versions below a floor: retire {floor} first",
            )
        body = {"min_decryption_version": int(version) + 1}
        self._write("retire", before.native, "/config", body)
        return self.read(key).info

    def delete(self, key: str) -> None:
        """Set ``deletion_allowed``, without which Transit refuses, and delete the key."""
        described = self.read(key, fresh=True)
        native = described.native
        allowed = "deletion" in described.info.detail
        if not allowed:
            self._write("retire", native, "/config", {"deletion_allowed": True})
        try:
            path = f"keys/{native}"
            self._session.transit("delete", native, "delete", path, operation="change")
        except ProviderError:
            if not allowed:
                with contextlib.suppress(ProviderError):
                    self._write("retire", native, "/config", {"deletion_allowed": False})
            raise

    def recipient(self, key: str) -> Recipient:
        """The public part of the newest version of an RSA key that wraps."""
        described = self.usable(key, "wrap")
        info = described.info
        if info.kind not in RSA:
            raise no_public_part(key, info.kind, self._session.name, "rsa-3072")
        return described.recipient()

    def sign(self, key: str, message: bytes) -> Signature:
        """Sign with the version whose public key is returned with it."""
        with self._session.connection.operation():
            described = self.usable(key, "sign")
            native, newest, public = described.native, described.info.newest, described.public_key()
            body = {"key_version": int(newest), **_algorithm(described.info.kind, message)}
            data = self._session.transit("sign", native, "post", f"sign/{native}", json=body)
        match = _SIGNATURE.fullmatch(text_of(data, "signature"))
        if match is None or match[1] != newest:
            raise ProviderUnavailable(
                "the server's answer is not a signature of the newest version"
            )
        return Signature(binascii.a2b_base64(match[2]), public)


def _algorithm(kind: str, message: bytes) -> dict[str, Any]:
    if kind == "ed25519":
        return {"input": base64.b64encode(message).decode()}
    bits = "384" if kind == "ecdsa-p384" else "256"
    digest = hashlib.new(f"sha{bits}", message).digest()
    options: dict[str, Any] = {
        "input": base64.b64encode(digest).decode(),
        "prehashed": True,
        "hash_algorithm": f"sha2-{bits}",
    }
    if kind.startswith("ecdsa"):
        return options | {"marshaling_algorithm": "asn1"}
    return options | {"signature_algorithm": "pss", "salt_length": "hash"}


def _number(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or value < 0:
        raise ProviderUnavailable(f"the server's answer has no {name}")
    return value


def _created(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("creation_time")
    if isinstance(entry, int) and 0 < entry < 1 << 40:
        return datetime.fromtimestamp(entry, UTC).isoformat().replace("+00:00", "Z")
    if isinstance(entry, str):
        return entry[:19] + "Z" if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", entry) else None
    return None
