"""From ``--to`` groups to wraps: keys of configured providers, and recipient files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._config.calls import call_provider
from keymgmt._crypto.dek import Dek
from keymgmt._providers.names import KeyRef, parse_group
from keymgmt._providers.recipient_file import (
    Recipient,
    find_signer,
    plain_fingerprint,
    read_recipient,
    wrap_for,
)
from keymgmt._system.audit import audit
from keymgmt.errors import ConfigError, KeymgmtError, ProviderError, UntrustedPublisher
from keymgmt.sealed.profiles import PROFILES, Profile

if TYPE_CHECKING:
    from keymgmt._config.config import AttestedKeys, Config
    from keymgmt._providers.data import WrappedKey
    from keymgmt.sealed.keys import Wrap

__all__ = ["ProviderKey", "RecipientFile", "resolve_group", "resolve_groups"]

# A member of [policy] require_attested -> the attribute in which the attesting signer states it.
_STATED: Final = {"policies": "policy_digest", "approvers": "approver", "makers": "maker"}


@dataclass(frozen=True)
class ProviderKey:
    """A KEK of a configured provider, as a way to wrap."""

    config: Config
    provider: str
    key: str

    def __call__(self, dek: Dek, context: bytes) -> WrappedKey:
        """Wrap ``dek``; ProviderError as the provider says."""
        try:
            wrapped: WrappedKey = call_provider(
                self.config, self.provider, lambda p: p.wrap(self.key, dek, context)
            )
        except KeymgmtError as error:
            self._audit(error)
            raise
        self._audit(wrapped)
        return wrapped

    def answered(self, answer: WrappedKey | ProviderError) -> WrappedKey:
        """As a call that was answered so; the provider was asked ahead, for many."""
        self._audit(answer)
        if isinstance(answer, ProviderError):
            raise answer
        return answer

    def _audit(self, answer: WrappedKey | KeymgmtError) -> None:
        if isinstance(answer, KeymgmtError):
            audit("wrap", error=answer, provider=self.provider, key=self.key)
        else:
            audit("wrap", provider=self.provider, key=self.key, version=answer.version)


@dataclass(frozen=True)
class RecipientFile:
    """A recipient file, as a way to wrap without its device."""

    path: Path
    recipient: Recipient

    def __call__(self, dek: Dek, context: bytes) -> WrappedKey:
        """Wrap ``dek`` with the recipient's public key."""
        wrapped = wrap_for(self.recipient, dek, context)
        audit("wrap", recipient=self.path.name, key=wrapped.key, version=wrapped.version)
        return wrapped


def resolve_groups(
    texts: Sequence[str],
    config: Config,
    fingerprints: Sequence[str] = (),
    profile: Profile | None = None,
) -> list[list[Wrap]]:
    """Turn ``--to`` texts into ways to wrap, and try each of them on a throw-away key.

    A key that is missing or denied is found here, before any work is done.

    Raises:
        ConfigError: a text is malformed or names an unknown provider, a group is named twice, or
            the profile does not allow the mechanism of a recipient.
        UntrustedPublisher: a recipient file has neither a given fingerprint nor a trusted signer.
        ProviderError: a provider cannot wrap under its key.
    """
    if not texts:
        raise ConfigError(
            "no recipient is named, so nobody could open the model",
            hint='name at least one with --to PROVIDER:KEY, or [seal] to = ["PROVIDER:KEY"]',
        )
    if len(set(texts)) != len(texts):
        raise ConfigError("the same group of recipients is named twice")
    groups = [resolve_group(text, config, fingerprints) for text in texts]
    tried: set[Wrap] = set()
    check = (profile or PROFILES["default"]).check_recipient
    with Dek.generate() as probe:
        for wrap in (wrap for group in groups for wrap in group):
            if isinstance(wrap, RecipientFile):
                check(wrap.recipient, wrap.recipient.kind)
            elif wrap not in tried:
                wrapped = wrap(probe, b"keymgmt probe")
                check(wrapped, wrapped.mechanism)
                tried.add(wrap)
    return groups


def resolve_group(text: str, config: Config, fingerprints: Sequence[str] = ()) -> list[Wrap]:
    """Turn one ``--to`` text into ways to wrap, untried; raises as ``resolve_groups``."""
    given = frozenset(map(plain_fingerprint, fingerprints))
    wraps: list[Wrap] = []
    for member in parse_group(text):
        if member.startswith("@"):
            wraps.append(_recipient_file(Path(member[1:]), config, given))
            continue
        reference = KeyRef.parse(member)
        if reference.version is not None:
            raise ConfigError(
                f"{member}: wrapping always uses the newest version of a key",
                hint=f"write {reference.provider}:{reference.key}",
            )
        config.backend_of(reference.provider)
        wraps.append(ProviderKey(config, reference.provider, reference.key))
    return wraps


def _recipient_file(path: Path, config: Config, fingerprints: frozenset[str]) -> RecipientFile:
    recipient = Recipient.load(path)
    attested = config.policy.require_attested is not None
    if attested and not recipient.attributes.get("attested"):
        raise UntrustedPublisher(
            f"the recipient file {path} is of a key that was not attested by hardware",
            hint="enrol the device, with `keymgmt tpm enroll` for a TPM",
        )
    # The attribute ``attested`` is a text that anybody may write, so it counts only where an
    # attestation signer has signed the file. A fingerprint says who made the file, and nothing of
    # hardware: so it is not enough where keys must be attested.
    if not attested and plain_fingerprint(recipient.fingerprint) in fingerprints:
        return RecipientFile(path, recipient)
    policy = config.policy
    vouching, attesting = (
        {name: config.public_key(name) for name in names}
        for names in (policy.recipient_signers, policy.attestation_signers)
    )
    signatures = path.with_name(path.name + ".sig")
    if not os.path.lexists(signatures):
        if attested:
            raise UntrustedPublisher(
                f"nobody states that the key of the recipient file {path} was attested",
                hint=f"its signature belongs beside it, in {signatures.name}",
            )
        raise UntrustedPublisher(
            f"nothing says that the recipient file {path} is genuine",
            hint="have whoever runs the device read its fingerprint out, and give that: "
            "--fingerprint HEX",
        )
    content = read_recipient(signatures)
    if not attested:
        try:
            find_signer(recipient, content, vouching)
        except UntrustedPublisher:
            # A signer who attests a key states thereby that the file is genuine too. The reverse
            # does not hold.
            if not attesting:
                raise
            attested = True
    if attested:
        find_signer(recipient, content, attesting, attested=True)
        if policy.require_attested is not None:
            _check_attested(path, recipient, policy.require_attested)
    return RecipientFile(path, recipient)


def _check_attested(path: Path, recipient: Recipient, wanted: AttestedKeys) -> None:
    """UntrustedPublisher unless each attribute that the config restricts has an allowed value."""
    for setting, attribute in _STATED.items():
        allowed, stated = getattr(wanted, setting), recipient.attributes.get(attribute)
        if allowed is not None and stated not in allowed:
            raise UntrustedPublisher(
                f"the recipient file {path} is of an attested key, and its {attribute} is "
                f"{stated or 'not stated'}",
                hint=f"[policy] require_attested names the {setting} that are sealed to",
            )
