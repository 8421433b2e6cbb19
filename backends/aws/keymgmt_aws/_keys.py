"""Looking after keys of AWS KMS, and signing with them.

What AWS rotates inside of a key is invisible and opens what it ever opened, so a key has one
version here: its id, which all replicas of a multi-Region key share.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

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
    check_kind,
    no_version,
)
from keymgmt_aws._connection import Service, member
from keymgmt_aws._settings import SYMMETRIC, key_id

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["KINDS", "Keys", "usable"]

_Purpose: TypeAlias = Literal["wrap", "sign"]
_RSA: Final = (2048, 3072, 4096)
# kind -> its purpose, its KeySpec, and for one that signs its SigningAlgorithm.
_SPECS: Final[Mapping[str, tuple[_Purpose, str, str]]] = {
    "symmetric": ("wrap", SYMMETRIC, ""),
    **{f"rsa-{bits}": ("wrap", f"RSA_{bits}", "") for bits in _RSA},
    "ecdsa-p256": ("sign", "ECC_NIST_P256", "ECDSA_SHA_256"),
    "ecdsa-p384": ("sign", "ECC_NIST_P384", "ECDSA_SHA_384"),
    **{f"rsa-pss-{bits}": ("sign", f"RSA_{bits}", "RSASSA_PSS_SHA_256") for bits in _RSA},
    "ml-dsa-65": ("sign", "ML_DSA_65", "ML_DSA_SHAKE_256"),
    "ml-dsa-87": ("sign", "ML_DSA_87", "ML_DSA_SHAKE_256"),
}
KINDS: Final[Mapping[str, _Purpose]] = {kind: purpose for kind, (purpose, *_) in _SPECS.items()}
_ML_DSA: Final = {"ml-dsa-65": 1952, "ml-dsa-87": 2592}
"""The size of the key itself, which ends its SubjectPublicKeyInfo (RFC 9881)."""
_USAGES: Final = {"wrap": "ENCRYPT_DECRYPT", "sign": "SIGN_VERIFY"}
_RETIRED: Final = ("Disabled", "PendingDeletion", "PendingReplicaDeletion")
log: Final = logging.getLogger("keymgmt.aws")


def usable(info: KeyInfo, purpose: str) -> KeyInfo:
    """The key itself, where it is for that and can be used now; else what it is or its state."""
    if info.purpose != purpose:
        kinds = ", ".join(name for name, does in KINDS.items() if does == purpose)
        raise UnsupportedOperation(
            f"the key {info.key!r} is {info.kind} and does not {purpose}",
            hint=f"kinds that do: {kinds}",
        )
    state, ends = info.detail["state"], info.detail.get("deletion")
    if state in _RETIRED:
        how = "disabled" if state == "Disabled" else "pending deletion"
        how += f" on {ends}" if ends else ""
        raise KeyRetired(
            f"the key {info.key!r} is {how} ({info.detail['arn']})",
            hint="enable it, or cancel its deletion, in AWS KMS, if it should be used again",
        )
    if state not in ("Enabled", "Updating"):
        raise ProviderUnavailable(
            f"the key {info.key!r} is in the state {state} in AWS KMS",
            hint="look at its key material, or at its key store",
        )
    return info


class Keys:
    """The keys of one provider; every ``key`` has matched its grammar."""

    def __init__(self, name: str, settings: AwsSettings) -> None:
        self._name, self._settings = name, settings

    def describe(self, kms: Service, key: str) -> KeyInfo:
        """One key; KeyNotFound if it is not there, UnsupportedOperation if it is no use to us."""
        native = self._settings.native(key)
        return _described(key, native, kms("describe", native, "describe_key", KeyId=native))

    def create(self, kms: Service, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """Make a key and its alias; ConfigError if there is one."""
        check_kind(kind, KINDS, "aws")
        multi_region = {"yes": True, "no": False}.get(options.get("multi-region", "no"))
        if set(options) - {"multi-region"} or multi_region is None:
            said = ", ".join(f"{name}={value}"[:80] for name, value in options.items())
            raise ConfigError(f"no such option: {said}", hint="known: multi-region=yes")
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
        purpose, spec, _ = _SPECS[kind]
        about = {"KeySpec": spec, "KeyUsage": _USAGES[purpose], "MultiRegion": multi_region}
        made = kms("create", alias, "create_key", Description=f"keymgmt {key}", **about)
        # Not asked by the alias, which AWS KMS may not know for a while.
        info = _described(key, alias, made)
        try:
            kms("create", alias, "create_alias", AliasName=alias, TargetKeyId=info.newest)
        except Exception:
            arn = info.detail["arn"]
            log.warning("the key %s was made, and has no alias: give it one, or delete it", arn)
            raise
        return info

    def list(self, kms: Service) -> list[KeyInfo]:
        """Every key that we can use and may look at, by name; others are named in the log."""
        names = {*self._settings.keys, *filter(None, map(self._settings.ours, _aliases(kms)))}
        found: list[KeyInfo] = []
        for key in sorted(names):
            try:
                found.append(self.describe(kms, key))
            except AccessDenied:
                log.warning("we may not look at %s", key)
            except (UnsupportedOperation, KeyNotFound) as error:
                log.info("left out: %s", error)
        return found

    def rotate(self, kms: Service, key: str) -> KeyInfo:
        """Ask AWS to rotate the key material now; what it rotated stays in the key."""
        info = self.describe(kms, key)
        if info.kind != "symmetric" or "origin" in info.detail:
            raise UnsupportedOperation(
                f"AWS KMS rotates symmetric keys that it made, and {key!r} is {info.kind}",
                hint="make a new key: keymgmt keys create PROVIDER:KEY",
            )
        kms("rotate", info.detail["arn"], "rotate_key_on_demand", KeyId=info.newest)
        return self.describe(kms, key)

    def refuse_to_retire(self, kms: Service, key: str, version: str) -> KeyInfo:
        """Say why nothing is retired; KeyNotFound where there is no such version."""
        info = self.describe(kms, key)
        if version != info.newest:
            raise no_version(key, version, [info.newest])
        raise UnsupportedOperation(
            f"AWS KMS retires no version of a key: {key!r} opens all that it ever wrapped",
            hint="make a new key: keymgmt keys create PROVIDER:NEW; move to it: keymgmt rewrap "
            f"MODEL --add PROVIDER:NEW --drop aws:{key}@{version}; then disable the old one in AWS",
        )

    def delete(self, kms: Service, key: str) -> str:
        """Have the key deleted after 30 days, the most that AWS KMS waits; the time of it.

        Its alias stays, so that a key whose deletion is cancelled is found again.
        """
        info = self.describe(kms, key)
        if ends := info.detail.get("deletion"):
            return ends
        there = info.detail.get("replicas")
        if there and info.detail["multi-Region"] == "primary":
            raise UnsupportedOperation(
                f"the key {key!r} has replicas, after which AWS KMS would delete it: {there}",
                hint="have AWS KMS delete the replicas first",
            )
        request = {"KeyId": info.newest, "PendingWindowInDays": 30}
        answer = kms("delete", info.detail["arn"], "schedule_key_deletion", **request)
        if ends := _time(answer.get("DeletionDate")):
            return ends
        raise ProviderUnavailable("the answer of AWS does not say when the key is deleted")

    def public_key(self, kms: Service, info: KeyInfo) -> bytes:
        """DER SubjectPublicKeyInfo of a key that has one."""
        arn = info.detail["arn"]
        return member(kms("describe", arn, "get_public_key", KeyId=arn), "PublicKey", bytes)

    def recipient(self, kms: Service, info: KeyInfo) -> Recipient:
        """The public part of a key that wraps."""
        if usable(info, "wrap").kind == "symmetric":
            raise UnsupportedOperation(
                f"the key {info.key!r} is symmetric and has no public part",
                hint="make one of kind rsa-3072: keymgmt keys create PROVIDER:KEY --kind rsa-3072",
            )
        return Recipient(RSA_OAEP_256, "aws", info.key, info.newest, self.public_key(kms, info))

    def signer(self, kms: Service, key: str, version: str | None) -> tuple[KeyInfo, bytes]:
        """A key that signs, and its public key; KeyNotFound where it has no such version."""
        info = usable(self.describe(kms, key), "sign")
        if version not in (None, info.newest):
            raise no_version(key, str(version), [info.newest])
        return info, self.public_key(kms, info)

    def sign(self, kms: Service, key: str, message: bytes) -> Signature:
        """Sign a digest that is made here, whatever the message's size."""
        info, public = self.signer(kms, key, None)
        arn = info.detail["arn"]
        kind, digest = _digest(info.kind, public, message)
        how = {"MessageType": kind, "SigningAlgorithm": _SPECS[info.kind][2]}
        answer = kms("sign", arn, "sign", KeyId=arn, Message=digest, **how)
        return Signature(member(answer, "Signature", bytes), public)


