"""The profiles: a table of the algorithms that a sealed model may use.

All profiles have the same payload cipher, FLOE with AES-256-GCM and HKDF-Expand-SHA-384, and use
SHA-384 (FIPS 180-4) for the hash of the manifest, keys derived from the data key, the MAC of
keys.json, contexts and ids of keys. A profile decides the hash of the digest trees, which
mechanisms may wrap, and which algorithms may sign. That is enforced both where a model is made and
where it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt._crypto.signatures import ALGORITHMS
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from keymgmt.sealed.digests import DigestName

__all__ = ["PROFILES", "Profile", "find_profile"]


@dataclass(frozen=True)
class Profile:
    """One column of the table.

    Attributes:
        name: its name in manifest.json.
        digest: the hash of the digest trees.
        mechanisms: the mechanisms that may wrap; None for all that a backend documents.
        signatures: the algorithms that may sign, as ``algorithm_of`` names them.
    """

    name: str
    digest: DigestName
    mechanisms: frozenset[str] | None
    signatures: frozenset[str]

    def check_recipient(self, recipient: object, mechanism: str) -> None:
        """ConfigError where this profile does not allow ``mechanism`` for wrapping."""
        if self.mechanisms is not None and mechanism not in self.mechanisms:
            raise ConfigError(
                f"the profile {self.name} does not allow {mechanism}, by which {recipient} wraps",
                hint=f"it allows {', '.join(sorted(self.mechanisms))}",
            )

    def check_signer(self, signer: object, algorithm: str) -> None:
        """ConfigError where this profile does not allow ``algorithm`` for signing."""
        if algorithm not in self.signatures:
            raise ConfigError(
                f"the profile {self.name} does not allow {algorithm}, by which {signer} signs",
                hint=f"it allows {', '.join(sorted(self.signatures))}",
            )


# FIPS 197, SP 800-38D and -38F (AES), FIPS 203 (ML-KEM), SP 800-56A and -56B (ECDH, RSA-OAEP),
# FIPS 186-5 (ECDSA, Ed25519, RSA-PSS) and 204 (ML-DSA). Not X25519, alone or in the hybrid.
_CNSA2: Final = frozenset(
    {"HKDF-SHA384-A256GCM", "aes256-gcm96", "AES-GCM", "AES-KWP", "AES-KW", "hpke-mlkem1024"}
    | {"SYMMETRIC_DEFAULT"}  # of AWS KMS: AES-256-GCM
)
_FIPS: Final = _CNSA2 | frozenset({"hpke-p256", "hpke-p384", "RSA-OAEP-256"})
PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile("default", "blake3", None, frozenset(ALGORITHMS)),
        Profile("fips", "sha256", _FIPS, frozenset(ALGORITHMS)),
        # CNSA 2.0: AES-256, SHA-384, ML-KEM-1024 and ML-DSA-87 alone.
        Profile("cnsa2", "sha384", _CNSA2, frozenset({"ml-dsa-87"})),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name; ConfigError where there is none."""
    if name not in PROFILES:
        raise ConfigError(f"no profile named {name!r}", hint=f"one of {', '.join(PROFILES)}")
    return PROFILES[name]
