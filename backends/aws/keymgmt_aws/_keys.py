"""Looking after keys of AWS KMS, and signing with them.

What AWS rotates inside of a key is invisible and opens what it ever opened, so a key has one
version here: its id, which all replicas of a multi-Region key share.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keymgmt.backend import (
    RSA_OAEP_256,
    AccessDenied,
    ConfigError,
    KeyInfo,
    KeyNotFound,
    KeyRetired,
    KeyVersion,
    ProviderUnavailable,
    Recipient,
    Signature,
    UnsupportedOperation,
    no_version,
)
from keymgmt_aws._connection import Service, member
from keymgmt_aws._settings import key_id

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["KINDS", "Described", "Keys"]


class _Kind(NamedTuple):
    """A kind of key: its KeySpec, its purpose, and for one that signs the SigningAlgorithm."""

    spec: str
    purpose: Literal["wrap", "sign"]
    algorithm: str = ""

    @property
    def usage(self) -> str:
        return "ENCRYPT_DECRYPT" if self.purpose == "wrap" else "SIGN_VERIFY"


_RSA_BITS: Final = (2048, 3072, 4096)
KINDS: Final[Mapping[str, _Kind]] = {
    "symmetric": _Kind("SYMMETRIC_DEFAULT", "wrap"),
    **{f"rsa-{bits}": _Kind(f"RSA_{bits}", "wrap") for bits in _RSA_BITS},
    "ecdsa-p256": _Kind("ECC_NIST_P256", "sign", "ECDSA_SHA_256"),
    "ecdsa-p384": _Kind("ECC_NIST_P384", "sign", "ECDSA_SHA_384"),
    **{f"rsa-pss-{bits}": _Kind(f"RSA_{bits}", "sign", "RSASSA_PSS_SHA_256") for bits in _RSA_BITS},
    "ml-dsa-65": _Kind("ML_DSA_65", "sign", "ML_DSA_SHAKE_256"),
    "ml-dsa-87": _Kind("ML_DSA_87", "sign", "ML_DSA_SHAKE_256"),
}
DELETION_DAYS: Final = 30
"""The most that AWS KMS waits, and what it waits by itself."""
_RETIRED: Final = ("Disabled", "PendingDeletion", "PendingReplicaDeletion")
_MULTI_REGION: Final = {"yes": True, "no": False}
log: Final = logging.getLogger("keymgmt.aws")


@dataclass(frozen=True)
class Described:
    """A key as AWS KMS describes it."""

    key: str
    arn: str
    id: str
    kind: str
    state: str
    created: str | None
    detail: Mapping[str, str]

    @property
    def purpose(self) -> Literal["wrap", "sign"]:
        """What it is for."""
        return KINDS[self.kind].purpose

    def info(self) -> KeyInfo:
        """The key in the core's words."""
        state: Literal["active", "retired"] = "retired" if self.state in _RETIRED else "active"
        version = KeyVersion(self.id, state, self.created)
        return KeyInfo(self.key, self.purpose, self.kind, (version,), self.detail)

    def usable(self, purpose: str) -> Described:
        """The key itself, where it is for that and can be used."""
        if self.purpose != purpose:
            kinds = ", ".join(name for name, kind in KINDS.items() if kind.purpose == purpose)
            raise UnsupportedOperation(
                f"the key {self.key!r} is {self.kind} and does not {purpose}",
                hint=f"kinds that do: {kinds}",
            )
        if self.state in _RETIRED:
            ends = self.detail.get("deletion")
            how = "disabled" if self.state == "Disabled" else "pending deletion"
            raise KeyRetired(
                f"the key {self.key!r} is {how}{f' on {ends}' if ends else ''} ({self.arn})",
                hint="enable it, or cancel its deletion, in AWS KMS, if it should be used again",
            )
        if self.state not in ("Enabled", "Updating"):
            raise ProviderUnavailable(
                f"the key {self.key!r} is in the state {self.state} in AWS KMS",
                hint="look at its key material, or at its key store",
            )
        return self


