"""Whether a sealed model may be used at all, decided before any key service is asked.

Signature of a publisher trusted for this name, expected name, release floor, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._names import is_key
from keymgmt._verify import PublicKey, verify_signature
from keymgmt.errors import ConfigError, RollbackError, UntrustedPublisher
from keymgmt.sealed.signatures import Signatures, signed_bytes

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Publisher", "check_name", "check_release", "check_signature", "load_publishers"]


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


def check_signature(
    manifest: Manifest, data: bytes, signatures: Signatures, publishers: list[Publisher]
) -> Publisher:
    """Find a valid signature of a publisher trusted for this model's name.

    Args:
        manifest: the parsed manifest.
        data: its bytes, which are what is signed.
        signatures: what came with it.
        publishers: whom the config trusts.

    Raises:
        UntrustedPublisher: unsigned; unknown signer; a signer not for this name; a bad signature.
    """
    name = manifest.name
    if not signatures.signatures:
        raise UntrustedPublisher(
            f"{name} is not signed",
            hint="have its publisher run `keymgmt sign`, or accept unsigned models with "
            "`[policy] require_signature = false`",
        )
    signed = {signature.key_id: signature.signature for signature in signatures.signatures}
    known = [publisher for publisher in publishers if publisher.key.id in signed]
    message = signed_bytes(data)
    valid = [p for p in known if verify_signature(p.key.der, message, signed[p.key.id])]
    for publisher in valid:
        if publisher.may_publish(name):
            return publisher
    if valid:
        raise UntrustedPublisher(
            f"{valid[0].file.name} signed {name}, but is not trusted to publish that name",
            hint=f"if it should be, add {name!r} to its names in [policy] publishers",
        )
    if known:
        raise UntrustedPublisher(
            f"the signature of {known[0].file.name} on {name} is not valid",
            hint="manifest.json or the signature was changed; fetch the sealed model again",
        )
    signers = ", ".join(key_id[:16] for key_id in signed)
    raise UntrustedPublisher(
        f"{name} is signed by nobody that this config trusts (signed by {signers})",
        hint="add the publisher's public key to [policy] publishers if you trust it"
        if publishers
        else "the config names no [policy] publishers",
    )


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
