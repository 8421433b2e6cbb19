"""Checks of conduct: the effects of a provider on its process, and secrets that it lets out."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Final

import pytest

from keymgmt.backend import (
    API_VERSION,
    Dek,
    Health,
    KeyProvider,
    ProviderError,
    Settings,
    WrappedKey,
    is_name,
)
from keymgmt.testing import _process
from keymgmt.testing._demand import describe, raised
from keymgmt.testing._fixtures import ContractFixtures, ProviderFactory

__all__ = ["ConductChecks"]

THREADS: Final = 8
ROUNDS: Final = 12
_ALLOWED: Final = {"keymgmt.backend", "keymgmt.console"}


class ConductChecks(ContractFixtures):
    """Construction, closing, threads, processes, secrets."""

    def test_class_is_a_backend(self, provider: KeyProvider[Any]) -> None:
        """The class names its API version, backend and strict Settings, because the registry
        refuses it otherwise; look at the class attributes and at the entry point's name.
        """
        kind = type(provider)
        self.demand.that(kind.api_version == API_VERSION, f"api_version is {kind.api_version!r}")
        self.demand.that(is_name(kind.backend), f"backend is {kind.backend!r}")
        self.demand.that(
            issubclass(kind.Settings, Settings), "Settings is not a subclass of keymgmt's Settings"
        )
        config = kind.Settings.model_config
        for name, value in (("extra", "forbid"), ("strict", True), ("frozen", True)):
            self.demand.that(
                config.get(name) == value,
                f"Settings has {name}={config.get(name)!r}, not {value!r}",
            )
        announced = {
            entry.name
            for entry in entry_points(group="keymgmt.backends")
            if entry.value == f"{kind.__module__}:{kind.__qualname__}"
        }
        self.demand.that(
            announced <= {kind.backend},
            f"the entry point is called {', '.join(announced)}, the class {kind.backend!r}",
        )

    def test_imports_only_the_contract(self, provider: KeyProvider[Any]) -> None:
        """The package imports keymgmt.backend, its commands keymgmt.console, and no other module of
        keymgmt, because all others may change in any release; look at the import that is named, and
        ask keymgmt's maintainers for a function that is missing in the two.
        """
        kind = type(provider)
        package = kind.__module__.partition(".")[0]
        entries = entry_points(group="keymgmt.backends")
        if package not in {entry.module.partition(".")[0] for entry in entries}:
            self.skip(f"{package} is not an installed backend")
        wrong = [
            f"{module.name} imports {name}"
            for module in _process.modules_of(package)
            for name in _process.imported_by(module)
            if name.partition(".")[0] == "keymgmt" and name not in _ALLOWED
        ]
        self.demand.that(not wrong, "; ".join(wrong[:3]))

    def test_construction_does_nothing(self, provider: KeyProvider[Any]) -> None:
        """Making a provider opens no file, socket, process or library, because a config names many
        providers and most are never used; look at __init__ and move that to the first use.
        """
        kind = type(provider)
        with _process.watched() as events:
            kind(provider.name, provider.settings).close()
        self.demand.that(not events, f"making and closing a provider did: {'; '.join(events[:5])}")

    def test_close(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """close() may be called before use, twice, and before another use, which then works or
        raises a ProviderError, because owners close in any order; look at what close() leaves
        behind.
        """
        self.demand.works(provider.close, "close() before the first use")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        for count in ("first", "second"):
            self.demand.works(provider.close, f"the {count} close()")
        try:
            unwrapped = provider.unwrap(wrapped, b"c")
        except ProviderError:
            pass
        except Exception as error:  # noqa: BLE001 - reported whatever it is
            self.demand.fail(f"unwrap() after close() raised {describe(error)}")
        else:
            self.demand.same_key(unwrapped, dek, "unwrap() after close()")
        self.demand.works(provider.close, "close() at the end")

    def test_closing_one_leaves_the_other(
        self, provider: KeyProvider[Any], provider_factory: ProviderFactory, dek: Dek, wrap_key: str
    ) -> None:
        """Closing one provider leaves another of the same service working, because configs share
        services; look at logins, sessions and libraries that the process has once.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        with provider_factory() as other:
            self.demand.wraps(other, wrap_key, dek, "wrap() of the other")
        self.demand.unwraps(provider, wrapped, dek, "unwrap() after the other was closed")

    def test_check(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """check() of a service without a fault returns a Health with findings, none of them failed,
        with and without a key, because doctor prints it; look at the findings that failed.
        """
        for arguments in ((), (wrap_key,)):
            health = self.demand.works(partial(provider.check, *arguments), f"check{arguments}")
            self.demand.that(isinstance(health, Health), f"it returned {type(health).__name__}")
            self.demand.that(health.findings, f"check{arguments} found nothing at all")
            failed = [f"{f.name}: {f.detail}" for f in health.findings if f.status == "failed"]
            self.demand.that(not failed, f"check{arguments}: {'; '.join(failed)}")

    def test_threads(self, provider: KeyProvider[Any], wrap_key: str) -> None:
        """Eight threads that wrap and unwrap through one provider each get their own key back,
        because a server opens models in parallel; look at connections, sessions and buffers
        shared without a lock.
        """
        failures: list[str] = []
        start = threading.Barrier(THREADS)

        def work(number: int) -> None:
            start.wait()
            for _ in range(ROUNDS):
                context = b"thread %d" % number
                try:
                    with Dek.generate() as dek:
                        wrapped = provider.wrap(wrap_key, dek, context)
                        with provider.unwrap(wrapped, context) as unwrapped:
                            if unwrapped != dek:
                                failures.append("a thread got another thread's key")
                except Exception as error:  # noqa: BLE001 - reported whatever it is
                    failures.append(f"a thread got {describe(error)}")

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(THREADS)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # provokes races that would otherwise be rare
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        finally:
            sys.setswitchinterval(before)
        self.demand.that(not any(t.is_alive() for t in threads), "the threads have not ended")
        calls = THREADS * ROUNDS
        self.demand.that(not failures, f"{len(failures)} of {calls} failed; {failures[:1]}")

    def test_close_during_calls(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """close() while another thread calls ends every call with the right key or a ProviderError,
        because shutdown does not wait; look whether close() takes the lock that calls hold.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        failures: list[str] = []
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                try:
                    if provider.unwrap(wrapped, b"c") != dek:
                        failures.append("another key came back")
                except ProviderError:
                    pass
                except Exception as error:  # noqa: BLE001 - reported whatever it is
                    failures.append(describe(error))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            self.demand.works(provider.close, "close() while others call")
            done.wait(0.01)
        done.set()
        for thread in threads:
            thread.join(60)
        self.demand.that(not any(t.is_alive() for t in threads), "a call has not ended")
        self.demand.that(not failures, f"{len(failures)} calls failed; {failures[:1]}")

    def test_fork(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str, time_limit: float
    ) -> None:
        """A forked child wraps and unwraps with the provider that its parent had connected, and the
        provider goes on working in the parent, because servers fork their workers; look for a check
        of os.getpid() before a connection is used again.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        for _ in range(2):
            answer = _process.in_fork(
                partial(_round_trip, provider, wrapped, dek), time_limit + self.patience
            )
            self.demand.that(answer == "right", f"the child: {answer}")
            answer = _round_trip(provider, wrapped, dek)
            self.demand.that(answer == "right", f"the parent afterwards: {answer}")

    def test_fork_while_another_thread_calls(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str, time_limit: float
    ) -> None:
        """A child forked while another thread was inside a call still unwraps, because a lock held
        at that moment stays locked in the child for ever; look for locks that are not made anew
        after fork (os.register_at_fork, or a check of os.getpid() before the lock).
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                provider.unwrap(wrapped, b"c").wipe()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            for _ in range(4):
                done.wait(0.003)
                answer = _process.in_fork(
                    partial(_round_trip, provider, wrapped, dek), time_limit + self.patience
                )
                self.demand.that(answer == "right", f"the child: {answer}")
        finally:
            done.set()
            thread.join(60)

    def test_spawn(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        time_limit: float,
        lives_in_this_process: bool,
    ) -> None:
        """A new process that makes the provider from its class, name and settings unwraps, because
        workers are also spawned; look at state that only this process has, and at settings that
        are not picklable.
        """
        kind = type(provider)
        if lives_in_this_process:
            self.skip("this service exists only in this process")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        task = (kind.__module__, kind.__qualname__, provider.name, wrapped, b"c")
        settings = self.demand.works(partial(pickle.dumps, provider.settings), "pickling settings")
        answer = _process.in_spawn((*task, settings), bytes(dek.view()), time_limit + 45)
        if answer == _process.NOT_IMPORTABLE:
            self.skip(f"a new process cannot import {kind.__module__}")
        self.demand.that(answer == "right", f"the new process: {answer}")

    def test_is_never_pickled(self, provider: KeyProvider[Any]) -> None:
        """Pickling or copying a provider is a TypeError, because it would carry a login or a
        session to where it does not belong; look for a __reduce__ or __getstate__ of your own.
        """
        for label, call in (
            ("pickle.dumps()", pickle.dumps),
            ("copy.copy()", copy.copy),
            ("copy.deepcopy()", copy.deepcopy),
            ("multiprocessing", multiprocessing.reduction.ForkingPickler.dumps),
        ):
            self.demand.refused(partial(call, provider), label, TypeError)

    def test_keeps_no_data_key(self, provider: KeyProvider[Any], dek: Dek, wrap_key: str) -> None:
        """After wrap() and unwrap() the provider holds no copy of the data key, and wiping one
        result changes no other, because the caller alone decides how long a key lives; look for
        caches and for buffers kept in attributes.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        first = self.demand.works(partial(provider.unwrap, wrapped, b"c"), "unwrap()")
        second = self.demand.works(partial(provider.unwrap, wrapped, b"c"), "unwrap()")
        first.wipe()
        self.demand.same_key(second, dek, "after the first result was wiped, the second")
        with Dek(bytes(dek.view())) as copied:
            dek.wipe()
            second.wipe()
            held = _process.holds(provider, copied)
            self.demand.that(held is None, f"the data key is still in {held}")

    def test_no_secret_escapes(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        secret_values: Sequence[bytes],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Neither the data key nor a secret of the settings is seen in repr, str, logs at DEBUG,
        standard output, findings, exceptions or their tracebacks, because all of these end in
        files; look at the text that is named and at what the client library logs.
        """
        missing = f"kit-missing-{secrets.token_hex(6)}"
        with caplog.at_level(logging.NOTSET):
            logging.getLogger().setLevel(logging.DEBUG)
            wrapped = self.demand.wraps(provider, wrap_key, dek)
            provider.unwrap(wrapped, b"c").wipe()
            seen = {
                "the provider": f"{provider!r} {provider} {provider:}",
                "the settings": f"{provider.settings!r} {provider.settings}",
                "the wrapped key": f"{wrapped!r} {wrapped}",
                "check()": f"{provider.check()!r} {provider.check(wrap_key)!r}",
            }
            failing: dict[str, Callable[[], object]] = {
                "wrap() under a missing key": partial(provider.wrap, missing, dek, b"c"),
                "wrap() under a hostile name": partial(provider.wrap, "../x", dek, b"c"),
                "unwrap() with another context": partial(provider.unwrap, wrapped, b"d"),
                "unwrap() of a damaged blob": partial(
                    provider.unwrap, replace(wrapped, blob=wrapped.blob[:-1] or b"x"), b"c"
                ),
                "unwrap() of another backend": partial(
                    provider.unwrap, replace(wrapped, backend="other"), b"c"
                ),
            }
            for label, call in failing.items():
                seen[f"the error of {label}"] = raised(call)
        output, errors = capfd.readouterr()
        seen |= {"the log": caplog.text, "standard output": output, "standard error": errors}
        seen["the records of the log"] = "\n".join(repr(vars(r)) for r in caplog.records)
        hidden = [bytes(dek.view()), *secret_values]
        for where, text in seen.items():
            self.demand.hides(text, hidden, where)


def _round_trip(provider: KeyProvider[Any], wrapped: WrappedKey, dek: Dek) -> str:
    try:
        if provider.unwrap(wrapped, b"c") != dek:
            return "unwrap() gave another key"
        again = provider.wrap(wrapped.key, dek, b"c")
        return "right" if provider.unwrap(again, b"c") == dek else "wrap() gave another key"
    except Exception as error:  # noqa: BLE001 - reported whatever it is
        return describe(error)
