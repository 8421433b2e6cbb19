"""Whether a sealed model may be used at all, decided before any key service is asked.

Checked in this order: the signature of a publisher who is trusted for this name, and until when the
publisher vouches; the expected name; the release floor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._config.calls import call_provider
from keymgmt._crypto.signatures import PublicKey
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
    publishers = []
    for name, models in config.policy.publishers.items():
        for model in models:
            if model != "*" and not is_key(model):
                raise ConfigError(f"[policy] publishers: {name}: not a model name: {model[:80]!r}")
        publishers.append(Publisher(Path(name), PublicKey(config.public_key(name)), tuple(models)))
    return publishers


@dataclass(frozen=True)
class Vouched:
    """Who vouches for a model, and until when.

    Attributes:
        publishers: as many as the config demands, each trusted for the model's name and with a
            valid signature.
        expires: when the first of them stops vouching; None for never. Where too few vouch any
            more, and the config only warns of that, the latest time that any publisher stated.
    """

    publishers: tuple[Publisher, ...]
    expires: str | None = None

    @property
    def name(self) -> str:
        """The file names of their keys."""
        return " and ".join(publisher.file.name for publisher in self.publishers)


def check_signer(config: Config, reference: KeyRef) -> PublicKey:
    """The public key of the newest version of a signing key.

    Raises:
        UntrustedPublisher: this config does not trust that version, so a model that it signs would
            not open here.
        ConfigError, ProviderError: the config is wrong, or the provider does not answer.
    """
    key = reference.key
    public = PublicKey(call_provider(config, reference.provider, lambda p: p.public_key(key)))
    if config.policy.require_signature and public.id not in {
        publisher.key.id for publisher in load_publishers(config)
    }:
        raise UntrustedPublisher(
            f"this config does not trust the newest version of {reference}, so models that it "
            "signs do not open here",
            hint=f"export it with: keymgmt keys export {reference} --format pem -o NEW.pem; and "
            "name NEW.pem in [policy] publishers",
        )
    return public


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
        data: the bytes of the manifest, which are signed.
        signatures: the signatures that came with the manifest.
        publishers: the publishers that the config trusts.
        count: how many of them must have signed.

    Raises:
        UntrustedPublisher: the model is unsigned; its signers are unknown, too few, or not trusted
            for this name; a signature is wrong, or by an algorithm that the profile does not allow.
    """
    name = manifest.name
    if not signatures.signatures:
        raise UntrustedPublisher(
            f"{name} is not signed",
            hint="have its publisher run `keymgmt sign`, and fetch signatures.json again",
        )
    signed = {signature.key_id: signature.signature for signature in signatures.signatures}
    # A key that two files name is one publisher, for the names of both files: the second line wins,
    # and has only publishers that may publish this name.
    known = {p.key.id: p for p in publishers if p.key.id in signed and not p.may_publish(name)}
    known |= {p.key.id: p for p in publishers if p.key.id in signed and p.may_publish(name)}
    allowed = [p for p in known.values() if p.key.algorithm in manifest.rules.signatures]
    message = signed_bytes(data)
    valid = [p for p in allowed if p.key.verifies(message, signed[p.key.id])]
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
    """Leave out the publishers who no longer vouch; enough of them must remain.

    Args:
        manifest: the parsed manifest.
        digest: hash of the manifest.
        signatures: the signatures and expiries that came with the manifest.
        signed: the publishers whose signatures are valid.
        policy: how many publishers must vouch, whether they must state a time, and whether an
            expired model is refused.
        clock: the time now, and the highest time seen on this machine, if that is remembered.

    Raises:
        ModelExpired: too few publishers vouch now.
        UntrustedPublisher: an expiry was not signed by the key under whose id it is.
    """
    name, (now, seen) = manifest.name, clock
    strict, problems = name in policy.require_expiry, []
    standing: list[tuple[Publisher, str | None]] = []
    latest: str | None = None
    if seen is not None and now < seen:
        problem = f"the clock says {now}, and {seen} was seen on this machine before"
        _refuse_or_warn(policy, name, problem, refuse=strict, hint="set the clock")
    for publisher in signed:
        stated = signatures.expiry(publisher.key.id)
        expires = stated.expires if stated else None
        if stated is None or expires is None:
            if not strict:
                standing.append((publisher, None))
            problems.append(f"{publisher.file.name} did not say until when")
            continue
        message = expiry_bytes(digest, expires)
        if not publisher.key.verifies(message, stated.signature):
            raise UntrustedPublisher(
                f"the expiry of {publisher.file.name} on {name} is not valid",
                hint="signatures.json was changed; fetch the sealed model again",
            )
        latest = max(latest or expires, expires)
        if now < expires:
            standing.append((publisher, expires))
        problems.append(f"{publisher.file.name} vouched for it until {expires}")
    count = policy.signatures.get(name, 1)
    if len(standing) < count:
        _refuse_or_warn(policy, name, "; ".join(problems), refuse=True, hint=_RENEW)
        return Vouched(tuple(signed), latest)
    # Sorted by the end of their time, the latest first, and "~", which sorts behind every digit,
    # for never. The model expires when fewer than ``count`` are left: with the count-th of them.
    standing.sort(key=lambda entry: entry[1] or "~", reverse=True)
    return Vouched(tuple(publisher for publisher, _ in standing[:count]), standing[count - 1][1])


_RENEW: Final = "its publisher renews it with: keymgmt sign MODEL PROVIDER:KEY --expires 30d"


def _refuse_or_warn(policy: Policy, name: str, problem: str, *, refuse: bool, hint: str) -> None:
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
