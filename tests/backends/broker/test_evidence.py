"""Evidence of SGX and TDX from files that are simulated: with the hardware they are the same."""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from keymgmt_broker._evidence_sgx import GramineEvidence, GramineSettings
from keymgmt_broker._evidence_tdx import TsmEvidence, TsmSettings
from keymgmt_broker._quote_layout import report_data_of
from tees import mounted

from keymgmt.backend import AccessDenied, ProviderUnavailable, load_evidence

ASKED = hashlib.sha256(b"a request").digest()


@pytest.fixture
def tee(require_tool, tmp_path, world):
    """Mount the files of a kind of TEE; ``tmp_path / "fault"`` says what goes wrong next."""
    with contextlib.ExitStack() as stack:
        yield lambda kind: stack.enter_context(
            mounted(kind, world, tmp_path / kind, require_tool, tmp_path / "fault")
        )


@pytest.fixture
def sgx(tee):
    def make(timeout: float = 20.0) -> GramineEvidence:
        folder = tee("sgx")
        return GramineEvidence(
            GramineSettings(
                user_report_data=folder / "user_report_data",
                quote=folder / "quote",
                timeout=timeout,
            )
        )

    return make


@pytest.fixture
def tdx(tee):
    def make(timeout: float = 20.0) -> TsmEvidence:
        return TsmEvidence(TsmSettings(reports=tee("tdx"), timeout=timeout))

    return make


def test_they_are_found_by_name():
    assert load_evidence("sgx") is GramineEvidence
    assert load_evidence("tdx") is TsmEvidence
    for kind in (GramineEvidence, TsmEvidence):
        kind(kind.Settings()).settings  # noqa: B018 - all members have defaults; no I/O
        with pytest.raises(ValueError, match="32 bytes"):
            kind(kind.Settings()).quote(b"short")


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_a_quote_of_what_was_asked(request, kind):
    evidence = request.getfixturevalue(kind)()
    assert report_data_of(evidence.quote(ASKED)) == ASKED + bytes(32)
    assert report_data_of(evidence.quote(bytes(32))) == bytes(64)
    if kind == "tdx":
        assert not list(evidence.settings.reports.iterdir())


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_threads_get_quotes_of_their_own(request, kind):
    evidence = request.getfixturevalue(kind)()
    again = type(evidence)(evidence.settings)

    def ask(number: int) -> bool:
        asked = hashlib.sha256(b"%d" % number).digest()
        return report_data_of((evidence, again)[number % 2].quote(asked)) == asked + bytes(32)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(80)))


def test_a_program_that_writes_report_data_in_between_is_noticed(sgx, tmp_path):
    """Gramine's files are of the whole enclave: the quote may be another's."""
    evidence = sgx()
    (tmp_path / "fault").write_text("stale 2")
    assert report_data_of(evidence.quote(ASKED)) == ASKED + bytes(32)
    (tmp_path / "fault").write_text("stale 3")
    with pytest.raises(ProviderUnavailable, match="does not hold the report data") as caught:
        evidence.quote(ASKED)
    assert "let one program use it" in str(caught.value.hint)


def test_what_gramine_refuses(sgx, tmp_path):
    evidence = sgx()
    (tmp_path / "fault").write_text("EACCES")
    with pytest.raises(AccessDenied, match="Gramine refused"):
        evidence.quote(ASKED)
    (tmp_path / "fault").write_text("EIO")
    with pytest.raises(ProviderUnavailable, match="cannot use"):
        evidence.quote(ASKED)
    (tmp_path / "fault").write_text("long")
    with pytest.raises(ProviderUnavailable, match="more than"):
        evidence.quote(ASKED)
    assert evidence.quote(ASKED)


def test_a_guest_whose_host_is_busy_is_waited_for(tdx, tmp_path):
    evidence = tdx()
    for fault in ("EBUSY 3", "EINTR", "EIO", "stale"):
        (tmp_path / "fault").write_text(fault)
        assert report_data_of(evidence.quote(ASKED)) == ASKED + bytes(32)
    assert not list(evidence.settings.reports.iterdir())


def test_a_host_that_gives_no_quote(tdx, tmp_path):
    evidence = tdx(timeout=0.5)
    for fault in ("EBUSY 999", "stale 999", "long 999"):
        (tmp_path / "fault").write_text(fault)
        with pytest.raises(ProviderUnavailable, match="gave no"):
            evidence.quote(ASKED)
    (tmp_path / "fault").write_text("ENXIO")
    with pytest.raises(ProviderUnavailable, match="gave no quote"):
        evidence.quote(ASKED)
    assert not list(evidence.settings.reports.iterdir())


def test_machines_without_the_hardware(tmp_path):
    files = {"user_report_data": tmp_path / "a", "quote": tmp_path / "b"}
    with pytest.raises(ProviderUnavailable, match="no enclave") as caught:
        GramineEvidence(GramineSettings(**files)).quote(ASKED)
    assert "sgx.remote_attestation" in str(caught.value.hint)
    with pytest.raises(ProviderUnavailable, match="no TDX guest") as caught:
        TsmEvidence(TsmSettings(reports=tmp_path / "none")).quote(ASKED)
    assert "modprobe" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
