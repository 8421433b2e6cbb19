"""keys.json: the unlock policy. Any one of its groups opens; a group needs all its recipients.

A group of one recipient wraps the data key; a group of n wraps n XOR shares of it. A MAC under the
data key covers all of it, so that a recipient that somebody added is noticed by the first who
opens. The only file that rewrap replaces.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from keymgmt._provider import MAX_BLOB, MAX_PARAMS, WrappedKey
from keymgmt.errors import FormatError, IntegrityError
from keymgmt.sealed.canonical import Reader, dump, load
from keymgmt.sealed.derive import keys_mac, wrap_context

if TYPE_CHECKING:
    from keymgmt._dek import Dek

__all__ = ["MAX_KEYS", "Group", "UnlockPolicy", "wrap_group"]

FORMAT: Final = "keymgmt-keys/1"
MAX_KEYS: Final = 64 << 20
MAX_RECIPIENTS: Final = 16384
MAX_GROUP: Final = 16
# A recipient alone in its group has at most 18. What nobody has signed yet must not cost gigabytes
# of memory to parse.
MAX_PARTS: Final = 20 * MAX_RECIPIENTS
NONCE: Final = 16

Wrap = Callable[["Dek", bytes], WrappedKey]


@dataclass(frozen=True)
class Group:
    """Recipients that open together; ``nonce`` is 16 fresh bytes that bind their shares."""

    nonce: bytes = field(repr=False)
    recipients: tuple[WrappedKey, ...]

    def context(self, manifest_hash: bytes, index: int) -> bytes:
        """What the share of recipient ``index`` is bound to, 32 bytes."""
        return wrap_context(manifest_hash, self.nonce, len(self.recipients), index)

    def __str__(self) -> str:
        return "+".join(recipient_name(recipient) for recipient in self.recipients)


def recipient_name(wrapped: WrappedKey) -> str:
    """``backend:key@version``, and ``#`` with the public key's fingerprint where there is one."""
    public = wrapped.params.get("pk", "")
    return f"{wrapped}#{public[:16]}" if public else str(wrapped)


def wrap_group(dek: Dek, manifest_hash: bytes, wraps: Sequence[Wrap]) -> Group:
    """Split ``dek`` into fresh shares and wrap each, bound to its place in the new group.

    Raises:
        ProviderError: as a wrap does.
    """
    nonce = os.urandom(NONCE)
    shares = dek.split(len(wraps))
    try:
        return Group(
            nonce,
            tuple(
                wrap(share, wrap_context(manifest_hash, nonce, len(wraps), index))
                for index, (wrap, share) in enumerate(zip(wraps, shares, strict=True))
            ),
        )
    finally:
        for share in shares:
            share.wipe()


@dataclass(frozen=True)
class UnlockPolicy:
    """The content of keys.json.

    Attributes:
        manifest: SHA-256 of the manifest.json that it belongs to.
        groups: 1 to 16384 recipients in groups of 1 to 16.
        mac: HMAC over all of it, 32 bytes.
    """

    manifest: bytes
    groups: tuple[Group, ...]
    mac: bytes = field(repr=False)

    @classmethod
    def make(
        cls, dek: Dek, model_id: bytes, manifest: bytes, groups: Sequence[Group]
    ) -> UnlockPolicy:
        """The policy of these groups with its MAC; FormatError where there are too many."""
        count = sum(len(group.recipients) for group in groups)
        if not groups or count > MAX_RECIPIENTS:
            raise FormatError(f"a sealed model has 1 to {MAX_RECIPIENTS} recipients, not {count}")
        if any(not 1 <= len(group.recipients) <= MAX_GROUP for group in groups):
            raise FormatError(f"a group has 1 to {MAX_GROUP} recipients")
        body = dump(_body(manifest, groups))
        return cls(manifest, tuple(groups), keys_mac(dek, model_id, body))

    def check_mac(self, dek: Dek, model_id: bytes) -> None:
        """IntegrityError unless a holder of the data key wrote this policy as it stands."""
        expected = keys_mac(dek, model_id, dump(_body(self.manifest, self.groups)))
        if not hmac.compare_digest(expected, self.mac):
            raise IntegrityError(
                "keys.json was changed by somebody without the data key: its MAC is wrong",
                hint="a recipient was added, removed or altered; fetch keys.json again",
            )

    def to_bytes(self) -> bytes:
        """The canonical bytes of keys.json; FormatError where they would be too many."""
        data = dump(_body(self.manifest, self.groups) | {"mac": self.mac.hex()})
        if len(data) > MAX_KEYS:
            raise FormatError(f"keys.json would be larger than {MAX_KEYS} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> UnlockPolicy:
        """Read keys.json within its bounds; FormatError where anything is not as SPEC says."""
        reader = load(data, "keys.json", MAX_KEYS, MAX_PARTS)
        reader.version(FORMAT, "another version of keymgmt wrote it: upgrade the older of the two")
        manifest = reader.hex("manifest", length=32)
        groups = tuple(
            _group(item) for item in reader.array("groups", least=1, most=MAX_RECIPIENTS)
        )
        if sum(len(group.recipients) for group in groups) > MAX_RECIPIENTS:
            raise FormatError(f"keys.json has more than {MAX_RECIPIENTS} recipients")
        mac = reader.hex("mac", length=32)
        reader.end()
        return cls(manifest, groups, mac)


def _body(manifest: bytes, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "manifest": manifest.hex(),
        "groups": [
            {
                "nonce": group.nonce.hex(),
                "recipients": [
                    {
                        "backend": wrapped.backend,
                        "key": wrapped.key,
                        "version": wrapped.version,
                        "mechanism": wrapped.mechanism,
                        "params": dict(wrapped.params),
                        "blob": base64.b64encode(wrapped.blob).decode(),
                    }
                    for wrapped in group.recipients
                ],
            }
            for group in groups
        ],
    }


def _group(item: Any) -> Group:
    reader = Reader(item, "a group in keys.json")
    nonce = reader.hex("nonce", length=NONCE)
    recipients = reader.array("recipients", least=1, most=MAX_GROUP)
    reader.end()
    return Group(nonce, tuple(_recipient(recipient) for recipient in recipients))


def _recipient(item: Any) -> WrappedKey:
    reader = Reader(item, "a recipient in keys.json")
    wrapped = WrappedKey(
        backend=reader.text("backend", limit=32),
        key=reader.text("key", limit=64),
        version=reader.text("version", limit=128),
        mechanism=reader.text("mechanism", limit=64),
        blob=reader.base64("blob", limit=MAX_BLOB),
        params=reader.texts("params", most=MAX_PARAMS, key_limit=32, limit=256),
    )
    reader.end()
    return wrapped
