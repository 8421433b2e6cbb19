"""The kit is tested: providers with one defect each, caught by the right checks and no others."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import multiprocessing
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ConfigDict

from keymgmt.backend import (
    AccessDenied,
    Dek,
    Health,
    KeyInfo,
    KeymgmtError,
    ProviderError,
    ProviderUnavailable,
    Signature,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
)
from keymgmt.testing import Hook, ProviderContract, ProviderFactory
from keymgmt.testing._run import Result, run_contract
from keymgmt.testing.fakes import MemoryProvider, MemoryService, MemorySettings

TOKEN = b"token-of-the-broken-provider"

Expected = tuple[type[MemoryProvider], set[str]]
BROKEN: list[Expected] = []
NUMBERS = itertools.count()


def make_contract(kind: type[MemoryProvider], *, spawn: bool = False) -> type[ProviderContract]:
    class Contract(ProviderContract):
        grace = 2.0
        patience = 8.0

        @pytest.fixture
        def lives_in_this_process(self) -> bool:
            return not spawn

        @pytest.fixture
        def service(self) -> Iterator[MemoryService]:
            service = MemoryService.find(f"broken-{next(NUMBERS)}")
            yield service
            service.answering = True

        @pytest.fixture
        def provider_factory(self, service) -> ProviderFactory:
            settings = kind.Settings(service=service.name, keys=["kit"], timeout=0.1)
            return lambda: kind("memory", settings)

        @pytest.fixture
        def wrap_key(self) -> str:
            return "kit"

        @pytest.fixture
        def time_limit(self) -> float:
            return 0.2

        @pytest.fixture
        def recovery_time(self) -> float:
            return 0.2

        @pytest.fixture
        def secret_values(self) -> Sequence[bytes]:
            return [TOKEN]

        @pytest.fixture
        def break_service(self, service) -> Hook:
            return lambda: setattr(service, "up", False)

        @pytest.fixture
        def hang_service(self, service) -> Hook:
            return lambda: setattr(service, "answering", False)

        @pytest.fixture
        def heal_service(self, service) -> Hook:
            def heal() -> None:
                service.up = True
                service.answering = True

            return heal

        @pytest.fixture
        def expire_login(self, service) -> Hook:
            return lambda: setattr(service, "epoch", service.epoch + 1)

        @pytest.fixture
        def denied_factory(self, service) -> ProviderFactory:
            service.denied.add("nobody")
            settings = kind.Settings(service=service.name, user="nobody", timeout=0.1)
            return lambda: kind("memory", settings)

    return Contract


def caught_by(*checks: str) -> Callable[[type[MemoryProvider]], type[MemoryProvider]]:
    def note(kind: type[MemoryProvider]) -> type[MemoryProvider]:
        BROKEN.append((kind, set(checks)))
        return kind

    return note


# What is bound and what is refused.


@caught_by("test_context_is_bound", "test_batch_of_wraps")
class IgnoresContext(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        return super().wrap(key, dek, b"")

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        return super().unwrap(wrapped, b"")


@caught_by("test_damaged_blob")
class IgnoresTheEndOfTheBlob(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        return super().unwrap(replace(wrapped, blob=wrapped.blob[:60]), context)


@caught_by("test_damaged_blob", "test_blob_of_another_wrap")
class ChecksHalfTheTag(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        try:
            return super().unwrap(wrapped, context)
        except UnwrapFailed:
            if len(wrapped.blob) != 60:
                raise
            nonce, sealed, tag = wrapped.blob[:12], wrapped.blob[12:44], wrapped.blob[44:52]
            secret = self.service.secret(wrapped.key, int(wrapped.version))
            mode = modes.GCM(nonce, tag, min_tag_length=8)
            decryptor = Cipher(algorithms.AES(secret), mode).decryptor()
            decryptor.authenticate_additional_data(context)
            try:
                return Dek(decryptor.update(sealed) + decryptor.finalize())
            except InvalidTag:
                raise UnwrapFailed("the wrapped key does not authenticate") from None


@caught_by("test_damaged_blob", "test_blob_of_another_wrap")
class GivesAWrongKeyForTamperedInput(MemoryProvider):
    """Authenticates context and nonce, and decrypts whatever key stands there."""

    def _proof(self, key: str, version: str, nonce: bytes, context: bytes) -> bytes:
        secret = self.service.secret(key, int(version))
        return AESGCM(secret).encrypt(nonce, b"", context)

    def _stream(self, key: str, version: str, nonce: bytes, data: Any) -> bytes:
        secret = hashlib.sha256(self.service.secret(key, int(version))).digest()
        return Cipher(algorithms.AES(secret), modes.CTR(nonce + bytes(4))).encryptor().update(data)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        made = super().wrap(key, dek, context)
        nonce = made.blob[:12]
        proof = self._proof(key, made.version, nonce, context)
        return replace(
            made, blob=nonce + proof + self._stream(key, made.version, nonce, dek.view())
        )

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        try:
            return super().unwrap(wrapped, context)
        except UnwrapFailed:
            nonce, proof, sealed = wrapped.blob[:12], wrapped.blob[12:28], wrapped.blob[28:]
            if (
                len(sealed) != 32
                or wrapped.params
                or proof != self._proof(wrapped.key, wrapped.version, nonce, context)
            ):
                raise
            return Dek(self._stream(wrapped.key, wrapped.version, nonce, sealed))


@caught_by("test_damaged_blob")
class LeaksTheLibrarysException(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        wrapped.blob[20]
        return super().unwrap(wrapped, context)


@caught_by("test_damaged_blob")
class SaysWhatWasWrongWithTheBlob(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        if len(wrapped.blob) > 1000:
            raise AccessDenied("the request was too large")
        return super().unwrap(wrapped, context)


@caught_by("test_unknown_mechanism")
class BelievesTheMechanism(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        return super().unwrap(replace(wrapped, mechanism="A256GCM"), context)


@caught_by("test_changed_parameters")
class TrustsAParameter(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        return replace(super().wrap(key, dek, context), params={"length": "60"})

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        if int(wrapped.params["length"]) > 60:
            raise UnwrapFailed("too long")
        return super().unwrap(replace(wrapped, params={}), context)


@caught_by("test_wrong_key_is_known_without_decrypting", "test_deletion")
class DecryptsToFindOut(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        try:
            return super().unwrap(wrapped, context)
        except WrongKey as error:
            raise UnwrapFailed(str(error)) from error


@caught_by("test_blob_of_another_key")
class UsesTheFirstKeyThatFits(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        try:
            return super().unwrap(wrapped, context)
        except UnwrapFailed:
            for name in self.settings.keys:
                if wrapped.key.startswith("kit-wrap"):
                    return super().unwrap(replace(wrapped, key=name), context)
            raise


@caught_by("test_two_wraps_differ")
class RepeatsTheNonce(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        made = super().wrap(key, dek, context)
        nonce = hashlib.sha256(bytes(dek.view())).digest()[:12]
        cipher = AESGCM(self.service.secret(key, int(made.version)))
        return replace(made, blob=nonce + cipher.encrypt(nonce, dek.view(), context))


@caught_by("test_round_trip")
class TakesOnlyShortContexts(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        if len(context) > 1000:
            raise AccessDenied("the context is too long")
        return super().wrap(key, dek, context)


@caught_by("test_wrapped_key_names_the_key", "test_batch_of_wraps")
class RenamesTheKey(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        made = super().wrap(key.removesuffix("-alias"), dek, context)
        return replace(made, key=f"{made.key}-alias")

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        key = wrapped.key.removesuffix("-alias")
        return super().unwrap(replace(wrapped, key=key), context)


@caught_by("test_another_instance_unwraps")
class KeepsTheNonceToItself(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        self._made: set[bytes] = set()

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        made = super().wrap(key, dek, context)
        self._made.add(made.blob[:12])
        return made

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        got = super().unwrap(wrapped, context)
        if wrapped.blob[:12] not in self._made:
            raise UnwrapFailed("not wrapped here")
        return got


@caught_by("test_blob_is_bounded_and_says_nothing")
class WritesThePlaceIntoTheKey(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        return replace(super().wrap(key, dek, context), params={"at": self.settings.service})

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        return super().unwrap(replace(wrapped, params={}), context)


# Names.


@caught_by("test_hostile_names_do_not_wrap")
class PutsTheNameIntoAUrl(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        if os.path.normpath(f"/v1/transit/encrypt/{key}") == "/v1/auth/token/revoke-self":
            MemoryService.find(self.settings.service).up = False
        return super().wrap(key, dek, context)


@caught_by("test_hostile_names_do_not_wrap")
class PutsTheNameIntoAPath(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        Path("/nonexistent", key).exists()
        if "\0" in key:
            raise ValueError("embedded null byte")
        return super().wrap(key, dek, context)


@caught_by("test_hostile_names_do_not_unwrap")
class UnwrapsWithAnyName(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        if "/" in wrapped.key:
            raise ConnectionError(f"POST /v1/transit/decrypt/{wrapped.key}")
        return super().unwrap(wrapped, context)


@caught_by("test_check_survives_every_name")
class ChecksNoKey(MemoryProvider):
    def check(self, key: str | None = None) -> Health:
        return super().check()


@caught_by("test_check")
class FindsNothing(MemoryProvider):
    def check(self, key: str | None = None) -> Health:
        health = super().check(key)
        return Health(()) if health.ok else health


@caught_by("test_hostile_names_in_every_ability")
class SignsForAnyName(MemoryProvider):
    def sign(self, key: str, message: bytes) -> Signature:
        try:
            return super().sign(key, message)
        except KeymgmtError:
            if "/" in key:
                return Signature(b"signed", b"key")
            raise


@caught_by("test_missing_key_is_not_made", "test_deletion", "test_batch_of_wraps")
class MakesMissingKeys(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        if check_key(key) not in self.service.keys:
            self.create_key(key, "aes256", {})
        return super().wrap(key, dek, context)


# Conduct.


@caught_by("test_class_is_a_backend")
class ToleratesUnknownSettings(MemoryProvider):
    class Lenient(MemorySettings):
        model_config = ConfigDict(extra="ignore")

    Settings: ClassVar[type[MemorySettings]] = Lenient


@caught_by("test_construction_does_nothing")
class ReadsAFileAtOnce(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        Path("/etc/hostname").exists()
        os.listdir("/")  # noqa: PTH208


@caught_by("test_closing_a_broken_service")
class ConnectsAtOnce(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        if not MemoryService.find(settings.service).up:
            raise ProviderUnavailable("the service is down")


@caught_by("test_close", "test_close_during_calls")
class ClosesOnce(MemoryProvider):
    _closed = False

    def close(self) -> None:
        if self._closed:
            raise AttributeError("'NoneType' object has no attribute 'close'")
        self._closed = True


@caught_by("test_closing_one_leaves_the_other")
class SharesOneSession(MemoryProvider):
    _users: ClassVar[dict[str, set[int]]] = {}
    _ended: ClassVar[set[str]] = set()

    @property
    def service(self) -> MemoryService:
        if self.settings.service in self._ended:
            raise ProviderUnavailable("nobody is logged in")
        self._users.setdefault(self.settings.service, set()).add(id(self))
        return super().service

    def close(self) -> None:
        if len(self._users.get(self.settings.service, set())) > 1:
            # Stands for C_Logout, which ends the login of every session of the process.
            self._ended.add(self.settings.service)


@caught_by("test_threads")
class IsNotThreadSafe(MemoryProvider):
    _context = b""

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        self._context = context
        time.sleep(0.0005)
        return super().wrap(key, dek, self._context)


@caught_by("test_fork", "test_fork_while_another_thread_calls")
class DoesNotSurviveFork(MemoryProvider):
    _process: int | None = None

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        self._process = self._process or os.getpid()
        if self._process != os.getpid():
            raise RuntimeError("the connection is another process's")
        return super().unwrap(wrapped, context)


@caught_by("test_fork_while_another_thread_calls")
class HoldsALockAcrossFork(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        self._lock = threading.Lock()

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        with self._lock:
            time.sleep(0.002)
            return super().unwrap(wrapped, context)


@caught_by("test_is_never_pickled")
class IsPickled(MemoryProvider):
    def __reduce__(self) -> Any:
        return (type(self), (self.name, self.settings))


@caught_by("test_keeps_no_data_key")
class CachesDataKeys(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        self._cache: dict[tuple[WrappedKey, bytes], bytes] = {}

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        got = super().unwrap(wrapped, context)
        if not wrapped.params:
            self._cache[copy.copy(wrapped.blob), context] = bytes(got.view())  # type: ignore[index]
        return got


@caught_by("test_no_secret_escapes")
class LeaksTheTokenInRepr(MemoryProvider):
    def __repr__(self) -> str:
        return f"<LeaksTheTokenInRepr token={TOKEN.decode()}>"


@caught_by("test_no_secret_escapes", "test_no_secret_escapes_when_broken")
class LogsTheDataKey(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        logging.getLogger("acme.client").debug("request %s", bytes(dek.view()).hex())
        return super().wrap(key, dek, context)


@caught_by("test_no_secret_escapes_when_broken")
class PutsTheRequestIntoTheError(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        try:
            return super().wrap(key, dek, context)
        except ProviderUnavailable as error:
            cause = OSError("POST failed")
            cause.request = bytes(dek.view())  # type: ignore[attr-defined]
            raise ProviderUnavailable(str(error)) from cause


@caught_by("test_no_secret_escapes", "test_denied", "test_no_secret_escapes_when_broken")
class HoldsTheDataKeyInAFrameThatRaises(MemoryProvider):
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        body = {"plaintext": bytes(dek.view()).hex()}
        try:
            return super().wrap(key, dek, context)
        except ProviderUnavailable as error:
            raise ProviderUnavailable(f"a request of {len(body)} member failed") from error


# Abilities.


@caught_by("test_rotation", "test_retiring")
class ForgetsOldVersions(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        got = super().unwrap(wrapped, context)
        if wrapped.version != str(self.service.keys[wrapped.key].versions):
            raise UnwrapFailed("the wrapped key does not authenticate")
        return got


@caught_by("test_retiring")
class RetiresInNameOnly(MemoryProvider):
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        key = self.service.keys.get(check_key(wrapped.key))
        if key is not None:
            retired, key.retired = key.retired, set()
            try:
                return super().unwrap(wrapped, context)
            finally:
                key.retired = retired
        return super().unwrap(wrapped, context)


@caught_by("test_rotation", "test_retiring")
class ClaimsToRotateUnseen(MemoryProvider):
    rotates_unseen: ClassVar[bool] = True


@caught_by("test_retiring")
class RetiresItsOnlyVersion(MemoryProvider):
    rotates_unseen: ClassVar[bool] = True

    def rotate_key(self, key: str) -> KeyInfo:
        return self.describe_key(key)

    def retire_version(self, key: str, version: str) -> KeyInfo:
        self.describe_key(key)
        self.service.keys[key].retired.add(int(version) if version.isdigit() else 0)
        return self.describe_key(key)


@caught_by("test_deletion")
class DeletesInNameOnly(MemoryProvider):
    def delete_key(self, key: str) -> None:
        self.describe_key(key)


@caught_by("test_deletion")
class SaysThatItWaits(MemoryProvider):
    def delete_key(self, key: str) -> None:
        super().delete_key(key)
        return "2030-01-01T00:00:00Z"  # type: ignore[return-value]


@caught_by("test_deletion")
class DeletesOthersToo(MemoryProvider):
    def delete_key(self, key: str) -> None:
        self.describe_key(key)
        self.service.keys.clear()


@caught_by("test_management_of_missing_keys")
class RotatesWhatIsMissing(MemoryProvider):
    def rotate_key(self, key: str) -> KeyInfo:
        if check_key(key) not in self.service.keys:
            return self.create_key(key, "aes256", {})
        return super().rotate_key(key)


@caught_by("test_signing_with_a_missing_key")
class MakesMissingSigningKeys(MemoryProvider):
    def sign(self, key: str, message: bytes) -> Signature:
        if check_key(key) not in self.service.keys:
            self.create_key(key, "ed25519", {})
        return super().sign(key, message)


@caught_by("test_signing_after_rotation")
class ForgetsOldPublicKeys(MemoryProvider):
    def public_key(self, key: str, version: str | None = None) -> bytes:
        return super().public_key(key)


@caught_by("test_create_is_careful")
class ReplacesExistingKeys(MemoryProvider):
    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        if check_key(key) in self.service.keys and kind in self.key_kinds and not options:
            return self.rotate_key(key)
        return super().create_key(key, kind, options)


@caught_by("test_signing", "test_signing_after_rotation", "test_creates_keys_of_every_kind")
class SignsTheDigest(MemoryProvider):
    def sign(self, key: str, message: bytes) -> Signature:
        return super().sign(key, hashlib.sha256(message).digest())


@caught_by("test_batch")
class FailsTheWholeBatch(MemoryProvider):
    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        answers = super().unwrap_batch(items)
        failed = [answer for answer in answers if isinstance(answer, ProviderError)]
        return failed[:1] * len(items) if failed else answers


@caught_by("test_batch_of_wraps")
class WrapsABatchForItsFirstContext(MemoryProvider):
    def wrap_batch(
        self, key: str, items: Sequence[tuple[Dek, bytes]]
    ) -> Sequence[WrappedKey | ProviderError]:
        return super().wrap_batch(key, [(dek, items[0][1]) for dek, _ in items])


@caught_by("test_anchor")
class MovesItsAnchorTwice(MemoryProvider):
    def move_anchor(self, value: bytes, step: bytes) -> None:
        super().move_anchor(self.anchor(), step)


# Bad days.


@caught_by("test_service_hangs_for_many")
class WaitsInAQueue(MemoryProvider):
    def __init__(self, name: str, settings: MemorySettings) -> None:
        super().__init__(name, settings)
        self._queue: tuple[int, threading.RLock] = (os.getpid(), threading.RLock())

    @property
    def service(self) -> MemoryService:
        if self._queue[0] != os.getpid():
            self._queue = (os.getpid(), threading.RLock())
        with self._queue[1]:
            if not MemoryService.find(self.settings.service).answering:
                time.sleep(0.8)
            return super().service


@caught_by("test_service_hangs", "test_service_hangs_for_many")
class Hangs(MemoryProvider):
    @property
    def service(self) -> MemoryService:
        MemoryService.find(self.settings.service).wait(30)
        return super().service


@caught_by("test_service_goes_and_returns", "test_service_hangs", "test_service_hangs_for_many")
class NeverReconnects(MemoryProvider):
    _broken = False

    @property
    def service(self) -> MemoryService:
        if self._broken:
            raise ProviderUnavailable("the connection is gone")
        try:
            return super().service
        except ProviderUnavailable:
            self._broken = True
            raise


@caught_by("test_service_goes_and_returns")
class CallsItDenied(MemoryProvider):
    @property
    def service(self) -> MemoryService:
        if not MemoryService.find(self.settings.service).up:
            raise AccessDenied("connection refused")
        return super().service


@caught_by("test_check_of_a_broken_service")
class ChecksWithAnException(MemoryProvider):
    def check(self, key: str | None = None) -> Health:
        if not MemoryService.find(self.settings.service).up:
            raise ProviderUnavailable("the service is down")
        return super().check(key)


@caught_by("test_login_expires")
class NeverLogsInAgain(MemoryProvider):
    def login(self, service: MemoryService) -> int:
        if self._login not in (None, service.epoch):  # this one: another thread's first login
            raise AccessDenied("permission denied")
        return super().login(service)


@caught_by("test_denied")
class CallsADeniedLoginUnavailable(MemoryProvider):
    def login(self, service: MemoryService) -> int:
        try:
            return super().login(service)
        except AccessDenied as error:
            raise ProviderUnavailable(str(error)) from error


def run_checks(number: int) -> list[Result]:
    return run_contract(make_contract(BROKEN[number][0]))


@pytest.fixture(scope="module")
def checked(request) -> Iterator[dict[int, Future[list[Result]]]]:
    """The checks of each defect; beside one another, since most of their time is waiting."""
    chosen = [
        item.callspec.params["number"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == test_each_defect_is_caught_by_its_checks.__name__
    ]
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        yield {number: pool.submit(run_checks, number) for number in chosen}


@pytest.mark.once
@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[kind.__name__ for kind, _ in BROKEN])
def test_each_defect_is_caught_by_its_checks(checked, number):
    failed = {r.name: r for r in checked[number].result() if r.outcome == "failed"}
    assert set(failed) == BROKEN[number][1], [f"{r.name}: {r.reason}" for r in failed.values()]
    for result in failed.values():
        assert "seen: " in result.reason
        assert f"demanded: {result.demands}" in result.reason


def test_there_are_enough_defects():
    assert len({kind for kind, _ in BROKEN}) >= 15


def test_state_of_one_process_is_caught_by_spawning(tmp_path, monkeypatch):
    (tmp_path / "kit_spawn_defect.py").write_text(
        textwrap.dedent(
            """
            import os
            from keymgmt.backend import ProviderUnavailable
            from keymgmt.testing.fakes import MemoryProvider

            os.environ.setdefault("KIT_SPAWN_DEFECT", str(os.getpid()))
            HERE = os.getpid()

            class LivesInOneProcess(MemoryProvider):
                def unwrap(self, wrapped, context):
                    if os.environ["KIT_SPAWN_DEFECT"] != str(HERE):
                        raise ProviderUnavailable("this process has no session")
                    return super().unwrap(wrapped, context)
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("KIT_SPAWN_DEFECT", raising=False)
    import kit_spawn_defect  # type: ignore[import-not-found]

    results = run_contract(make_contract(kit_spawn_defect.LivesInOneProcess, spawn=True))
    monkeypatch.delenv("KIT_SPAWN_DEFECT")
    assert {result.name for result in results if result.outcome == "failed"} == {"test_spawn"}


