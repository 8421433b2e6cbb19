"""Signing: a publisher says that a manifest, and through its digests every file, is his."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from keymgmt._admit import Candidate
from keymgmt._audit import audit
from keymgmt._config import use_config
from keymgmt._names import KeyRef
from keymgmt._provider import Signature, SupportsSigning
from keymgmt._unlock import call_provider, require
from keymgmt._verify import PublicKey, verify_signature
from keymgmt.errors import ConfigError, IntegrityError, KeymgmtError, ProviderError
from keymgmt.sealed.folder import SIGNATURES
from keymgmt.sealed.signatures import signed_bytes

if TYPE_CHECKING:
    from keymgmt._config import Config

__all__ = ["Signer", "sign"]


class Signer:
    """A publisher's key in a configured provider, tried when it is made."""

    def __init__(self, config: Config, key: str) -> None:
        """Sign a probe with ``provider:key``.

        Raises:
            ConfigError: no such provider, or its backend does not sign.
            ProviderError: the provider cannot sign with that key.
        """
        reference = KeyRef.parse(key)
        if reference.version is not None:
            raise ConfigError(f"{key}: signing always uses the newest version of a key")
        self._config, self._reference = config, reference
        require(config, reference.provider, SupportsSigning, "does not sign")
        self.sign(b"keymgmt probe")

    def sign(self, manifest: bytes) -> tuple[str, bytes]:
        """The key's id and its signature over the bytes of manifest.json.

        Raises:
            ProviderError: the provider fails, or its signature does not verify.
        """
        provider, key, _ = self._reference
        message = signed_bytes(manifest)
        try:
            made: Signature = call_provider(self._config, provider, lambda p: p.sign(key, message))
            if not verify_signature(made.public_key, message, made.signature):
                raise ProviderError(f"the signature that {self._reference} made does not verify")
        except KeymgmtError as error:
            audit("sign", error=error, provider=provider, key=key)
            raise
        audit("sign", provider=provider, key=key)
        return PublicKey(made.public_key).id, made.signature


def sign(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Add a publisher's signature to a sealed model, after checking every digest in it.

    Args:
        path: the sealed model's folder.
        key: the publisher's key, ``provider:key``; by default that of ``[seal] sign``.
        keys: a loaded config, or the path of one.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: no key is named, or the config is wrong.
        FormatError, IntegrityError: the model is malformed or damaged; it is not signed.
        ProviderError: the provider cannot sign.
    """
    with use_config(keys) as config, Candidate.read(path) as candidate:
        named = key if key is not None else config.seal.sign
        if named is None:
            raise ConfigError(
                "no key to sign with", hint="name it: keymgmt sign MODEL PROVIDER:KEY"
            )
        signer = Signer(config, named)
        candidate.policy()
        candidate.check_digests(progress)
        made = signer.sign(candidate.data)
        candidate.folder.lock()
        # Read again under the lock: another publisher may have signed meanwhile.
        with Candidate.read(path) as current:
            if current.data != candidate.data:
                raise IntegrityError(f"{path} was exchanged while it was being signed")
            signatures = current.signatures.with_signature(*made)
        candidate.folder.replace(SIGNATURES, signatures.to_bytes())
