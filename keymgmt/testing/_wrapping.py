"""Checks of wrap and unwrap: round trips, the binding to a context, refusals of changed data."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from keymgmt.backend import (
    MAX_BLOB,
    AccessDenied,
    Dek,
    KeyProvider,
    ProviderError,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
)
from keymgmt.testing._demand import describe, find_secret, strings_in
from keymgmt.testing._fixtures import ContractFixtures, ProviderFactory

__all__ = ["WrappingChecks"]

CONTEXTS = (b"", b"\0", b"a context", bytes(32), bytes(range(256)) * 4)
REFUSED = (UnwrapFailed, WrongKey)


def damaged(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield damaged forms of a blob: flips in every region, cuts, additions, replacements."""
    length = len(blob)
    positions = {*range(min(length, 12)), *range(max(0, length - 48), length)}
    positions |= {length * step // 24 for step in range(24)}
    for position in sorted(positions):
        for bit in (0x01, 0x80):
            changed = bytearray(blob)
            changed[position] ^= bit
            yield f"bit {bit:#x} flipped in byte {position} of {length}", bytes(changed)
    for keep in sorted({1, 2, 12, length // 2, length - 16, length - 1}):
        if 0 < keep < length:
            yield f"cut to {keep} of {length} bytes", blob[:keep]
    yield "without its first byte", blob[1:] or b"\1"
    yield "with a zero byte added", blob + b"\0"
    yield "with a line end added", blob + b"\n"
    yield "with a zero byte in front", b"\0" + blob
    yield "twice", blob + blob
    yield "all zeros", bytes(length)
    yield "all ones", b"\xff" * length
    yield "random", os.urandom(length)
    yield "of 8192 random bytes", os.urandom(8192)


class WrappingChecks(ContractFixtures):
    """Round trips, binding, tampering."""

    def test_round_trip(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """unwrap() gives back exactly the key that wrap() took, for every context of 0 to 1024
        bytes, because nothing else matters more; look at how key and context reach the service
        and come back.
        """
        for context in CONTEXTS:
            with Dek.generate() as dek, Dek(bytes(dek.view())) as before:
                prefix = f"with a context of {len(context)} bytes, "
                wrapped = self.demand.wraps(
                    provider, wrap_key, dek, prefix + "wrap()", context=context
                )
                self.demand.same_key(dek, before, prefix + "wrap() changed its argument: it")
                self.demand.unwraps(provider, wrapped, dek, prefix + "unwrap()", context=context)

    def test_another_instance_unwraps(
        self, provider: KeyProvider[Any], provider_factory: ProviderFactory, dek: Dek, wrap_key: str
    ) -> None:
        """A second provider of the same service unwraps what the first wrapped, because sealing
        and opening happen on different machines; look whether wrap() leaves something needed in
        the instance.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        with provider_factory() as other:
            self.demand.unwraps(other, wrapped, dek, "unwrap() of another instance")

    def test_wrapped_key_names_the_key(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str
    ) -> None:
        """wrap() returns a WrappedKey with this backend's name and the key's own name, because a
        recipient is matched to providers by backend and key; look at how wrap() fills it in.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        self.demand.that(
            isinstance(wrapped, WrappedKey), f"wrap() returned {type(wrapped).__name__}"
        )
        self.demand.that(
            wrapped.backend == provider.backend,
            f"wrapped.backend is {wrapped.backend!r}, the provider's is {provider.backend!r}",
        )
        self.demand.that(wrapped.key == wrap_key, f"wrapped.key is {wrapped.key!r}")

    def test_two_wraps_differ(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """Two wraps of one data key share no blob, because a repeated nonce or a fixed blob tells
        that two models share a key and breaks AES-GCM; look where the nonce or inner key comes
        from.
        """
        blobs = [self.demand.wraps(provider, wrap_key, dek).blob for _ in range(4)]
        self.demand.that(len(set(blobs)) == len(blobs), "two wraps gave the same blob")

    def test_context_is_bound(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """unwrap() with another context is UnwrapFailed, because the context ties a wrapped key to
        its model and its position in the policy; look whether the context is additional data of the
        mechanism, and use inner_wrap() where it has none.
        """
        for context in (b"a context", b"", bytes(32)):
            wrapped = self.demand.wraps(provider, wrap_key, dek, context=context)
            others = [b"", context + b"\0", context[:-1], b"b" + context, context[::-1] + b"x"]
            for other in others:
                if other != context:
                    self.demand.refused(
                        partial(provider.unwrap, wrapped, other),
                        f"unwrap() with context {other[:12]!r} instead of {context[:12]!r}",
                        UnwrapFailed,
                    )

    def test_damaged_blob(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """A blob that differs in any byte or in length is UnwrapFailed (WrongKey where it names a
        version that does not exist), because different answers to different failures would be an
        oracle, and a blob with two spellings could be tried twice; look at error mapping, at
        parsing of lengths and at lenient base64.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        for how, blob in damaged(wrapped.blob):
            if blob == wrapped.blob or len(blob) > MAX_BLOB:
                continue
            self.demand.refused(
                partial(provider.unwrap, replace(wrapped, blob=blob), b"c"),
                f"unwrap() of a blob {how}",
                *REFUSED,
            )
        self.demand.unwraps(provider, wrapped, dek, "unwrap() after damaged blobs")

    def test_blob_of_another_wrap(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """Halves of two blobs put together are UnwrapFailed, because each part must be
        authenticated together with the others; look whether every part of the blob is covered by
        one tag.
        """
        with Dek.generate() as dek_one, Dek.generate() as dek_two:
            first = self.demand.wraps(provider, wrap_key, dek_one)
            second = self.demand.wraps(provider, wrap_key, dek_two)
        for step in range(1, 8):
            middle = len(first.blob) * step // 8
            blob = first.blob[:middle] + second.blob[middle:]
            if blob not in (first.blob, second.blob):
                self.demand.refused(
                    partial(provider.unwrap, replace(first, blob=blob), b"c"),
                    f"unwrap() of two blobs joined at {middle}",
                    *REFUSED,
                )

    def test_unknown_mechanism(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """A mechanism that this key does not use is refused, because the mechanism is read from a
        file and a weaker one must not be chosen there; look at the list of mechanisms that
        unwrap() allows for the key.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        own = wrapped.mechanism
        others = ["none", "plain", "NULL", "AES-ECB", "AES-CBC", "AES-KW", "RSA-PKCS1", "XOR"]
        others += ["RSA-OAEP-SHA1", own + "-x", own[:-1] or "x", own.swapcase()]
        for name in others:
            if name != own:
                self.demand.refused(
                    partial(provider.unwrap, replace(wrapped, mechanism=name), b"c"),
                    f"unwrap() with mechanism {name!r} instead of {own!r}",
                    *REFUSED,
                    UnsupportedOperation,
                )

    def test_changed_parameters(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """Changed, missing or strange parameters never give another key or another kind of error,
        because they are read from a file; look how unwrap() reads each of wrapped.params.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        cases: list[dict[str, str]] = [{}]
        for name, value in wrapped.params.items():
            rest = {k: v for k, v in wrapped.params.items() if k != name}
            flipped = ("B" if value[:1] == "A" else "A") + value[1:]
            cases += [rest, *({**rest, name: new} for new in (flipped, "", "0", "/", "A" * 256))]
        cases.append({**dict(list(wrapped.params.items())[:7]), "strange": "../x"})
        for params in cases:
            subject = f"unwrap() with params {params} instead of {dict(wrapped.params)}"
            try:
                unwrapped = provider.unwrap(replace(wrapped, params=params), b"c")
            except (*REFUSED, UnsupportedOperation):
                continue
            except Exception as error:  # noqa: BLE001 - reported whatever it is
                self.demand.fail(f"{subject} raised {describe(error)}")
            self.demand.same_key(unwrapped, dek, subject)

    def test_wrong_key_is_known_without_decrypting(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str, hides_missing_keys: bool
    ) -> None:
        """Another backend, a key or a version that does not exist is WrongKey, even with a blob
        that could never decrypt, because the next candidate is then tried without a false alarm of
        tampering; look whether unwrap() compares backend, key and version before it decrypts.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        hidden: tuple[type[ProviderError], ...] = (AccessDenied,) if hides_missing_keys else ()
        missing = f"kit-missing-{secrets.token_hex(6)}"
        for blob, kind in ((wrapped.blob, "its blob"), (b"\xff" * 61, "a senseless blob")):
            self.demand.refused(
                partial(
                    provider.unwrap, replace(wrapped, backend="no-such-backend", blob=blob), b"c"
                ),
                f"unwrap() of another backend's key with {kind}",
                WrongKey,
            )
            self.demand.refused(
                partial(provider.unwrap, replace(wrapped, key=missing, blob=blob), b"c"),
                f"unwrap() of a key that does not exist with {kind}",
                WrongKey,
                *hidden,
            )
            for version in ("999999999", "0", "no-such-version", "f" * 128):
                self.demand.refused(
                    partial(provider.unwrap, replace(wrapped, version=version, blob=blob), b"c"),
                    f"unwrap() of version {version[:20]!r}, which does not exist, with {kind}",
                    WrongKey,
                )

    def test_blob_of_another_key(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str, other_wrap_key: str
    ) -> None:
        """A blob of one key presented as another key's is UnwrapFailed (WrongKey where their
        versions differ), because a key name in a file proves nothing; look whether unwrap() uses
        the key that is named.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        other = self.demand.wraps(provider, other_wrap_key, dek)
        mixed = replace(other, blob=wrapped.blob, params=wrapped.params)
        self.demand.refused(
            partial(provider.unwrap, mixed, b"c"), "unwrap() of another key's blob", *REFUSED
        )

    def test_blob_is_bounded_and_says_nothing(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        secret_values: Sequence[bytes],
        place_values: Sequence[str],
    ) -> None:
        """A wrapped key has neither the data key, nor a secret, nor an address, path or module of
        the settings in it, because it is published and only the config says where the key service
        is; look at what wrap() puts into blob and params.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        shown = b"\n".join(
            [wrapped.blob, *(f"{k}={v}".encode() for k, v in wrapped.params.items())]
            + [part.encode() for part in (wrapped.version, wrapped.mechanism)]
        )
        spelling = find_secret(shown, [bytes(dek.view())])
        self.demand.that(not spelling, f"the data key stands in the wrapped key {spelling}")
        self.demand.hides(shown, secret_values, "the wrapped key")
        settings = provider.settings.model_dump(mode="python")
        texts = {text for text in strings_in(settings) if len(text) >= 6 and text != wrap_key}
        for text in sorted({*texts, *place_values}):
            spelling = find_secret(shown, [text.encode()])
            self.demand.that(not spelling, f"{text!r} stands in the wrapped key {spelling}")
