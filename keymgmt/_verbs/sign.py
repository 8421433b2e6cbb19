"""Sign: a publisher states that a manifest, and through its digests every file, is his."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._config.calls import call_provider, require
from keymgmt._config.config import use_config
from keymgmt._crypto.signatures import PublicKey, verify_signature
from keymgmt._providers.contract import SupportsSigning
from keymgmt._providers.data import Signature
from keymgmt._providers.names import KeyRef
from keymgmt._system.audit import audit
from keymgmt._trust.candidate import Candidate
from keymgmt._trust.policy import load_publishers
from keymgmt._trust.unlock import Unlocker
from keymgmt.errors import (
    ConfigError,
    IntegrityError,
    KeymgmtError,
    ProviderError,
    UntrustedPublisher,
)
from keymgmt.sealed.folder import SIGNATURES
from keymgmt.sealed.signatures import expiry_bytes, signed_bytes
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt.sealed.profiles import Profile

__all__ = ["Signer", "expiry_text", "sign"]


class Signer:
    """A publisher's key in a configured provider, which signs a probe first."""

    def __init__(self, config: Config, key: str, profile: Profile) -> None:
        """Sign a probe with ``provider:key``.

        Raises:
            ConfigError: no such provider, its backend does not sign, or the model's profile does
                not allow the algorithm that the key signs by.
            ProviderError: the provider cannot sign with that key.
        """
        reference = KeyRef.parse(key)
        if reference.version is not None:
            raise ConfigError(f"{key}: signing always uses the newest version of a key")
        self._config, self._reference, self._profile = config, reference, profile
        require(config, reference.provider, SupportsSigning, "does not sign")
        self.sign(b"keymgmt probe")

    def has_signed(self, candidate: Candidate) -> bool:
        """Whether a valid signature of this key over the manifest is there already."""
        return _has_signed(self.public, candidate)

    def sign(self, manifest: bytes) -> tuple[str, bytes]:
        """The key's id and its signature over the bytes of manifest.json; raises as ``_sign``."""
        return self._sign(signed_bytes(manifest))

    def sign_expiry(self, digest: bytes, expires: str) -> tuple[str, bytes]:
        """The same for the statement that this manifest expires; raises as ``_sign``."""
        return self._sign(expiry_bytes(digest, expires))

    def _sign(self, message: bytes) -> tuple[str, bytes]:
        """The key's id and its signature over a message.

        Raises:
            ConfigError: the profile does not allow the key.
            ProviderError: the provider fails, or its signature does not verify.
        """
        provider, key, _ = self._reference
        try:
            signature: Signature = call_provider(
                self._config, provider, lambda p: p.sign(key, message)
            )
            if not verify_signature(signature.public_key, message, signature.signature):
                raise ProviderError(f"the signature that {self._reference} made does not verify")
            self.public = PublicKey(signature.public_key)
            self._profile.check_signer(self._reference, self.public.algorithm)
        except KeymgmtError as error:
            audit("sign", error=error, provider=provider, key=key)
            raise
        audit("sign", provider=provider, key=key)
        return self.public.id, signature.signature


def _has_signed(public: PublicKey, candidate: Candidate) -> bool:
    message = signed_bytes(candidate.data)
    return any(
        signed.key_id == public.id and verify_signature(public.der, message, signed.signature)
        for signed in candidate.signatures.signatures
    )


def _check_signed_by(
    files: Sequence[str | os.PathLike[str]], candidate: Candidate, config: Config
) -> None:
    """UntrustedPublisher unless one of these keys signed the model and may publish its name."""
    name = candidate.manifest.name
    keys = [PublicKey(config.public_key(str(Path(file).absolute()))) for file in files]
    signers = {key.id for key in keys if _has_signed(key, candidate)}
    shown = " or ".join(os.fspath(file) for file in files)
    if not signers:
        raise UntrustedPublisher(
            f"{name} has no valid signature by {shown}, so it is not signed again",
            hint="look where it came from; sign it alone if you vouch for it: keymgmt sign MODEL",
        )
    # The signature of a publisher who may not publish this name does not count.
    scoped = [each for each in load_publishers(config) if each.key.id in signers]
    may = {each.key.id for each in scoped if each.may_publish(name)}
    if {each.key.id for each in scoped} - may == signers:
        raise UntrustedPublisher(
            f"{shown} signed {name}, but this config does not trust that key to publish this name",
            hint="look where it came from: [policy] publishers names what that key may publish",
        )