def _described(key: str, native: str, answer: dict[str, Any]) -> KeyInfo:
    """The key of an answer that has KeyMetadata; its one version is its id."""
    data = member(answer, "KeyMetadata", dict)
    told = data.get("KeySpec"), data.get("KeyUsage")
    kinds = (kind for kind, (does, spec, _) in _SPECS.items() if (spec, _USAGES[does]) == told)
    kind = next(kinds, None)
    if kind is None:
        raise UnsupportedOperation(
            f"{native} is {told[0]} for {told[1]}: of no use here",
            hint=f"kinds that are: {', '.join(KINDS)}",
        )
    detail = {"arn": member(data, "Arn", str), "state": member(data, "KeyState", str)}
    found = key_id(detail["arn"])
    if found is None:
        raise ProviderUnavailable("the answer of AWS has no ARN of a key")
    if data.get("Origin", "AWS_KMS") != "AWS_KMS":
        detail["origin"] = str(data["Origin"])
    if data.get("MultiRegion"):
        more = data.get("MultiRegionConfiguration") or {}
        detail["multi-Region"] = str(more.get("MultiRegionKeyType", "yes")).lower()
        if replicas := [str(each.get("Region")) for each in more.get("ReplicaKeys") or ()]:
            detail["replicas"] = ", ".join(replicas)
    if ends := _time(data.get("DeletionDate")):
        detail["deletion"] = ends
    state: Literal["active", "retired"] = "retired" if detail["state"] in _RETIRED else "active"
    version = KeyVersion(found, state, _time(data.get("CreationDate")))
    return KeyInfo(key, KINDS[kind], kind, (version,), detail)


def _aliases(kms: Service) -> Iterator[str]:
    page: dict[str, Any] = {"Limit": 100}
    while True:
        answer = kms("list", "this login", "list_aliases", **page)
        for entry in answer.get("Aliases") or ():
            yield str(entry.get("AliasName"))
        if not answer.get("Truncated"):
            return
        page["Marker"] = member(answer, "NextMarker", str)


def _digest(kind: str, public: bytes, message: bytes) -> tuple[str, bytes]:
    """The MessageType and what is sent for ``message``, which may be longer than AWS KMS takes."""
    if kind not in _ML_DSA:
        make = hashlib.sha384 if kind == "ecdsa-p384" else hashlib.sha256
        return "DIGEST", make(message).digest()
    # FIPS 204, algorithm 7, line 6, with an empty context.
    identity = hashlib.shake_256(public[-_ML_DSA[kind] :]).digest(64)
    return "EXTERNAL_MU", hashlib.shake_256(identity + b"\0\0" + message).digest(64)


def _time(value: Any) -> str | None:
    return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if isinstance(value, datetime) else None