class Keys:
    """The keys of one provider; every ``key`` has matched its grammar."""

    def __init__(self, name: str, settings: AwsSettings) -> None:
        self._name, self._settings = name, settings

    def describe(self, kms: Service, key: str) -> Described:
        """One key; KeyNotFound if it is not there, UnsupportedOperation if it is no use to us."""
        native = self._settings.native(key)
        return _described(key, native, kms("describe", native, "describe_key", KeyId=native))

    def create(self, kms: Service, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """Make a key and its alias; ConfigError if there is one."""
        if kind not in KINDS:
            raise ConfigError(f"keys are not of kind {kind[:40]!r}", hint=", ".join(KINDS))
        unknown = set(options) - {"multi-region"}
        multi_region = options.get("multi-region", "no")
        if unknown or multi_region not in _MULTI_REGION:
            raise ConfigError(
                f"no option {min(unknown)!r}"
                if unknown
                else f"multi-region is not {multi_region!r}",
                hint="known: multi-region=yes",
            )
        alias = self._settings.native(key)
        if not alias.startswith("alias/"):
            raise ConfigError(
                f"the config says which key {key!r} is: {alias}", hint="choose another name"
            )
        try:
            self.describe(kms, key)
        except KeyNotFound:
            pass
        except UnsupportedOperation as error:
            raise ConfigError(f"{alias} is there already, and no use here") from error
        else:
            raise ConfigError(
                f"there is a key {alias} already",
                hint=f"choose another name; see: keymgmt keys show {self._name}:{key}",
            )
        made = kms(
            "create",
            alias,
            "create_key",
            KeySpec=KINDS[kind].spec,
            KeyUsage=KINDS[kind].usage,
            MultiRegion=_MULTI_REGION[multi_region],
            Description=f"keymgmt {key}",
        )
        arn = member(member(made, "KeyMetadata", dict), "Arn", str)
        try:
            kms("create", alias, "create_alias", AliasName=alias, TargetKeyId=key_id(arn))
        except Exception:
            log.warning("the key %s was made, and has no alias: give it one, or delete it", arn)
            raise
        # Not asked by the alias, which AWS KMS may not know for a while.
        return _described(key, alias, made).info()

    def list(self, kms: Service) -> list[KeyInfo]:
        """Every key that we can use and may look at, by name; others are named in the log."""
        names = {*self._settings.keys, *filter(None, map(self._settings.ours, _aliases(kms)))}
        found: list[KeyInfo] = []
        for key in sorted(names):
            try:
                found.append(self.describe(kms, key).info())
            except AccessDenied:
                log.warning("we may not look at %s", key)
            except (UnsupportedOperation, KeyNotFound) as error:
                log.info("left out: %s", error)
        return found

    def rotate(self, kms: Service, key: str) -> KeyInfo:
        """Ask AWS to rotate the key material now; what it rotated stays in the key."""
        described = self.describe(kms, key)
        if described.kind != "symmetric" or "origin" in described.detail:
            raise UnsupportedOperation(
                f"AWS KMS rotates symmetric keys that it made, and {key!r} is {described.kind}",
                hint="make a new key: keymgmt keys create PROVIDER:KEY",
            )
        kms("rotate", described.arn, "rotate_key_on_demand", KeyId=described.id)
        return self.describe(kms, key).info()

    def refuse_to_retire(self, kms: Service, key: str, version: str) -> KeyInfo:
        """Say why nothing is retired; KeyNotFound where there is no such version."""
        described = self.describe(kms, key)
        if version != described.id:
            raise no_version(key, version, [described.id])
        raise UnsupportedOperation(
            f"AWS KMS retires no version of a key: {key!r} opens all that it ever wrapped",
            hint="make a new key: keymgmt keys create PROVIDER:NEW; move to it: keymgmt rewrap "
            f"MODEL --add PROVIDER:NEW --drop aws:{key}@{version}; then disable the old one in AWS",
        )

    def delete(self, kms: Service, key: str) -> str:
        """Have the key deleted after ``DELETION_DAYS``; the time of it.

        Its alias stays, so that a key whose deletion is cancelled is found again.
        """
        described = self.describe(kms, key)
        if ends := described.detail.get("deletion"):
            return ends
        answer = kms(
            "delete",
            described.arn,
            "schedule_key_deletion",
            KeyId=described.id,
            PendingWindowInDays=DELETION_DAYS,
        )
        if ends := _time(answer.get("DeletionDate")):
            return ends
        raise ProviderUnavailable("the answer of AWS does not say when the key is deleted")

    def public_key(self, kms: Service, described: Described) -> bytes:
        """DER SubjectPublicKeyInfo of a key that has one."""
        answer = kms("describe", described.arn, "get_public_key", KeyId=described.arn)
        return member(answer, "PublicKey", bytes)

    def recipient(self, kms: Service, described: Described) -> Recipient:
        """The public part of a key that wraps."""
        if described.usable("wrap").kind == "symmetric":
            raise UnsupportedOperation(
                f"the key {described.key!r} is symmetric and has no public part",
                hint="make one of kind rsa-3072: keymgmt keys create PROVIDER:KEY --kind rsa-3072",
            )
        public = self.public_key(kms, described)
        return Recipient(RSA_OAEP_256, "aws", described.key, described.id, public)

    def sign(self, kms: Service, key: str, message: bytes) -> Signature:
        """Sign a digest that is made here, whatever the message's size."""
        described = self.describe(kms, key).usable("sign")
        public = self.public_key(kms, described)
        kind, digest = _digest(described.kind, public, message)
        answer = kms(
            "sign",
            described.arn,
            "sign",
            KeyId=described.arn,
            Message=digest,
            MessageType=kind,
            SigningAlgorithm=KINDS[described.kind].algorithm,
        )
        return Signature(member(answer, "Signature", bytes), public)


def _described(key: str, native: str, answer: dict[str, Any]) -> Described:
    """The key of an answer that has KeyMetadata."""
    data = member(answer, "KeyMetadata", dict)
    kind = next(
        (
            name
            for name, kind in KINDS.items()
            if (kind.spec, kind.usage) == (data.get("KeySpec"), data.get("KeyUsage"))
        ),
        None,
    )
    if kind is None:
        raise UnsupportedOperation(
            f"{native} is {data.get('KeySpec')} for {data.get('KeyUsage')}: of no use here",
            hint=f"kinds that are: {', '.join(KINDS)}",
        )
    arn = member(data, "Arn", str)
    found = key_id(arn)
    if found is None:
        raise ProviderUnavailable("the answer of AWS has no ARN of a key")
    detail = {"arn": arn, "state": member(data, "KeyState", str)}
    if data.get("Origin", "AWS_KMS") != "AWS_KMS":
        detail["origin"] = str(data["Origin"])
    if data.get("MultiRegion"):
        more = data.get("MultiRegionConfiguration") or {}
        detail["multi-Region"] = str(more.get("MultiRegionKeyType", "yes")).lower()
    if ends := _time(data.get("DeletionDate")):
        detail["deletion"] = ends
    created = _time(data.get("CreationDate"))
    return Described(key, arn, found, kind, detail["state"], created, detail)


def _aliases(kms: Service) -> Iterator[str]:
    page: dict[str, str] = {}
    while True:
        answer = kms("list", "this login", "list_aliases", **page)
        for entry in answer.get("Aliases") or ():
            yield str(entry.get("AliasName"))
        if not answer.get("Truncated"):
            return
        page = {"Marker": member(answer, "NextMarker", str)}


def _digest(kind: str, public: bytes, message: bytes) -> tuple[str, bytes]:
    """The MessageType and what is sent for ``message``, which may be longer than AWS KMS takes."""
    if not kind.startswith("ml-dsa"):
        digest = hashes.Hash(hashes.SHA384() if kind == "ecdsa-p384" else hashes.SHA256())
        digest.update(message)
        return "DIGEST", digest.finalize()
    try:
        key = load_der_public_key(public)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProviderUnavailable("the answer of AWS is no public key") from error
    if not isinstance(key, (mldsa.MLDSA65PublicKey, mldsa.MLDSA87PublicKey)):
        raise ProviderUnavailable("the answer of AWS is no public key of its kind")
    # FIPS 204, algorithm 7, line 6, with an empty context.
    identity = hashlib.shake_256(key.public_bytes_raw()).digest(64)
    return "EXTERNAL_MU", hashlib.shake_256(identity + b"\0\0" + message).digest(64)


def _time(value: Any) -> str | None:
    if not isinstance(value, datetime):
        return None
    return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
