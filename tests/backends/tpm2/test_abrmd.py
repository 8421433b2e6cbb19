"""Behind a resource manager: tpm2-abrmd on a bus of its own, as the kernel's /dev/tpmrm0 is."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

import pytest
from keymgmt_tpm2 import Tpm2Provider
from waiting import until

from keymgmt.backend import Dek, ProviderUnavailable

CONTEXT = b"a context"


@pytest.fixture
def managed(swtpm, settings, require_tool, monkeypatch):
    """Settings that reach the emulator through the resource manager."""
    daemon = require_tool("tpm2-abrmd", "/usr/sbin/tpm2-abrmd", package="tpm2-abrmd")
    bus = require_tool("dbus-daemon", package="dbus")
    with subprocess.Popen(
        [str(bus), "--session", "--nofork", "--print-address"], stdout=subprocess.PIPE, text=True
    ) as session:
        manager = None
        try:
            monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", session.stdout.readline().strip())
            command = [str(daemon), "--session", "--allow-root", f"--tcti={swtpm.tcti}"]
            manager = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            changed = settings.model_copy(update={"tcti": "tabrmd:bus_type=session"})
            with Tpm2Provider("tpm", changed) as provider:
                until(lambda: provider.check().findings[0].status == "ok", said=provider.check)
            yield changed
        finally:
            for process in (manager, session):
                if process is not None:
                    process.kill()
                    process.wait()


def test_behind_a_resource_manager(managed, swtpm):
    """One test, because GLib keeps the bus of a process for ever."""
    with Tpm2Provider("tpm", managed) as provider, Dek.generate() as dek:
        provider.create_key("dev", "ecc-p256", {"pcr": "7"})
        slots = next(f for f in provider.check().findings if f.name == "slots")
        assert "with a resource manager" in slots.detail
        wrapped = provider.wrap("dev", dek, CONTEXT)
        for _ in range(20):
            with provider.unwrap(wrapped, CONTEXT) as again:
                assert again == dek
        many_at_once(managed, wrapped, dek)
        a_full_broker(managed, wrapped, dek)
        with Tpm2Provider("tpm", managed.model_copy(update={"timeout": 1.0})) as hasty:
            swtpm.hang()
            start = time.monotonic()
            with pytest.raises(ProviderUnavailable, match="gave no answer within"):
                hasty.unwrap(wrapped, CONTEXT)
            assert time.monotonic() - start < 20
            swtpm.resume()
        with provider.unwrap(wrapped, CONTEXT) as again:
            assert again == dek


def a_full_broker(managed, wrapped, dek):
    """At its limit of connections it is waited for, and said where that does not help."""
    from tpm2_pytss import ESAPI, TSS2_Exception

    held = []
    with contextlib.suppress(TSS2_Exception):
        while len(held) < 1000:
            held.append(ESAPI(managed.tcti))
    assert 0 < len(held) < 1000
    with (
        Tpm2Provider("tpm", managed.model_copy(update={"timeout": 1.0})) as hasty,
        pytest.raises(ProviderUnavailable, match="serves as many clients as it can"),
    ):
        hasty.unwrap(wrapped, CONTEXT)
    threading.Timer(0.5, lambda: held.pop().close()).start()
    with Tpm2Provider("tpm", managed) as patient, patient.unwrap(wrapped, CONTEXT) as again:
        assert again == dek
    while held:
        held.pop().close()


def many_at_once(managed, wrapped, dek):
    """Several providers share nothing and need not take turns."""
    failures = []

    def work():
        try:
            with Tpm2Provider("tpm", managed.model_copy(update={"timeout": 60.0})) as provider:
                for _ in range(10):
                    with provider.unwrap(wrapped, CONTEXT) as again:
                        assert again == dek
        except Exception as error:  # noqa: BLE001 - reported below
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
