"""Looking after keys of AWS KMS, and signing with them.

AWS rotates key material inside of a key and shows nothing of it, and the key still decrypts all old
ciphertexts. So a key has one version here: its key id, which all replicas of a multi-Region key
share.
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
    check_options,
    key_exists,
    no_public_part,
    no_version,
    wrong_purpose,
)
from keymgmt_aws._connection import Service, member
from keymgmt_aws._settings import SYMMETRIC, key_id

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["KINDS", "Keys", "usable"]

_Purpose: TypeAlias = Literal["wrap", "sign"]
_RSA: Final = (2048, 3072, 4096)
# kind -> its purpose, its KeySpec, and for a signing kind its SigningAlgorithm.
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
"""The length in bytes of the raw key, which is the end of its SubjectPublicKeyInfo (RFC 9881)."""
_USAGES: Final = {"wrap": "ENCRYPT_DECRYPT", "sign": "SIGN_VERIFY"}
_RETIRED: Final = ("Disabled", "PendingDeletion", "PendingReplicaDeletion")
log: Final = logging.getLogger("keymgmt.aws")


def usable(info: KeyInfo, purpose: str) -> KeyInfo:
    """The key itself, if it is for ``purpose`` and can be used now.

    Raises:
        UnsupportedOperation: it has another purpose.
        KeyRetired: it is disabled or will be deleted.
        ProviderUnavailable: it is in another state.
    """
    if info.purpose != purpose:
        raise wrong_purpose(info.key, info.kind, purpose, KINDS)
    state, ends = info.detail["state"], info.detail.get("deletion")
    if state in _RETIRED:
        condition = "disabled" if state == "Disabled" else "pending deletion"
        condition += f" on {ends}" if ends else ""
        raise KeyRetired(
            f"the key {info.key!r} is {condition} ({info.detail['arn']})",
            hint="to use it again, enable it or cancel its deletion in AWS KMS",
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
        """One key; KeyNotFound if there is none, UnsupportedOperation if it is not usable."""
        native = self._settings.native(key)
        return _described(key, native, kms("describe", native, "describe_key", KeyId=native))

    def create(self, kms: Service, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """Create a key and its alias; ConfigError if the alias exists."""
        check_kind(kind, KINDS, "aws")
        check_options(options, {"multi-region": "yes"}, "aws")
        multi_region = {"yes": True, "no": False}.get(options.get("multi-region", "no"))
        if multi_region is None:
            raise ConfigError("multi-region is neither yes nor no", hint="say multi-region=yes")
        alias = self._settings.native(key)
        if not alias.startswith("alias/"):
            raise ConfigError(
                f"the config already gives {key!r} a key: {alias}", hint="choose another name"
            )
        try:
            self.describe(kms, key)
        except KeyNotFound:
            pass
        except UnsupportedOperation as error:
            raise ConfigError(f"{alias} exists already, and is not usable") from error
        else:
            raise key_exists(key, f"AWS KMS as {alias}", self._name)
        purpose, spec, _ = _SPECS[kind]
        about = {"KeySpec": spec, "KeyUsage": _USAGES[purpose], "MultiRegion": multi_region}
        created = kms("create", alias, "create_key", Description=f"keymgmt {key}", **about)
        # The key is not described by its alias, which AWS KMS may not know yet (it is eventually
        # consistent).
        info = _described(key, alias, created)
        try:
            kms("create", alias, "create_alias", AliasName=alias, TargetKeyId=info.newest)
        except Exception:
            arn = info.detail["arn"]
            log.warning("the key %s was made without an alias: give it an alias, or delete it", arn)
            raise
        return info

    def list(self, kms: Service) -> list[KeyInfo]:
        """Every usable key that may be described, by name; the log names the others."""
        names = {*self._settings.keys, *filter(None, map(self._settings.ours, _aliases(kms)))}
        keys: list[KeyInfo] = []
        for key in sorted(names):
            try:
                keys.append(self.describe(kms, key))
            except AccessDenied:
                log.warning("this login may not describe the key %s", key)
            except (UnsupportedOperation, KeyNotFound) as error:
                log.info("left out: %s", error)
        return keys

    def rotate(self, kms: Service, key: str) -> KeyInfo:
        """Have AWS rotate the key material now; the old material stays in the key."""
        info = self.describe(kms, key)
        if info.kind != "symmetric" or "origin" in info.detail:
            raise UnsupportedOperation(
                f"AWS KMS rotates symmetric keys that it made, and {key!r} is {info.kind}",
                hint="make a new key: keymgmt keys create PROVIDER:KEY",
            )
        kms("rotate", info.detail["arn"], "rotate_key_on_demand", KeyId=info.newest)
        return self.describe(kms, key)

    def refuse_to_retire(self, kms: Service, key: str, version: str) -> KeyInfo:
        """Raise UnsupportedOperation with a hint; KeyNotFound if there is no such version."""
        info = self.describe(kms, key)
        if version != info.newest:
            raise no_version(key, version, [info.newest])
        raise UnsupportedOperation(
            f"AWS KMS cannot retire a version of a key: {key!r} opens all that it ever wrapped",
            hint="make a new key: keymgmt keys create PROVIDER:NEW; move to it: keymgmt rewrap "
            f"MODEL --add PROVIDER:NEW --drop aws:{key}@{version}; then disable the old one in AWS",
        )

    def delete(self, kms: Service, key: str) -> str:
        """Have the key deleted after 30 days, the longest delay of AWS KMS; returns the time.

        Its alias stays, so that the key has its name again if the deletion is cancelled.
        """
        info = self.describe(kms, key)
        if ends := info.detail.get("deletion"):
            return ends
        replicas = info.detail.get("replicas")
        if replicas and info.detail["multi-Region"] == "primary":
            raise UnsupportedOperation(
                f"AWS KMS does not delete the key {key!r} before its replicas in {replicas}",
                hint="delete the replicas in AWS KMS first",
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
            raise no_public_part(info.key, info.kind, self._name, "rsa-3072")
        return Recipient(RSA_OAEP_256, "aws", info.key, info.newest, self.public_key(kms, info))

    def signer(self, kms: Service, key: str, version: str | None) -> tuple[KeyInfo, bytes]:
        """A key that signs, and its public key; KeyNotFound where it has no such version."""
        info = usable(self.describe(kms, key), "sign")
        if version not in (None, info.newest):
            raise no_version(key, str(version), [info.newest])
        return info, self.public_key(kms, info)

    def sign(self, kms: Service, key: str, message: bytes) -> Signature:
        """Sign a digest that is computed here, so the message may have any size."""
        info, public = self.signer(kms, key, None)
        arn = info.detail["arn"]
        kind, digest = _digest(info.kind, public, message)
        algorithm = {"MessageType": kind, "SigningAlgorithm": _SPECS[info.kind][2]}
        answer = kms("sign", arn, "sign", KeyId=arn, Message=digest, **algorithm)
        return Signature(member(answer, "Signature", bytes), public)


def _described(key: str, native: str, answer: dict[str, Any]) -> KeyInfo:
    """The key of an answer that has KeyMetadata; its only version is its key id."""
    data = member(answer, "KeyMetadata", dict)
    stated = data.get("KeySpec"), data.get("KeyUsage")
    kinds = (kind for kind, (does, spec, _) in _SPECS.items() if (spec, _USAGES[does]) == stated)
    kind = next(kinds, None)
    if kind is None:
        raise UnsupportedOperation(
            f"{native} is {stated[0]} for {stated[1]}, and is not usable",
            hint=f"usable kinds are: {', '.join(KINDS)}",
        )
    detail = {"arn": member(data, "Arn", str), "state": member(data, "KeyState", str)}
    identifier = key_id(detail["arn"])
    if identifier is None:
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
    version = KeyVersion(identifier, state, _time(data.get("CreationDate")))
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
    """The MessageType and the digest for a message, which AWS KMS would limit to 4096 bytes."""
    if kind not in _ML_DSA:
        algorithm = hashlib.sha384 if kind == "ecdsa-p384" else hashlib.sha256
        return "DIGEST", algorithm(message).digest()
    # FIPS 204, algorithm 7, line 6, with an empty context.
    identity = hashlib.shake_256(public[-_ML_DSA[kind] :]).digest(64)
    return "EXTERNAL_MU", hashlib.shake_256(identity + b"\0\0" + message).digest(64)


def _time(value: Any) -> str | None:
    return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if isinstance(value, datetime) else None
