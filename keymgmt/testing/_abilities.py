"""Checks of abilities: a provider does what its base classes claim."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import pytest

from keymgmt._crypto.signatures import algorithm_of, verify_signature
from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    KeyInfo,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    Recipient,
    Signature,
    SupportsAnchor,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    anchor_after,
    wrap_for,
)
from keymgmt.errors import ProviderError
from keymgmt.testing._demand import describe
from keymgmt.testing._fixtures import ContractFixtures, NewKey

__all__ = ["AbilityChecks"]


class AbilityChecks(ContractFixtures):
    """Key management, signing, offline recipients, batches, anchors."""

    @pytest.fixture
    def manager(self, provider: KeyProvider[Any], may_create_keys: bool) -> Iterator[Any]:
        """Return the provider where it manages keys, else skip."""
        if not isinstance(provider, SupportsKeyManagement):
            self.skip("this provider does not claim SupportsKeyManagement")
        if not may_create_keys:
            self.skip("not allowed to create keys in this service")
        return provider  # type: ignore[return-value]

    @pytest.fixture
    def signer(self, provider: KeyProvider[Any]) -> Any:
        """Return the provider where it signs, else skip."""
        if not isinstance(provider, SupportsSigning):
            self.skip("this provider does not claim SupportsSigning")
        return provider

    # Key management.

    def test_creates_keys_of_every_kind(self, manager: Any, dek: Dek, made_keys: list[str]) -> None:
        """Every kind in key_kinds can be created, is listed and described, and serves its purpose
        and no other, because a claimed kind is offered to the operator; look at create_key() of
        the kind that is named. Some, not all, may be UnsupportedOperation in this very service.
        """
        created, lacking = [], []

        def create(name: str, kind: str) -> Any:
            try:
                return manager.create_key(name, kind, {})
            except UnsupportedOperation as error:
                return error

        for kind, purpose in manager.key_kinds.items():
            name = f"kit-kind-{secrets.token_hex(4)}"
            made_keys.append(name)
            info = self.demand.works(partial(create, name, kind), f"create_key({kind!r})")
            if isinstance(info, UnsupportedOperation):
                lacking.append(f"{kind}: {info}")
                continue
            self.demand.that(
                isinstance(info, KeyInfo)
                and (info.key, info.purpose) == (name, purpose)
                and [version.state for version in info.versions] == ["active"],
                f"create_key({kind!r}) returned {info!r}",
            )
            same = self.demand.works(partial(manager.describe_key, name), "describe_key()")
            self.demand.that(
                same == info, f"describe_key() returned {same!r}, create_key() {info!r}"
            )
            self._serves(manager, name, kind, purpose, dek)
            created.append(name)
        listed = [info.key for info in self.demand.works(manager.list_keys, "list_keys()")]
        self.demand.that(set(created) <= set(listed), "list_keys() lacks a key that was created")
        self.demand.that(listed == sorted(listed), "list_keys() is not sorted by name")
        if lacking:
            self.demand.that(created, f"no kind can be created; {'; '.join(lacking)}")
            self.skip(f"all is well, but this service lacks {'; '.join(lacking)}")

    def _serves(self, manager: Any, name: str, kind: str, purpose: str, dek: Dek) -> None:
        if purpose == "wrap":
            wrapped = self.demand.wraps(manager, name, dek, f"{kind}: wrap()")
            self.demand.unwraps(manager, wrapped, dek, f"{kind}: unwrap()")
            if isinstance(manager, SupportsSigning):
                self.demand.refused(
                    partial(manager.sign, name, b"m"),
                    f"sign() with a {kind} key, which wraps,",
                    UnsupportedOperation,
                )
        else:
            self._verifies(manager.sign(name, b"m"), manager.public_key(name), b"m", kind)
            self.demand.refused(
                partial(manager.wrap, name, dek, b"c"),
                f"wrap() with a {kind} key, which signs,",
                UnsupportedOperation,
            )

    def test_create_is_careful(self, manager: Any, new_key: NewKey) -> None:
        """Creating a key that exists, or with an unknown kind or option, is a ConfigError and
        changes nothing, because the old key still opens models; look whether create_key() lets
        the service refuse instead of replace.
        """
        name = new_key("wrap")
        before = manager.describe_key(name)
        kind = before.kind if before.kind in manager.key_kinds else next(iter(manager.key_kinds))
        for subject, call in (
            ("a key that exists", partial(manager.create_key, name, kind, {})),
            ("an unknown kind", partial(manager.create_key, f"{name}-b", "no-such-kind", {})),
            ("an unknown option", partial(manager.create_key, f"{name}-c", kind, {"no_such": "x"})),
        ):
            self.demand.refused(call, f"create_key() with {subject}", ConfigError)
        self.demand.that(manager.describe_key(name) == before, "the existing key was changed")
        listed = {info.key for info in manager.list_keys()}
        self.demand.that(not listed & {f"{name}-b", f"{name}-c"}, "a refused key was made")

    def test_management_of_missing_keys(self, manager: Any) -> None:
        """Describing, rotating or retiring a key that does not exist is KeyNotFound, because a
        typing error must not pass for work done; look at the mapping of the service's "not found".
        """
        name = f"kit-missing-{secrets.token_hex(6)}"
        for subject, call in (
            ("describe_key()", partial(manager.describe_key, name)),
            ("rotate_key()", partial(manager.rotate_key, name)),
            ("retire_version()", partial(manager.retire_version, name, "1")),
        ):
            self.demand.refused(call, f"{subject} of a missing key", KeyNotFound)

    def test_rotation(self, manager: Any, new_key: NewKey, dek: Dek) -> None:
        """After rotation new wraps use the newest version and old wraps still open, and a blob of
        one version presented as another's does not, because re-keying takes months; look at where
        wrap() and unwrap() take the version from.
        """
        name = new_key("wrap")
        wraps: list[WrappedKey] = []
        for _ in range(3):
            wraps.append(self.demand.wraps(manager, name, dek))
            info = manager.describe_key(name)
            self.demand.that(
                wraps[-1].version == info.newest,
                f"wrap() used version {wraps[-1].version!r}, the newest is {info.newest!r}",
            )
            if len(wraps) < 3:
                self.demand.works(partial(manager.rotate_key, name), "rotate_key()")
        versions = [wrapped.version for wrapped in wraps]
        if manager.rotates_unseen:
            self.demand.that(len(set(versions)) == 1, f"its only version was called {versions}")
            versions = versions[:1]
        else:
            self.demand.that(len(set(versions)) == 3, f"three versions were called {versions}")
        listed = [version.version for version in manager.describe_key(name).versions]
        self.demand.that(listed == versions, f"describe_key() lists {listed}, made were {versions}")
        for wrapped in wraps:
            subject = f"unwrap() of version {wrapped.version} after two rotations"
            self.demand.unwraps(manager, wrapped, dek, subject)
        if manager.rotates_unseen:
            return
        self.demand.refused(
            partial(manager.unwrap, replace(wraps[0], version=versions[1]), b"c"),
            "unwrap() of a blob of the first version presented as the second's",
            UnwrapFailed,
            WrongKey,
        )

    def test_retiring(self, manager: Any, new_key: NewKey, dek: Dek) -> None:
        """A retired version unwraps no more (KeyRetired), the others still do, and neither the
        newest nor an unknown version can be retired, because retiring is how a key is revoked; look
        at what retire_version() really switches off in the service. Where the service rotates
        unseen, retire_version() is UnsupportedOperation and switches nothing off.
        """
        name = new_key("wrap")
        if manager.rotates_unseen:
            self._refuses_to_retire(manager, name, dek)
            return
        wraps = [self.demand.wraps(manager, name, dek)]
        for _ in range(2):
            self.demand.works(partial(manager.rotate_key, name), "rotate_key()")
            wraps.append(self.demand.wraps(manager, name, dek))
        first, *others = wraps
        info = self.demand.works(
            partial(manager.retire_version, name, first.version), "retire_version()"
        )
        states = {version.version: version.state for version in info.versions}
        self.demand.that(
            states.get(first.version, "retired") == "retired",
            f"after retire_version() its state is {states.get(first.version)!r}",
        )
        self.demand.refused(
            partial(manager.unwrap, first, b"c"),
            "unwrap() of a retired version",
            KeyRetired,
            WrongKey,
        )
        for wrapped in others:
            subject = f"unwrap() of version {wrapped.version}, which was not retired,"
            self.demand.unwraps(manager, wrapped, dek, subject)
        self.demand.refused(
            partial(manager.retire_version, name, others[-1].version),
            "retire_version() of the newest version",
            ConfigError,
        )
        self.demand.refused(
            partial(manager.retire_version, name, "no-such-version"),
            "retire_version() of an unknown version",
            ConfigError,
            KeyNotFound,
        )
        self.demand.unwraps(manager, others[-1], dek, "unwrap() of the newest version")

    def _refuses_to_retire(self, manager: Any, name: str, dek: Dek) -> None:
        wrapped = self.demand.wraps(manager, name, dek)
        for version, kind in ((wrapped.version, UnsupportedOperation), ("no-such", KeyNotFound)):
            self.demand.refused(
                partial(manager.retire_version, name, version),
                f"retire_version() of version {version!r}, where the service rotates unseen,",
                kind,
            )
        self.demand.unwraps(manager, wrapped, dek, "unwrap() after retire_version() refused")

    # Deletion.

    def test_deletion(self, manager: Any, new_key: NewKey, dek: Dek) -> None:
        """A deleted key unwraps and wraps no more and does not exist any more, and no other key is
        touched, because models that only this key opens are lost for good; look at what
        delete_key() names to the service. Where the service waits, delete_key() returns the time of
        the deletion, and the key cannot be used until then. A key that does not exist is
        KeyNotFound.
        """
        claimed: bool = isinstance(manager, SupportsKeyDeletion)
        if not claimed:
            self.skip("this provider does not claim SupportsKeyDeletion")
        name, other = new_key("wrap"), new_key("wrap")
        wrapped = self.demand.wraps(manager, name, dek)
        kept = self.demand.wraps(manager, other, dek)
        try:
            until = manager.delete_key(name)
        except (AccessDenied, UnsupportedOperation) as error:
            self.skip(f"this login, or this service, deletes no keys: {error}")
        except Exception as error:  # noqa: BLE001 - reported whatever it is
            self.demand.fail(f"delete_key() raised {describe(error)}")
        errors = (KeyNotFound, WrongKey) if until is None else (KeyRetired,)
        for subject, call in (
            ("unwrap()", partial(manager.unwrap, wrapped, b"c")),
            ("wrap()", partial(manager.wrap, name, dek, b"c")),
        ):
            self.demand.refused(call, f"{subject} with a deleted key", *errors)
        if until is None:
            for subject in ("describe_key", "delete_key"):
                call = partial(getattr(manager, subject), name)
                self.demand.refused(call, f"{subject}() of a deleted key", KeyNotFound)
        else:
            self.demand.works(partial(datetime.fromisoformat, until), "the time of the deletion")
            states = {each.state for each in manager.describe_key(name).versions}
            self.demand.that(states == {"retired"}, f"its versions are {sorted(states)}")
        self.demand.unwraps(manager, kept, dek, "unwrap() with another key")

    # Signing.

    def _verifies(self, signature: Signature, public: bytes, message: bytes, subject: str) -> None:
        self.demand.works(partial(algorithm_of, signature.public_key), f"{subject}: its public key")
        self.demand.that(
            signature.public_key == public, f"{subject}: public_key() and sign() differ"
        )
        self.demand.that(
            verify_signature(public, message, signature.signature),
            f"{subject}: a signature is not valid",
        )
        self.demand.that(
            not verify_signature(public, message + b"x", signature.signature),
            f"{subject}: a signature is valid for another message",
        )

    def test_signing(self, signer: Any, signing_key: str) -> None:
        """sign() signs the message itself with the algorithm that the public key stands for, and
        public_key() is the key that verifies it, because verifiers have nothing else; look at the
        digest, padding and encoding that the service uses.
        """
        for message in (b"", b"m", bytes(range(256)) * 256):
            signature = self.demand.works(
                partial(signer.sign, signing_key, message), f"sign() of {len(message)} bytes"
            )
            public = self.demand.works(partial(signer.public_key, signing_key), "public_key()")
            self._verifies(signature, public, message, f"of {len(message)} bytes")

    def test_signing_after_rotation(self, manager: Any, signer: Any, new_key: NewKey) -> None:
        """After rotation sign() and public_key() use the newest version, because publishers rotate
        too; look at where sign() takes the version from.
        """
        if manager.rotates_unseen:
            self.skip("this service rotates unseen, and rotates no signing keys")
        name = new_key("sign")
        before, old = signer.public_key(name), manager.describe_key(name).newest
        self.demand.works(partial(manager.rotate_key, name), "rotate_key()")
        signature = self.demand.works(partial(signer.sign, name, b"m"), "sign()")
        self.demand.that(signature.public_key != before, "sign() used the old version")
        self._verifies(signature, signer.public_key(name), b"m", "after rotation")
        again = self.demand.works(partial(signer.public_key, name, old), "public_key(version)")
        self.demand.that(again == before, "public_key() of the old version is another key")
        unknown = partial(signer.public_key, name, "no-such-version")
        self.demand.refused(unknown, "public_key() of an unknown version", KeyNotFound)

    def test_signing_with_a_missing_key(self, signer: Any) -> None:
        """Signing with a key that does not exist is KeyNotFound and creates no key, because a new
        publisher key must never appear by accident; look whether the service creates keys on use.
        """
        name = f"kit-missing-{secrets.token_hex(6)}"
        for _ in range(2):
            self.demand.refused(partial(signer.sign, name, b"m"), "sign()", KeyNotFound)
            self.demand.refused(partial(signer.public_key, name), "public_key()", KeyNotFound)

    # Offline recipients.

    def test_offline_recipient(
        self, provider: KeyProvider[Any], recipient_key: str, dek: Dek
    ) -> None:
        """A data key that anybody wraps to the exported public key, with the core alone, unwraps in
        the provider with that context and no other, because build machines do not reach the device;
        look at export_recipient() and at the mechanism that unwrap() allows.
        """
        if not isinstance(provider, SupportsOfflineRecipients):
            self.skip("this provider does not claim SupportsOfflineRecipients")
        recipient = self.demand.works(partial(provider.export_recipient, recipient_key), "export")
        self.demand.that(
            (recipient.backend, recipient.key) == (provider.backend, recipient_key),
            f"the recipient is {recipient}",
        )
        again = Recipient.from_bytes(recipient.to_bytes())
        wrapped = wrap_for(again, dek, b"c")
        subject = "unwrap() of an offline wrap"
        self.demand.unwraps(provider, wrapped, dek, subject)
        self.demand.refused(
            partial(provider.unwrap, wrapped, b"d"), f"{subject} with another context", UnwrapFailed
        )
        damaged = replace(wrapped, blob=wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1]))
        self.demand.refused(
            partial(provider.unwrap, damaged, b"c"), f"{subject}, damaged,", UnwrapFailed
        )

    # Batches.

    def test_batch(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """unwrap_batch() answers every item in order and one bad item fails alone, exactly as
        unwrap() would have said, because a fleet's models are opened together; look at how the
        service's partial answer is matched to the items.
        """
        if not isinstance(provider, SupportsBatchUnwrap):
            self.skip("this provider does not claim SupportsBatchUnwrap")
        deks = [Dek.generate() for _ in range(12)]
        items = [
            (self.demand.works(partial(provider.wrap, wrap_key, d, b"%d" % n), "wrap()"), b"%d" % n)
            for n, d in enumerate(deks)
        ]
        items[3] = (items[3][0], b"another context")
        good = items[5][0]
        items[5] = (replace(good, blob=good.blob[:-1] + bytes([good.blob[-1] ^ 1])), items[5][1])
        items[7] = (replace(items[7][0], key=f"kit-missing-{secrets.token_hex(6)}"), items[7][1])
        items[9] = (replace(items[9][0], backend="no-such-backend"), items[9][1])
        self.demand.that(
            list(self.demand.works(partial(provider.unwrap_batch, []), "an empty batch")) == [],
            "an empty batch has answers",
        )
        answers = self.demand.works(partial(provider.unwrap_batch, items), "unwrap_batch()")
        self.demand.that(
            len(answers) == len(items), f"{len(items)} items have {len(answers)} answers"
        )
        for number, answer in enumerate(answers):
            subject = f"item {number} of a batch"
            if number not in (3, 5, 7, 9):
                if isinstance(answer, Exception):
                    self.demand.fail(f"{subject} failed although it is good: {describe(answer)}")
                self.demand.same_key(answer, deks[number], subject)
                continue
            alone = _outcome(partial(provider.unwrap, *items[number]))
            self.demand.that(
                type(answer) is type(alone),
                f"{subject} is {type(answer).__name__}, alone it is {type(alone).__name__}",
            )

    def test_batch_of_wraps(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """wrap_batch() wraps each item for its own context, all under the newest version, because a
        rotation wraps for thousands of models; look at how the answers are matched to the items.
        """
        if not isinstance(provider, SupportsBatchWrap):
            self.skip("this provider does not claim SupportsBatchWrap")
        items = [(Dek.generate(), b"%d" % number) for number in range(12)]
        self.demand.that(
            list(self.demand.works(partial(provider.wrap_batch, wrap_key, []), "an empty batch"))
            == [],
            "an empty batch has answers",
        )
        call = partial(provider.wrap_batch, wrap_key, items)
        answers = list(self.demand.works(call, "wrap_batch()"))
        self.demand.that(
            len(answers) == len(items), f"{len(items)} items have {len(answers)} answers"
        )
        alone = self.demand.works(partial(provider.wrap, wrap_key, *items[0]), "wrap()")
        made: list[WrappedKey] = []
        for number, (answer, (dek, context)) in enumerate(zip(answers, items, strict=True)):
            what = f"item {number} of a batch"
            if not isinstance(answer, WrappedKey):
                self.demand.fail(f"{what} failed although it is good: {describe(answer)}")
            self.demand.that(
                (answer.key, answer.version) == (wrap_key, alone.version),
                f"{what} is {answer}, alone it is {alone}",
            )
            unwrap = partial(provider.unwrap, answer, context)
            self.demand.same_key(self.demand.works(unwrap, f"unwrap() of {what}"), dek, what)
            made.append(answer)
        self.demand.refused(
            partial(provider.unwrap, made[1], items[2][1]),
            "unwrap() of item 1 of a batch with the context of item 2",
            UnwrapFailed,
        )
        self.demand.refused(
            partial(provider.wrap_batch, f"kit-missing-{secrets.token_hex(6)}", items),
            "wrap_batch() under a key that is not there",
            KeyNotFound,
        )

    # Anchors.

    def test_anchor(self, provider: KeyProvider[Any]) -> None:
        """move_anchor() makes the value that follows, once, and only from the present value,
        because a release memory that was put back is noticed by a value that never comes again;
        look at what happens when a call is repeated whose answer was lost.
        """
        if not isinstance(provider, SupportsAnchor):
            self.skip("this provider does not claim SupportsAnchor")
        try:
            before = provider.anchor()
        except ConfigError:
            self.skip("the provider of these tests names no anchor")
        step = secrets.token_bytes(32)
        for _ in "12":
            self.demand.works(partial(provider.move_anchor, before, step), "move_anchor()")
            self.demand.that(
                provider.anchor() == anchor_after(before, step), "the anchor has another value"
            )
        self.demand.refused(
            partial(provider.move_anchor, before, secrets.token_bytes(32)),
            "move_anchor() from a value that it no longer has",
            AccessDenied,
        )
        self.demand.that(
            provider.anchor() == anchor_after(before, step), "the anchor moved all the same"
        )


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except ProviderError as error:
        return error
