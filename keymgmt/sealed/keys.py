"""keys.json: the unlock policy. Any one of its groups opens; a group needs all its recipients.

A group of one recipient wraps the data key; a group of n wraps n XOR shares of the data key. A MAC
under the data key covers the whole file, so that the first reader who opens the model notices a
recipient that somebody added. This is the only file that rewrap replaces.
"""

from __future__ import annotations

import base64
import functools
import hmac
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from keymgmt._providers.data import MAX_BLOB, WrappedKey
from keymgmt._system.strict_json import base64_bytes, dump_json
from keymgmt.errors import ConfigError, FormatError, IntegrityError
from keymgmt.sealed.derive import keys_mac, wrap_context

if TYPE_CHECKING:
    from keymgmt._crypto.dek import Dek
    from keymgmt.sealed.manifest import Manifest

__all__ = ["MAX_KEYS", "Group", "NewGroup", "UnlockPolicy", "wrap_group"]

FORMAT: Final = "keymgmt-keys/1"
MAX_KEYS: Final = 64 << 20
MAX_RECIPIENTS: Final = 16384
MAX_GROUP: Final = 16
NONCE: Final = 16

Wrap = Callable[["Dek", bytes], WrappedKey]


@dataclass(frozen=True)
class Group:
    """Recipients that open together; ``nonce`` is 16 fresh bytes that bind their shares."""

    nonce: bytes = field(repr=False)
    recipients: tuple[WrappedKey, ...]

    def context(self, manifest_hash: bytes, index: int) -> bytes:
        """The context to which the share of recipient ``index`` is bound, 48 bytes."""
        return wrap_context(manifest_hash, self.nonce, len(self.recipients), index)

    def __str__(self) -> str:
        return "+".join(recipient_name(recipient) for recipient in self.recipients)


def recipient_name(wrapped: WrappedKey) -> str:
    """``backend:key@version``, and ``#`` with the public key's fingerprint where there is one."""
    public = wrapped.params.get("pk", "")
    return f"{wrapped}#{public[:16]}" if public else str(wrapped)


