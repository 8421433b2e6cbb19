"""From ``--to`` groups to wraps: keys of configured providers, and recipient files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._audit import audit
from keymgmt._config import parse_group
from keymgmt._dek import Dek
from keymgmt._names import KeyRef
from keymgmt._recipient import Recipient, find_signer, plain_fingerprint, read_recipient, wrap_for
from keymgmt._unlock import call_provider
from keymgmt.errors import ConfigError, KeymgmtError, UntrustedPublisher

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt._provider import WrappedKey
    from keymgmt.sealed.keys import Wrap

__all__ = ["ProviderKey", "RecipientFile", "resolve_group", "resolve_groups"]


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
            audit("wrap", error=error, provider=self.provider, key=self.key)
            raise
        audit("wrap", provider=self.provider, key=self.key, version=wrapped.version)
        return wrapped


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
    texts: Sequence[str], config: Config, fingerprints: Sequence[str] = ()
) -> list[list[Wrap]]:
    """Turn ``--to`` texts into ways to wrap, and try each of them on a throw-away key.

    A key that is missing or denied is found here, before any work is done.

    Raises:
        ConfigError: a text is malformed, names an unknown provider, or the same group twice.
        UntrustedPublisher: a recipient file has neither a given fingerprint nor a trusted signer.
        ProviderError: a provider cannot wrap under its key.
    """
    if not texts:
        raise ConfigError(
            "no recipient: nobody could open it",
            hint='name at least one with --to PROVIDER:KEY, or [seal] to = ["PROVIDER:KEY"]',
        )
    if len(set(texts)) != len(texts):
        raise ConfigError("the same group of recipients is named twice")
    given = frozenset(map(plain_fingerprint, fingerprints))
    groups = [_resolve(text, config, given) for text in texts]
    tried: set[Wrap] = set()
    with Dek.generate() as probe:
        for wrap in (wrap for group in groups for wrap in group):
            if isinstance(wrap, ProviderKey) and wrap not in tried:
                wrap(probe, b"keymgmt probe")
                tried.add(wrap)
    return groups


def resolve_group(text: str, config: Config, fingerprints: Sequence[str] = ()) -> list[Wrap]:
    """One ``--to`` text; raises as ``resolve_groups`` does, and tries nothing."""
    return _resolve(text, config, frozenset(map(plain_fingerprint, fingerprints)))


def _resolve(text: str, config: Config, fingerprints: frozenset[str]) -> list[Wrap]:
    wraps: list[Wrap] = []
    for member in parse_group(text):
        if member.startswith("@"):
            wraps.append(_recipient_file(Path(member[1:]), config, fingerprints))
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
    attested = config.policy.require_attested
    if attested and not recipient.attributes.get("attested"):
        raise UntrustedPublisher(
            f"the recipient file {path} is of a key that was not attested by hardware",
            hint="enrol the device, with `keymgmt tpm enroll` for a TPM",
        )
    # Anybody may write the attribute: it counts where a signer vouches for it.
    if not attested and plain_fingerprint(recipient.fingerprint) in fingerprints:
        return RecipientFile(path, recipient)
    trusted = {}
    for name in config.policy.recipient_signers:
        trusted[name] = config.public_key(name)
    signatures = path.with_name(path.name + ".sig")
    if not os.path.lexists(signatures):
        if attested:
            raise UntrustedPublisher(
                f"nobody vouches that the key of the recipient file {path} was attested",
                hint=f"its signature belongs beside it, in {signatures.name}",
            )
        raise UntrustedPublisher(
            f"nothing says that the recipient file {path} is genuine",
            hint=f"compare its fingerprint with the device's and give it: --fingerprint "
            f"{recipient.fingerprint}",
        )
    find_signer(recipient, read_recipient(signatures), trusted)
    return RecipientFile(path, recipient)
