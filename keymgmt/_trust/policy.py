"""Whether a sealed model may be used at all, decided before any key service is asked.

Signature of a publisher trusted for this name, and until when he vouches; expected name; release
floor: in this order.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._config.calls import call_provider
from keymgmt._crypto.signatures import PublicKey, verify_signature
from keymgmt._providers.names import is_key
from keymgmt._system.audit import audit
from keymgmt.errors import ConfigError, ModelExpired, RollbackError, UntrustedPublisher
from keymgmt.sealed.signatures import Signatures, expiry_bytes, signed_bytes

if TYPE_CHECKING:
    from keymgmt._config.config import Config, Policy
    from keymgmt._providers.names import KeyRef
    from keymgmt.sealed.manifest import Manifest

__all__ = [
    "Publisher",
    "Vouched",
    "check_expiry",
    "check_name",
    "check_release",
    "check_signature",
    "check_signer",
    "load_publishers",
]

_LOGGER: Final = logging.getLogger("keymgmt")


@dataclass(frozen=True)
class Publisher:
    """A trusted public key, the file it came from, and the model names it may publish."""

    file: Path
    key: PublicKey
    names: tuple[str, ...]

    def may_publish(self, name: str) -> bool:
        """Whether this publisher is trusted for models of that name."""
        return "*" in self.names or name in self.names


def load_publishers(config: Config) -> list[Publisher]:
    """Read the public keys of ``[policy] publishers``; ConfigError naming the file."""
    found = []
    for name, models in config.policy.publishers.items():
        for model in models:
            if model != "*" and not is_key(model):
                raise ConfigError(f"[policy] publishers: {name}: not a model name: {model[:80]!r}")
        found.append(Publisher(Path(name), PublicKey(config.public_key(name)), tuple(models)))
    return found


@dataclass(frozen=True)
class Vouched:
    """Who vouches for a model, and until when.

    Attributes:
        publishers: trusted for its name, each with a valid signature; as many as the config wants.
        expires: when the first of them no longer does, or None; where that is past, and the config
            only warns of it, when the last of them did.
    """

    publishers: tuple[Publisher, ...]
    expires: str | None = None

    @property
    def name(self) -> str:
        """The file names of their keys."""
        return " and ".join(publisher.file.name for publisher in self.publishers)


def check_signer(config: Config, reference: KeyRef) -> PublicKey:
    """The newest version of a signing key; UntrustedPublisher where this config trusts it not.

    Raises:
        UntrustedPublisher: what it signs does not open here.
        ConfigError, ProviderError: the config is wrong, or the provider does not say.
    """
    key = reference.key
    made = PublicKey(call_provider(config, reference.provider, lambda p: p.public_key(key)))
    if config.policy.require_signature and made.id not in {
        publisher.key.id for publisher in load_publishers(config)
    }:
        raise UntrustedPublisher(
            f"this config does not trust the newest version of {reference}, so what it signs does "
            "not open here",
            hint=f"export it with: keymgmt keys export {reference} --format pem -o NEW.pem; and "
            "name NEW.pem in [policy] publishers",
        )
    return made


def check_signature(
    manifest: Manifest,
    data: bytes,
    signatures: Signatures,
    publishers: list[Publisher],
    count: int = 1,
) -> list[Publisher]:
    """Find valid signatures of publishers trusted for this model's name, each with another key.

    Args:
        manifest: the parsed manifest.
        data: its bytes, which are what is signed.
        signatures: what came with it.
        publishers: whom the config trusts.
        count: how many must have signed.

    Raises:
        UntrustedPublisher: unsigned; unknown signer; a signer not for this name, or too few; a bad
            signature; an algorithm that the profile does not allow.
    """
    name = manifest.name
    if not signatures.signatures:
        raise UntrustedPublisher(
            f"{name} is not signed",
            hint="have its publisher run `keymgmt sign`, and fetch signatures.json again",
        )
    signed = {signature.key_id: signature.signature for signature in signatures.signatures}
    # One key in two files is one publisher, for all names of both.
    known = {p.key.id: p for p in publishers if p.key.id in signed and not p.may_publish(name)}
    known |= {p.key.id: p for p in publishers if p.key.id in signed and p.may_publish(name)}
    allowed = [p for p in known.values() if p.key.algorithm in manifest.rules.signatures]
    message = signed_bytes(data)
    valid = [p for p in allowed if verify_signature(p.key.der, message, signed[p.key.id])]
    good = [publisher for publisher in valid if publisher.may_publish(name)]
    if len(good) >= count:
        return good
    if good:
        files = ", ".join(publisher.file.name for publisher in good)
        raise UntrustedPublisher(
            f"{name} is signed by {len(good)} of the {count} publishers that must sign it: {files}",
            hint="have another one of them run `keymgmt sign`",
        )
    if valid:
        raise UntrustedPublisher(
            f"{valid[0].file.name} signed {name}, but is not trusted to publish that name",
            hint=f"if it should be, add {name!r} to its names in [policy] publishers",
        )
    if allowed:
        raise UntrustedPublisher(
            f"the signature of {allowed[0].file.name} on {name} is not valid",
            hint="manifest.json or the signature was changed; fetch the sealed model again",
        )
    for publisher in known.values():
        raise UntrustedPublisher(
            f"{publisher.file.name} signed {name} by {publisher.key.algorithm}, which its profile "
            f"{manifest.profile} does not allow",
            hint=f"have it signed with a key of {', '.join(sorted(manifest.rules.signatures))}",
        )
    signers = ", ".join(key_id[:16] for key_id in signed)
    raise UntrustedPublisher(
        f"{name} is signed by nobody that this config trusts (signed by {signers})",
        hint="add the publisher's public key to [policy] publishers if you trust it"
        if publishers
        else "the config names no [policy] publishers",
    )


def check_expiry(
    manifest: Manifest,
    digest: bytes,
    signatures: Signatures,
    signed: list[Publisher],
    policy: Policy,
    clock: tuple[str, str | None],
) -> Vouched:
    """Leave out the publishers whose time has passed; enough must be left.

    Args:
        manifest: the parsed manifest.
        digest: its hash.
        signatures: what came with it.
        signed: whose signatures are valid.
        policy: how many there must be, whether they must have stated a time, and what happens.
        clock: the time now, and the highest time seen on this machine, if that is remembered.

    Raises:
        ModelExpired: too few are left.
        UntrustedPublisher: a statement is not of the key under whose id it is.
    """
    name, (now, seen) = manifest.name, clock
    strict, problems = name in policy.require_expiry, []
    left: list[tuple[Publisher, str | None]] = []
    latest: str | None = None
    if seen is not None and now < seen:
        problem = f"the clock says {now}, and {seen} was seen on this machine before"
        _say(policy, name, problem, refuse=strict, hint="set the clock")
    for publisher in signed:
        stated = signatures.expiry(publisher.key.id)
        expires = stated.expires if stated else None
        if stated is None or expires is None:
            if not strict:
                left.append((publisher, None))
            problems.append(f"{publisher.file.name} did not say until when")
            continue
        message = expiry_bytes(digest, expires)
        if not verify_signature(publisher.key.der, message, stated.signature):
            raise UntrustedPublisher(
                f"the expiry of {publisher.file.name} on {name} is not valid",
                hint="signatures.json was changed; fetch the sealed model again",
            )
        latest = max(latest or expires, expires)
        if now < expires:
            left.append((publisher, expires))
        problems.append(f"{publisher.file.name} vouched for it until {expires}")
    count = policy.signatures.get(name, 1)
    if len(left) < count:
        _say(policy, name, "; ".join(problems), refuse=True, hint=_RENEW)
        return Vouched(tuple(signed), latest)
    # Those that never expire first, then the longest: the model lasts as long as its count-th.
    left.sort(key=lambda one: one[1] or "~", reverse=True)
    return Vouched(tuple(publisher for publisher, _ in left[:count]), left[count - 1][1])


_RENEW: Final = "its publisher renews it with: keymgmt sign MODEL PROVIDER:KEY --expires 30d"


def _say(policy: Policy, name: str, problem: str, *, refuse: bool, hint: str) -> None:
    error = ModelExpired(f"{name} has expired: {problem}", hint=hint)
    if refuse and policy.expired == "refuse":
        raise error
    audit("expired", error=error, name=name, reason=problem)
    _LOGGER.warning("%s: %s", name, problem)


def check_name(manifest: Manifest, expected: str | None, config: Config) -> None:
    """UntrustedPublisher unless the model is the one that was asked for and is allowed here."""
    if expected is not None and manifest.name != expected:
        raise UntrustedPublisher(
            f"this is the model {manifest.name}, not {expected}",
            hint="somebody put another model in its place, or the wrong name was asked for",
        )
    names = config.policy.names
    if names and manifest.name not in names:
        raise UntrustedPublisher(
            f"this config does not open models named {manifest.name}",
            hint=f"[policy] names allows: {', '.join(names)}",
        )


def check_release(manifest: Manifest, config: Config, remembered: int | None) -> None:
    """RollbackError if the release is under the configured or the remembered floor."""
    floors = config.policy.minimum_release
    if floors and manifest.name not in floors:
        raise RollbackError(
            f"{manifest.name} has no entry in [policy] minimum_release, where others have",
            hint=f"add `{manifest.name} = {manifest.release}` to it",
        )
    floor = max(floors.get(manifest.name, 0), remembered or 0)
    if manifest.release < floor:
        raise RollbackError(
            f"release {manifest.release} of {manifest.name} is older than release {floor}",
            hint="fetch the current release; an old one may have been put back on purpose",
        )