def sign(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    expires: datetime | None = None,
    unopened: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    if_signed_by: Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[int, int], object] | None = None,
) -> bool:
    """Add a publisher's signature to a sealed model, after opening it and checking every digest.

    The model is opened so that a stranger's model, or changed recipients, are not signed: the MAC
    of the unlock policy proves that its author had the data key.

    With ``expires`` the key also signs until when its signature counts, in place of an earlier
    time. If it has signed the model already, only that is done: no digest is checked again.

    Args:
        path: the sealed model's folder.
        key: the publisher's key, ``provider:key``; by default that of ``[seal] sign``.
        unopened: sign a model that cannot be opened here, after checking only its digests.
        expires: when the signature stops counting, with a time zone; by default never.
        keys: a loaded config, or the path of one.
        if_signed_by: public key files (PEM): a model is signed only if one of these keys has
            signed it, and is left as it is if ``key`` has signed it already.
        progress: called with (bytes done, bytes in all).

    Returns:
        Whether it was signed; False where it was already.

    Raises:
        ConfigError: no key is named, the time has passed, or the config is wrong.
        UntrustedPublisher: none of ``if_signed_by`` signed it.
        FormatError, IntegrityError: the model is malformed or damaged; it is not signed.
        CannotUnlock: it does not open here.
        ProviderError: the provider cannot sign.
    """
    with use_config(keys) as config, Candidate.read(path) as candidate:
        named = key if key is not None else config.seal.sign
        if named is None:
            raise ConfigError(
                "no key to sign with", hint="name it: keymgmt sign MODEL PROVIDER:KEY"
            )
        signer = Signer(config, named, candidate.manifest.rules)
        until = expiry_text(expires)
        new_signature = None
        if if_signed_by:
            if until is None and signer.has_signed(candidate):
                return False
            _check_signed_by(if_signed_by, candidate, config)
        if until is None or not signer.has_signed(candidate):
            policy = candidate.policy()
            if not unopened:
                dek, _ = Unlocker(config, candidate.manifest, policy).unlock()
                dek.wipe()
            candidate.check_digests(progress)
            new_signature = signer.sign(candidate.data)
        stated = signer.sign_expiry(candidate.hash, until) if until is not None else None
        candidate.folder.lock()
        # Read again under the lock: another publisher may have signed in the meantime.
        with Candidate.read(path) as current:
            if current.data != candidate.data:
                raise IntegrityError(f"{path} was exchanged while it was being signed")
            signatures = current.signatures
            if new_signature is not None:
                signatures = signatures.with_signature(*new_signature)
            if stated is not None and until is not None:
                signatures = signatures.with_expiry(*stated, until)
        candidate.folder.replace(SIGNATURES, signatures.to_bytes())
        audit(
            "signed",
            model=candidate.manifest.id.hex(),
            name=candidate.manifest.name,
            key=named,
            opened=new_signature is not None and not unopened,
        )
        return True


def expiry_text(expires: datetime | None) -> str | None:
    """The time until which a signature counts, as text; ConfigError where it is in the past."""
    if expires is None:
        return None
    if expires.tzinfo is None or expires <= datetime.now(UTC):
        raise ConfigError(
            f"{expires:%Y-%m-%d %H:%M:%S} is no time to come",
            hint="write it as 30d, 12h, or 2027-01-31T00:00:00Z",
        )
    return utc_text(expires)