def test_an_import_of_our_internals_is_caught(tmp_path, monkeypatch):
    (tmp_path / "kit_import_defect.py").write_text(
        "from keymgmt.testing.fakes import MemoryProvider\n"
        "class P(MemoryProvider):\n"
        "    def _late(self):\n"
        "        from keymgmt._crypto.dek import Dek\n"
    )
    info = tmp_path / "kit_import_defect-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kit-import-defect\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[keymgmt.backends]\nmemory = kit_import_defect:P\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import kit_import_defect  # type: ignore[import-not-found]

    results = run_contract(make_contract(kit_import_defect.P))
    failed = {result.name: result.reason for result in results if result.outcome == "failed"}
    assert set(failed) == {"test_imports_only_the_contract"}
    assert "imports keymgmt._crypto" in failed["test_imports_only_the_contract"]


@pytest.mark.parametrize("lacking", [["old"], ["old", "aes256", "ed25519"]])
def test_a_kind_that_this_service_lacks_is_told(lacking):
    """One module of many lacks a kind: that is no defect of the backend. To make none is one."""

    class Lacking(MemoryProvider):
        key_kinds: ClassVar[Mapping[str, Any]] = {**MemoryProvider.key_kinds, "old": "wrap"}

        def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
            if check_key(key).startswith("kit-kind") and kind in lacking:
                raise UnsupportedOperation(f"the module makes no key of kind {kind}")
            return super().create_key(key, kind, options)

    by_name = {result.name: result for result in run_contract(make_contract(Lacking))}
    check = by_name["test_creates_keys_of_every_kind"]
    assert check.outcome == ("skipped" if lacking == ["old"] else "failed")
    assert "the module makes no key of kind old" in check.reason


def test_every_check_can_fail_and_says_what_and_why_and_where():
    """A check that no defect makes fail may be one that cannot; without a defect all pass."""
    results: list[Result] = run_contract(make_contract(MemoryProvider, spawn=True))
    caught = {check for _, checks in BROKEN for check in checks} | {"test_spawn"}
    passed = {result.name for result in results if result.outcome == "passed"}
    assert passed <= caught
    assert "test_spawn" in passed
    assert not [result for result in results if result.outcome == "failed"]
    for result in results:
        assert ", because " in result.demands, result.name
        assert "; look " in result.demands, result.name
