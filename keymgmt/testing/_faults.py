"""Checks of failures: the service is gone, hangs, returns, ends the login, refuses.

They need hooks that the backend's author supplies; without these they are skipped, with the reason.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from keymgmt.backend import (
    AccessDenied,
    Dek,
    Health,
    KeyProvider,
    LockedOut,
    ProviderUnavailable,
)
from keymgmt.testing._demand import describe, join, printed, raised
from keymgmt.testing._fixtures import ContractFixtures, Hook, ProviderFactory

__all__ = ["FaultChecks"]

Call = tuple[str, Callable[[], object]]


class FaultChecks(ContractFixtures):
    """The service breaks, hangs, heals, expires logins, denies."""

    @pytest.fixture
    def _healed(self, heal_service: Hook | None) -> Iterator[None]:
        yield
        if heal_service is not None:
            heal_service()

    def _unavailable(self, call: Callable[[], object], seconds: float, subject: str) -> None:
        # A signal, or closing a port, takes effect after a moment; until then the service answers.
        for _ in range(20):
            try:
                self.demand.ends(seconds + self.grace, call, subject)
            except ProviderUnavailable:
                return
            except Exception as error:  # noqa: BLE001 - reported whatever it is
                self.demand.fail(
                    f"{subject} raised {describe(error)}; expected ProviderUnavailable"
                )
            time.sleep(0.05)
        self.demand.fail(f"{subject} was answered; expected ProviderUnavailable")

    def _until_it_works(
        self, provider: KeyProvider[Any], key: str, dek: Dek, seconds: float
    ) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                unwrapped = provider.unwrap(provider.wrap(key, dek, b"c"), b"c")
            except ProviderUnavailable as error:
                if time.monotonic() > end:
                    self.demand.fail(
                        f"{seconds:g} s after the service healed there was {describe(error)}"
                    )
                time.sleep(0.05)
            except Exception as error:  # noqa: BLE001 - reported whatever it is
                self.demand.fail(f"after the service healed there was {describe(error)}")
            else:
                self.demand.same_key(unwrapped, dek, "after the service healed, unwrap()")
                return

    @pytest.mark.usefixtures("_healed")
    def test_service_goes_and_returns(
        self,
        provider: KeyProvider[Any],
        provider_factory: ProviderFactory,
        dek: Dek,
        wrap_key: str,
        break_service: Hook | None,
        heal_service: Hook | None,
        time_limit: float,
        recovery_time: float,
        wraps_offline: bool,
    ) -> None:
        """While the service is gone every call is ProviderUnavailable within the time limit, for a
        connected and for a new provider, and the same providers work once it is back, because a
        server outlives its key service; look at error mapping and at how a lost connection is
        dropped and made again.
        """
        broken = self.need(break_service, "break_service")
        heal = self.need(heal_service, "heal_service")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        with provider_factory() as other:
            broken()
            for which, each_provider in (("a connected", provider), ("a new", other)):
                calls: list[Call] = [("unwrap()", partial(each_provider.unwrap, wrapped, b"c"))]
                if not wraps_offline:
                    calls.append(("wrap()", partial(each_provider.wrap, wrap_key, dek, b"c")))
                for name, call in calls:
                    subject = f"{name} of {which} provider, with the service gone,"
                    self._unavailable(call, time_limit, subject)
            heal()
            for each_provider in (provider, other):
                self._until_it_works(each_provider, wrap_key, dek, recovery_time)

    @pytest.mark.usefixtures("_healed")
    def test_check_of_a_broken_service(
        self, provider: KeyProvider[Any], wrap_key: str, break_service: Hook | None
    ) -> None:
        """check() of a service that is gone reports a failed finding and raises nothing, because
        doctor is run exactly then; look whether check() catches every ProviderError.
        """
        self.need(break_service, "break_service")()
        for arguments in ((), (wrap_key,)):
            health = self.demand.works(partial(provider.check, *arguments), f"check{arguments}")
            self.demand.that(isinstance(health, Health), f"it returned {type(health).__name__}")
            self.demand.that(not health.ok, f"check{arguments} reported that all is well")

    @pytest.mark.usefixtures("_healed")
    def test_closing_a_broken_service(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        break_service: Hook | None,
        time_limit: float,
    ) -> None:
        """Making and closing providers while the service is gone raises nothing and ends within the
        time limit, because shutdown must not fail; look whether close() says goodbye to a service
        that no longer listens.
        """
        broken = self.need(break_service, "break_service")
        self.demand.wraps(provider, wrap_key, dek)
        broken()
        subject = "close() with the service gone"

        def close() -> bool:
            provider.close()
            return True

        self.demand.works(
            partial(self.demand.ends, time_limit + self.grace, close, subject), subject
        )
        kind = type(provider)
        self.demand.works(lambda: kind(provider.name, provider.settings).close(), "a new provider")

    @pytest.mark.usefixtures("_healed")
    def test_service_hangs(
        self,
        provider: KeyProvider[Any],
        provider_factory: ProviderFactory,
        dek: Dek,
        wrap_key: str,
        hang_service: Hook | None,
        heal_service: Hook | None,
        time_limit: float,
        recovery_time: float,
    ) -> None:
        """A service that never answers makes every call ProviderUnavailable within the time limit,
        and the provider works once it answers again, because a stuck key service must not stick
        the application; look at time-outs of connecting, reading and of C calls (within()).
        """
        hang = self.need(hang_service, "hang_service")
        heal = self.need(heal_service, "heal_service")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        with provider_factory() as other:
            hang()
            for which, each_provider in (("a connected", provider), ("a new", other)):
                subject = f"unwrap() of {which} provider, with the service hung,"
                call = partial(each_provider.unwrap, wrapped, b"c")
                self._unavailable(call, time_limit, subject)
            health = self.demand.works(
                partial(self.demand.ends, time_limit + self.grace, provider.check, "check()"),
                "check()",
            )
            self.demand.that(not health.ok, "check() reported that all is well")
            heal()
            for each_provider in (provider, other):
                self._until_it_works(each_provider, wrap_key, dek, recovery_time)

    @pytest.mark.usefixtures("_healed")
    def test_service_hangs_for_many(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        hang_service: Hook | None,
        heal_service: Hook | None,
        time_limit: float,
        recovery_time: float,
    ) -> None:
        """Many threads that call a hung service through one provider all end within the time limit,
        because a queue of calls that each wait their turn is a stuck application; look whether
        waiting for a lock or a connection counts towards the limit.
        """
        hang = self.need(hang_service, "hang_service")
        heal = self.need(heal_service, "heal_service")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        hang()
        failures: list[str] = []

        def work() -> None:
            try:
                for _ in range(20):  # until the hang has taken effect
                    provider.unwrap(wrapped, b"c").wipe()
                    time.sleep(0.05)
                failures.append("a call was answered")
            except ProviderUnavailable:
                pass
            except Exception as error:  # noqa: BLE001 - reported whatever it is
                failures.append(f"a call raised {describe(error)}")

        threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        join(threads, time_limit + self.grace)
        alive = sum(thread.is_alive() for thread in threads)
        heal()
        self.demand.that(
            not alive,
            f"{alive} of {len(threads)} calls have not ended {self.grace:g} s after the time limit",
        )
        self.demand.that(not failures, "; ".join(failures[:1]))
        self._until_it_works(provider, wrap_key, dek, recovery_time)

    def test_login_expires(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str, expire_login: Hook | None
    ) -> None:
        """After the service ended the login, the next call logs in again and works, because tokens
        and sessions end in the middle of the night; look how an expired login is told from a
        refusal, and whether it is tried again exactly once.
        """
        expire = self.need(expire_login, "expire_login")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        for _ in range(2):
            expire()
            self.demand.unwraps(provider, wrapped, dek, "after the login ended, unwrap()")
        expire()
        self.demand.wraps(provider, wrap_key, dek, "after that, wrap()")

    def test_denied(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        denied_factory: ProviderFactory | None,
        secret_values: Sequence[bytes],
        wraps_offline: bool,
    ) -> None:
        """A login that the service refuses is AccessDenied (LockedOut where it locks), never
        unavailable or a damaged blob, and repeats no secret, because the operator must know whom
        to ask; look at the mapping of errors at login.
        """
        if denied_factory is None:
            self.skip("the fixture denied_factory was not supplied")
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        with denied_factory() as denied:
            calls: list[Call] = [("unwrap()", partial(denied.unwrap, wrapped, b"c"))]
            if not wraps_offline:
                calls.append(("wrap()", partial(denied.wrap, wrap_key, dek, b"c")))
            for name, call in calls:
                error = self.demand.refused(call, name, AccessDenied, LockedOut)
                self.demand.hides(printed(error), [bytes(dek.view()), *secret_values], "its error")
            health = self.demand.works(denied.check, "check()")
            self.demand.that(not health.ok, "check() reported that all is well")

    @pytest.mark.usefixtures("_healed")
    def test_no_secret_escapes_when_broken(
        self,
        provider: KeyProvider[Any],
        dek: Dek,
        wrap_key: str,
        secret_values: Sequence[bytes],
        break_service: Hook | None,
        wraps_offline: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The errors and logs of a service that is gone hold neither the data key nor a secret,
        because client libraries put the request that failed into them; look at what the library's
        exceptions carry before they become __cause__.
        """
        broken = self.need(break_service, "break_service")
        name = f"kit-missing-{secrets.token_hex(6)}"
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        caplog.set_level("DEBUG")
        broken()
        hidden = [bytes(dek.view()), *secret_values]
        calls: list[Call] = [
            ("wrap() under a missing key", partial(provider.wrap, name, dek, b"c")),
            ("unwrap()", partial(provider.unwrap, wrapped, b"c")),
        ]
        if not wraps_offline:
            calls.append(("wrap()", partial(provider.wrap, wrap_key, dek, b"c")))
        for label, call in calls:
            self.demand.hides(raised(call), hidden, f"the error of {label}")
        self.demand.hides(caplog.text, hidden, "the log")