class NewGroup:
    """A group to be: fresh shares of a data key, each with the context that binds it to its place.

    A context manager that wipes the shares.
    """

    def __init__(self, dek: Dek, manifest_hash: bytes, count: int) -> None:
        self.nonce = os.urandom(NONCE)
        self.contexts = [
            wrap_context(manifest_hash, self.nonce, count, index) for index in range(count)
        ]
        self.shares = dek.split(count)

    def wrap(self, wraps: Sequence[Wrap]) -> Group:
        """The group, once each share was wrapped; raises as a wrap does."""
        parts = zip(wraps, self.shares, self.contexts, strict=True)
        return Group(self.nonce, tuple(wrap(share, context) for wrap, share, context in parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for share in self.shares:
            share.wipe()


def wrap_group(dek: Dek, manifest_hash: bytes, wraps: Sequence[Wrap]) -> Group:
    """Split ``dek`` into fresh shares and wrap each, bound to its position in the new group.

    Raises:
        ProviderError: a provider cannot wrap.
    """
    with NewGroup(dek, manifest_hash, len(wraps)) as group:
        return group.wrap(wraps)


@dataclass(frozen=True)
class UnlockPolicy:
    """The content of keys.json.

    Attributes:
        manifest: SHA-384 of the manifest.json to which this policy belongs.
        groups: 1 to 16384 recipients in groups of 1 to 16.
        mac: HMAC-SHA-384 over the other members.
    """

    manifest: bytes
    groups: tuple[Group, ...]
    mac: bytes = field(repr=False)

    @classmethod
    def make(
        cls, dek: Dek, manifest: Manifest, manifest_hash: bytes, groups: Sequence[Group]
    ) -> UnlockPolicy:
        """Make the policy of a model from its groups, with the MAC.

        Raises:
            FormatError: there is no group, or too many recipients.
            ConfigError: the model's profile does not allow the mechanism of a recipient.
        """
        count = sum(len(group.recipients) for group in groups)
        if not groups or count > MAX_RECIPIENTS:
            raise FormatError(f"a sealed model has 1 to {MAX_RECIPIENTS} recipients, not {count}")
        if any(not 1 <= len(group.recipients) <= MAX_GROUP for group in groups):
            raise FormatError(f"a group has 1 to {MAX_GROUP} recipients")
        _check_profile(manifest, groups)
        covered = b"".join(_pieces(manifest_hash, groups))
        mac = keys_mac(dek, manifest.id, [covered])
        member = _MAC % mac.hex().encode()
        data = b"".join([covered[:-_END_LENGTH], member, covered[-_END_LENGTH:]])
        return cls(manifest_hash, tuple(groups), mac)._written_as(data)

    def check_profile(self, manifest: Manifest) -> None:
        """FormatError where the model's profile does not allow the mechanism of a recipient."""
        try:
            _check_profile(manifest, self.groups)
        except ConfigError as error:
            raise FormatError(f"keys.json is refused: {error}") from error

    def check_mac(self, dek: Dek, model_id: bytes) -> None:
        """IntegrityError unless a holder of the data key wrote exactly this policy."""
        data = memoryview(self._data)
        covered = data[: -_END_LENGTH - _MAC_LENGTH], data[-_END_LENGTH:]
        expected = keys_mac(dek, model_id, covered)
        if not hmac.compare_digest(expected, self.mac):
            raise IntegrityError(
                "keys.json was changed by somebody without the data key: its MAC is wrong",
                hint="a recipient was added, removed or altered; fetch keys.json again",
            )

    def to_bytes(self) -> bytes:
        """The canonical bytes of keys.json; FormatError where the file would be too large."""
        if len(self._data) > MAX_KEYS:
            raise FormatError(f"keys.json would be larger than {MAX_KEYS} bytes")
        return self._data

    @functools.cached_property
    def _data(self) -> bytes:
        return b"".join(_pieces(self.manifest, self.groups, self.mac))

    def _written_as(self, data: bytes) -> Self:
        """Keep the canonical bytes, of which there is one spelling, so that none is made again."""
        self.__dict__["_data"] = data
        return self

    @classmethod
    def from_bytes(cls, data: bytes) -> UnlockPolicy:
        """Read keys.json within its bounds; FormatError where it violates SPEC.md.

        The file is read one recipient at a time, and not as one JSON value, since nobody has
        authenticated it yet: a hostile file of 64 MiB would become a gigabyte of Python objects.
        This way it costs the memory of its blobs, and parsing stops at a recipient too many.
        """
        if len(data) > MAX_KEYS:
            raise FormatError(f"keys.json is larger than {MAX_KEYS} bytes")
        return _Parser(data).policy()._written_as(data)


# In the canonical form (RFC 8785) members have one order, there is no white space, and no string of
# this file may hold a character that JSON escapes. So these patterns match every valid file.
_FORMAT: Final = re.compile(rb'\{"format":"([^"]{0,64})"')
_GROUPS: Final = re.compile(rb',"groups":\[')
_NONCE: Final = re.compile(rb'\{"nonce":"([0-9a-f]{32})","recipients":\[')
_BACKEND: Final = re.compile(rb'\{"backend":"([a-z0-9_-]{1,32})","blob":"')
_RECIPIENT: Final = re.compile(
    rb'","key":"([a-z0-9._-]{1,64})",'
    rb'"mechanism":"([A-Za-z0-9._+-]{1,64})","params":\{([^{}]{0,2400})\},'
    rb'"version":"([A-Za-z0-9._-]{1,128})"\}'
)
_PARAM: Final = re.compile(rb'"([a-z0-9_]{1,32})":"([A-Za-z0-9._=+/-]{0,256})"')
_MAC: Final = b',"mac":"%b"'
_LAST: Final = b',"manifest":"%b"}'
_MAC_LENGTH: Final = len(_MAC % bytes(96))
_END_LENGTH: Final = len(_LAST % bytes(96))
_END: Final = re.compile(rb',"mac":"([0-9a-f]{96})","manifest":"([0-9a-f]{96})"\}')


class _Parser:
    """A position in the bytes of keys.json, and the count of recipients before it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position, self._count = data, 0, 0

    def policy(self) -> UnlockPolicy:
        (format_,) = self._take(_FORMAT, "does not begin with its format")
        if format_ != FORMAT.encode():
            raise FormatError(
                f"keys.json has the format {format_!r}; this reader knows {FORMAT!r}",
                hint="another version of keymgmt wrote it: upgrade the older of the two",
            )
        self._take(_GROUPS, "has no groups")
        groups = [self._group()]
        while self._comma(b"]"):
            groups.append(self._group())
        mac, manifest = self._take(_END, "does not end with mac and manifest")
        if self._position != len(self._data):
            raise self._error("goes on after its end")
        return UnlockPolicy(
            bytes.fromhex(manifest.decode()), tuple(groups), bytes.fromhex(mac.decode())
        )

    def _group(self) -> Group:
        (nonce,) = self._take(_NONCE, "has a malformed group")
        recipients = [self._recipient()]
        while self._comma(b"]}"):
            if len(recipients) == MAX_GROUP:
                raise FormatError(f"keys.json has a group of more than {MAX_GROUP} recipients")
            recipients.append(self._recipient())
        return Group(bytes.fromhex(nonce.decode()), tuple(recipients))

    def _recipient(self) -> WrappedKey:
        if self._count == MAX_RECIPIENTS:
            raise FormatError(f"keys.json has more than {MAX_RECIPIENTS} recipients")
        self._count += 1
        (backend,) = self._take(_BACKEND, "has a malformed recipient")
        start = self._position
        # find() is many times faster than a pattern, and there may be thousands of long blobs.
        self._position = self._data.find(b'"', start, start + MAX_BLOB * 4 // 3 + 4)
        if self._position < 0:
            self._position = start
            raise self._error("has a blob that is too long")
        blob = self._data[start : self._position]
        members = self._take(_RECIPIENT, "has a malformed recipient")
        key, mechanism, params, version = members
        return WrappedKey(
            backend.decode(),
            key.decode(),
            version.decode(),
            mechanism.decode(),
            base64_bytes(blob.decode("latin-1"), f"the blob of recipient {self._count}"),
            _params(params),
        )

    def _comma(self, end: bytes) -> bool:
        """Whether another element follows, or the end of the array."""
        if self._data.startswith(b",", self._position):
            self._position += 1
            return True
        if not self._data.startswith(end, self._position):
            raise self._error("has an array that does not end")
        self._position += len(end)
        return False

    def _take(self, pattern: re.Pattern[bytes], problem: str) -> tuple[bytes, ...]:
        match = pattern.match(self._data, self._position)
        if match is None:
            raise self._error(problem)
        self._position = match.end()
        return match.groups()

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"keys.json {problem} (byte {self._position}): members are missing, unknown or out of "
            "their bounds, or it is not in its canonical form (RFC 8785)",
            hint="it was edited or reformatted; fetch it again as it was published",
        )


def _params(text: bytes) -> dict[str, str]:
    pairs = _PARAM.findall(text)
    names = [name for name, _ in pairs]
    spelled = b",".join(b'"%b":"%b"' % pair for pair in pairs)
    if spelled != text or names != sorted(set(names)):
        raise FormatError(
            "keys.json has a recipient whose params are malformed or not in canonical form"
        )
    return {name.decode(): value.decode() for name, value in pairs}


def _check_profile(manifest: Manifest, groups: Sequence[Group]) -> None:
    for group in groups:
        for wrapped in group.recipients:
            manifest.rules.check_recipient(wrapped, wrapped.mechanism)


def _pieces(manifest: bytes, groups: Sequence[Group], mac: bytes | None = None) -> Iterator[bytes]:
    """The canonical form in parts; without ``mac``, the bytes that the MAC covers."""
    yield b'{"format":"%b","groups":[' % FORMAT.encode()
    for index, group in enumerate(groups):
        yield b"," if index else b""
        yield dump_json(
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
        )
    yield b"]"
    if mac is not None:
        yield _MAC % mac.hex().encode()
    yield _LAST % manifest.hex().encode()
