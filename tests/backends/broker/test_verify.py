"""Evidence against policy: of a root of our own, of recorded machines, and in bad faith."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import programs
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from keymgmt.backend import AccessDenied, ConfigError

pytest.importorskip("keymgmt_broker_service")
from keymgmt_broker._settings import BrokerSettings
from keymgmt_broker_service._verify._collateral import NotReady, Refused, load_collateral
from keymgmt_broker_service._verify._policies import AnyPolicy
from keymgmt_broker_service._verify._quotes import Claims, Ready, examine, prepare
from quotes import MR_TD, MRENCLAVE, MRSIGNER, RTMRS, World

ASKED = hashlib.sha256(b"a request").digest()
DATA = Path(__file__).with_name("data")
DAY = 86400
SGX = {"evidence": "sgx", "mrenclave": [MRENCLAVE.hex()]}
SIGNED = {"evidence": "sgx", "mrsigner": MRSIGNER.hex(), "product": 1, "minimum_svn": 3}
TDX = {
    "evidence": "tdx",
    "mr_td": [MR_TD.hex()],
    "rtmr1": [RTMRS[1].hex()],
    "rtmr2": [RTMRS[2].hex()],
}
ADAPTER: TypeAdapter = TypeAdapter(AnyPolicy)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def run_keymgmt(tmp_path):
    def run(*arguments, code=0) -> str:
        command = [sys.executable, "-m", "keymgmt", *map(str, arguments)]
        home = {**os.environ, "HOME": str(tmp_path), "COLUMNS": "120"}
        done = programs.run(*command, env=home)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout

    return run


def verify(evidence: bytes, asked: bytes, ready: Ready, collateral: Any, now: int) -> Claims:
    """As the service judges evidence for one policy."""
    kind = getattr(ready, "evidence", "tpm2")
    return examine(evidence, asked, kind, collateral, now)(ready)


def judge(world, evidence, policy, folder, *, asked=ASKED, now=None, **members):
    """Load the collateral of a world and judge evidence with it."""
    collateral = load_collateral(folder, world.write(folder))
    ready = prepare(ADAPTER.validate_python(policy | members))
    return verify(evidence, asked, ready, collateral, int(now or time.time()))


def refused(reason, *arguments, kind=Refused, **options):
    with pytest.raises(kind, match=reason):
        judge(*arguments, **options)


def test_enclaves_that_are_wanted(world, tmp_path):
    said = judge(world, world.sgx(ASKED), SGX, tmp_path / "c").facts
    assert said["mrenclave"] == MRENCLAVE.hex()
    assert (said["tcb"], said["fmspc"], said["svn"]) == ("UpToDate", "00906ed50000", "3")
    assert judge(world, world.sgx(ASKED, mrenclave=bytes(32)), SIGNED, tmp_path / "c")
    assert judge(world, world.sgx(ASKED, svn=9), SIGNED, tmp_path / "c")
    # Bytes behind the end are no part of what is signed, and real quotes have them.
    assert judge(world, world.sgx(ASKED) + bytes(70), SGX, tmp_path / "c")


@pytest.mark.parametrize("form", [{}, {"version": 5}, {"version": 5, "newer": True}])
def test_guests_that_are_wanted(world, tmp_path, form):
    assert judge(world, world.tdx(ASKED, **form), TDX, tmp_path / "c").facts["mr_td"] == MR_TD.hex()
    assert judge(
        world, world.tdx(ASKED, **form), TDX, tmp_path / "c", attributes=["0000001000000000"]
    )
    refused(
        "rt_mr2 is",
        world,
        world.tdx(ASKED, rtmrs=(*RTMRS[:2], *RTMRS[:2]), **form),
        TDX,
        tmp_path / "c",
    )
    refused("another request", world, world.tdx(bytes(32), **form), TDX, tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "policy", "reason"),
    [
        ({"debug": True}, SGX, "[Dd]ebug"),
        ({"debug": True}, SIGNED, "[Dd]ebug"),
        ({"mrenclave": b"\1" * 32}, SGX, "none of mrenclave"),
        ({"mrsigner": b"\2" * 32}, SIGNED, "product 1 of the signer 0202"),
        ({"product": 2}, SIGNED, "product 2 of the signer 5151"),
        ({"svn": 2}, SIGNED, "SVN is 2, less than 3"),
    ],
)
def test_enclaves_that_are_not(world, tmp_path, changes, policy, reason):
    refused(reason, world, world.sgx(ASKED, **changes), policy, tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mr_td": b"\1" * 48}, "mr_td is 0101"),
        ({"rtmrs": (RTMRS[0], bytes(48), RTMRS[2], RTMRS[3])}, "rt_mr1 is 0000"),
        ({"attributes": 1 | 1 << 28}, "[Dd]ebug"),
        ({"attributes": 2 | 1 << 28}, "Reserved bits"),
        ({"attributes": 1 << 29 | 1 << 28}, "TD migration"),
        ({"attributes": 0}, "SEPT_VE_DISABLE"),
    ],
)
def test_guests_that_are_not(world, tmp_path, changes, reason):
    refused(reason, world, world.tdx(ASKED, **changes), TDX, tmp_path / "c")


def test_evidence_of_another_request_or_kind(world, tmp_path):
    for other in (bytes(32), ASKED[:31], ASKED[::-1]):
        refused("another request", world, world.sgx(other), SGX, tmp_path / "c")
    # The other half of the report data is not free either.
    refused("another request", world, world.sgx(ASKED + b"x"), SGX, tmp_path / "c")
    refused("a quote of tdx and not of sgx", world, world.tdx(ASKED), SGX, tmp_path / "c")
    refused("a quote of sgx and not of tdx", world, world.sgx(ASKED), TDX, tmp_path / "c")


def test_a_quote_of_another_root(world, tmp_path):
    """Its whole chain is right, up to a root that is not ours; nor is ours Intel's."""
    stranger = World()
    refused("Verification failed|no quote", world, stranger.sgx(ASKED), SGX, tmp_path / "c")
    world.write(tmp_path / "c3")
    intel = load_collateral(tmp_path / "c3")
    with pytest.raises(Refused, match="root CA"):
        verify(
            world.sgx(ASKED), ASKED, prepare(ADAPTER.validate_python(SGX)), intel, int(time.time())
        )


def test_a_quoted_key_that_signs_a_chain_of_another_platform(world, tmp_path):
    """Header and body are signed by the attestation key, and that by the processor's."""
    quote, other = world.sgx(ASKED), world.sgx(bytes(32))
    refused(
        "Verification failed|no quote",
        world,
        other[: 48 + 320] + ASKED + other[48 + 352 :],
        SGX,
        tmp_path / "c",
    )
    stranger = World()
    size = 48 + 384 + 4 + 128
    refused(
        "Verification failed|no quote",
        world,
        quote[:size] + stranger.sgx(ASKED)[size:],
        SGX,
        tmp_path / "c",
    )


@pytest.mark.parametrize("revoked", ["pck", "ca", "signer"])
def test_revoked_certificates(tmp_path, revoked):
    world = World(revoked=[revoked])
    refused("certificate chain", world, world.sgx(ASKED), SGX, tmp_path / "c")
    refused("certificate chain", world, world.tdx(ASKED), TDX, tmp_path / "c")


def test_states_of_the_tcb(tmp_path):
    """What is not up to date is named in the policy, and so is each advisory."""
    world = World(status="SWHardeningNeeded", advisories=["INTEL-SA-00615", "INTEL-SA-00289"])
    quote = world.sgx(ASKED)
    refused("TCB is SWHardeningNeeded .INTEL-SA-00615", world, quote, SGX, tmp_path / "c")
    states = ["UpToDate", "SWHardeningNeeded"]
    one = ["INTEL-SA-00615"]
    refused("by INTEL-SA-00289 too", world, quote, SGX, tmp_path / "c", tcb=states, advisories=one)
    both = [*one, "INTEL-SA-00289"]
    said = judge(world, quote, SGX, tmp_path / "c", tcb=states, advisories=both).facts
    assert said["advisories"] == "INTEL-SA-00615, INTEL-SA-00289"
    old = World(status="OutOfDate")
    refused("TCB is OutOfDate", old, old.tdx(ASKED), TDX, tmp_path / "d", tcb=states)
    assert judge(old, old.tdx(ASKED), TDX, tmp_path / "d", tcb=["OutOfDate"])
    gone = World(status="Revoked")
    every = ["UpToDate", "OutOfDate", "OutOfDateConfigurationNeeded", "ConfigurationNeeded"]
    refused("(?i)revoked", gone, gone.sgx(ASKED), SGX, tmp_path / "e", tcb=every)
    with pytest.raises(ValueError, match="tcb"):
        ADAPTER.validate_python(SGX | {"tcb": ["Revoked"]})


def test_what_a_platform_must_not_have(tmp_path):
    names = ("dynamic_platform", "cached_keys", "smt")
    for index, name in enumerate(names):
        world = World(flags=tuple(at == index for at in range(3)))
        quote = world.sgx(ASKED)
        assert judge(world, quote, SGX, tmp_path / name)
        refused(f"has {name}", world, quote, SGX, tmp_path / name, refuse=[name])
        rest = [each for each in names if each != name]
        assert judge(world, quote, SGX, tmp_path / name, refuse=rest)
    silent = World(flags=None)
    assert judge(silent, silent.sgx(ASKED), SGX, tmp_path / "silent")
    refused("or does not say", silent, silent.sgx(ASKED), SGX, tmp_path / "silent", refuse=["smt"])


def test_collateral_of_an_old_evaluation(tmp_path):
    world = World(evaluation=16)
    refused(
        "of evaluation 16, before 17", world, world.sgx(ASKED), SGX, tmp_path / "c", evaluation=17
    )
    assert judge(world, world.sgx(ASKED), SGX, tmp_path / "c", evaluation=16)


@pytest.mark.parametrize("policy", [SGX, TDX])
def test_collateral_that_is_missing_expired_or_of_the_future_is_the_services_fault(
    world, tmp_path, policy
):
    quote = world.sgx(ASKED) if policy is SGX else world.tdx(ASKED)
    now = time.time()
    refused("expired", world, quote, policy, tmp_path / "c", now=now + 31 * DAY, kind=NotReady)
    refused("future", world, quote, policy, tmp_path / "c", now=now - 2 * 3600, kind=NotReady)
    assert judge(world, quote, policy, tmp_path / "c", now=now + 29 * DAY)
    other = World(fmspc=b"\1" * 6)
    other.write(tmp_path / "o")
    with pytest.raises(NotReady, match=r"no collateral of the platform ... 00906ED50000 platform"):
        verify(
            quote,
            ASKED,
            prepare(ADAPTER.validate_python(policy)),
            load_collateral(tmp_path / "o"),
            int(now),
        )
    with pytest.raises(NotReady, match="no folder"):
        verify(quote, ASKED, prepare(ADAPTER.validate_python(policy)), None, int(now))
    assert issubclass(NotReady, AccessDenied)


def test_collateral_of_another_platform_under_this_ones_name(world, tmp_path):
    """A file is what it says that it is: TCB info names its platform under its signature."""
    other = World(fmspc=b"\1" * 6)
    folder = tmp_path / "c"
    world.write(folder)
    root = folder.with_name("root.der")
    for kind in ("sgx", "tdx"):
        content = json.dumps(other.collateral(kind)).replace("010101010101", "00906ED50000")
        (folder / f"{kind}-00906ed50000.json").write_text(content)
    ready = prepare(ADAPTER.validate_python(SGX))
    with pytest.raises(Refused):
        verify(world.sgx(ASKED), ASKED, ready, load_collateral(folder, root), int(time.time()))


def test_tcb_info_that_another_key_under_the_root_signed(world, tmp_path):
    """The verifier takes it: a processor's key could say that its own platform is up to date."""
    folder = tmp_path / "c"
    root = world.write(folder)
    (folder / "sgx-00906ed50000.json").write_text(
        json.dumps(world.collateral("sgx", signed_by="pck"))
    )
    with pytest.raises(ConfigError, match="is signed by 'Intel SGX PCK Certificate'"):
        load_collateral(folder, root)
    other = World(signer="Intel SGX TCB Signing 2")
    with pytest.raises(ConfigError, match="is signed by"):
        load_collateral(tmp_path / "d", other.write(tmp_path / "d"))


def test_a_signer_that_only_the_verifier_reads(world, tmp_path):
    """A block that is not called CERTIFICATE is one to the verifier, and the signer if it is first.

    So whoever has the key of one processor could say that it is up to date.
    """
    folder = tmp_path / "c"
    root = world.write(folder)
    made, good = world.collateral("sgx", signed_by="pck"), world.collateral("sgx")
    for name in ("tcb_info_issuer_chain", "qe_identity_issuer_chain"):
        end = "-----END CERTIFICATE-----\n"
        leaf, rest = made[name].split(end, 1)
        hidden = (leaf + end).replace("CERTIFICATE", "SIGNER")
        made[name] = hidden + good[name].split(end, 1)[0] + end + rest
    (folder / "sgx-00906ed50000.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match="something besides certificates"):
        load_collateral(folder, root)


def test_folders_that_hold_no_collateral(world, tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(ConfigError, match="collateral"):
        load_collateral(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="holds no collateral"):
        load_collateral(folder)
    good = world.collateral("sgx")
    damaged = [{}, good | {"tcb_info": "{}"}, good | {"pck_crl": "00"}, good | {"root_ca_crl": ""}]
    damaged += [good | {"tcb_info_issuer_chain": ""}, [1], good | {"tcb_info": "[" * 100_000}]
    damaged += [good | {"tcb_info": good["tcb_info"].replace("nextUpdate", "next")}]
    for content in damaged:
        (folder / "x.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r"x\.json is no collateral"):
            load_collateral(folder)
    root = world.write(folder)
    (folder / "x.json").unlink()
    (folder / "sgx-00906ed50000.json").chmod(0o666)
    with pytest.raises(ConfigError, match="sgx-00906ed50000"):
        load_collateral(folder, root)
    (folder / "sgx-00906ed50000.json").chmod(0o644)
    root.write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match=r"root\.der is no certificate"):
        load_collateral(folder, root)


def test_the_newer_of_two_files_counts(tmp_path):
    """A job that writes the new file beside the old one takes nothing away."""
    now, folder = time.time(), tmp_path / "c"
    root = World(days=50).write(folder)
    for name, days in (("a", 2), ("z", 3)):
        (folder / f"{name}.json").write_text(json.dumps(World(days=days).collateral("sgx")))
    entries = load_collateral(folder, root).entries
    assert len(entries) == 2
    assert all(entry.until > now + 49 * DAY for entry in entries.values())


def test_the_command_says_what_is_old_or_missing(tmp_path, run_keymgmt, check_output):
    """Collateral of other days and of a machine that is to be served."""
    folder = tmp_path / "c"
    worlds = {days: World(days=days, fmspc=bytes([days]) * 6) for days in (30, 5)}
    for each in worlds.values():
        each.write(folder, ["sgx"])
    quotes = {days: tmp_path / f"quote{days}" for days in (30, 9)}
    quotes[30].write_bytes(worlds[30].sgx(ASKED))
    quotes[9].write_bytes(World(fmspc=b"\x09" * 6).tdx(ASKED))
    said = run_keymgmt("broker", "collateral", folder, "--quote", quotes[30])
    assert "old" in said
    assert "expired" not in said
    out = run_keymgmt("--json", "broker", "collateral", folder, "--quote", quotes[9], code=6)
    check_output(out)
    states = {each["fmspc"]: each["state"] for each in json.loads(out)["platforms"]}
    assert states == {"1E" * 6: "ok", "05" * 6: "old", "09" * 6: "missing"}
    World(now=int(time.time()) - 40 * DAY, fmspc=bytes(6)).write(folder, ["tdx"])
    assert "expired" in run_keymgmt("broker", "collateral", folder, code=6)
    run_keymgmt("broker", "collateral", folder, "--quote", folder / "sgx-050505050505.json", code=4)
    run_keymgmt("broker", "collateral", tmp_path, code=3)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"evidence": "sgx"}, "write which enclaves"),
        (SGX | {"mrsigner": "51" * 32}, "write which enclaves"),
        ({"evidence": "sgx", "mrsigner": "51" * 32}, "belong together"),
        (SIGNED | {"product": None}, "belong together"),
        (SGX | {"minimum_svn": 1}, "belong together"),
        (SGX | {"mrenclave": ["E1" * 32]}, "write 64 hex digits, in lower case"),
        (SGX | {"mrenclave": ["e1"]}, "write 64 hex digits, in lower case; these are 2"),
        ({"evidence": "tdx", "mr_td": [MR_TD.hex()]}, "firmware_only"),
        (TDX | {"firmware_only": True}, "firmware_only"),
        # Without RTMR 1 the kernel is anybody's, which can write the values of 2 and 3.
        (TDX | {"rtmr1": []}, "without rtmr1"),
        ({"evidence": "tdx", "mr_td": [MR_TD.hex()], "rtmr0": [RTMRS[0].hex()]}, "without rtmr1"),
        ({"evidence": "tdx", "mr_td": [MR_TD.hex()], "rtmr3": [RTMRS[3].hex()]}, "without rtmr1"),
        (TDX | {"rtmr1": [], "firmware_only": True}, "firmware_only = true proves nothing"),
        (TDX | {"mr_td": []}, "mr_td"),
        (SGX | {"debug": True}, "debug"),
        ({"evidence": "snp"}, "snp"),
    ],
)
def test_policies_that_say_nothing_certain(policy, reason):
    with pytest.raises(ValueError, match=reason):
        ADAPTER.validate_python(policy)


def test_what_the_page_shows_is_understood():
    """Its policies are policies, its providers are providers, and no kind is left out."""
    page = (Path(__file__).parents[3] / "docs" / "broker-policies.md").read_text()
    blocks = [tomllib.loads(text) for text in re.findall(r"```ini\n(.*?)```", page, re.DOTALL)]
    policies = [each for block in blocks for each in block.get("policies", {}).values()]
    assert {ADAPTER.validate_python(each).evidence for each in policies} == {"sgx", "tdx", "tpm2"}
    providers = [each for block in blocks for each in block.get("providers", {}).values()]
    for each in providers:
        assert each.pop("backend") == "broker"
        BrokerSettings.model_validate(each)
    assert [each["evidence"] for each in providers] == ["sgx", "tdx"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Evidence of real machines, their collateral, and a time at which that counts."""
    folder = tmp_path_factory.mktemp("recorded")
    for path in DATA.glob("*.json"):
        shutil.copy(path, folder)
    collateral = load_collateral(folder)
    now = max(entry.since for entry in collateral.entries.values()) + 3600
    return {kind: (DATA / f"{kind}_quote").read_bytes() for kind in ("sgx", "tdx")}, collateral, now


ENCLAVE = "33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"
GUEST = (
    "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a"
    "3520c942a604a407de03ae6dc5f87f27428b2538873118b7"
)
WHOLE = {
    "sgx": {
        "evidence": "sgx",
        "mrenclave": [ENCLAVE],
        "tcb": ["ConfigurationAndSWHardeningNeeded"],
        "advisories": ["INTEL-SA-00289", "INTEL-SA-00615"],
    },
    "tdx": {"evidence": "tdx", "mr_td": [GUEST], "firmware_only": True},
}


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_recorded_evidence_is_genuine_and_of_another_request(recorded, kind):
    quotes, collateral, now = recorded
    ready = prepare(ADAPTER.validate_python(WHOLE[kind]))
    with pytest.raises(Refused, match="of another request"):
        verify(quotes[kind], ASKED, ready, collateral, now)
    # What it was made for is known: then all of it is accepted.
    place = 48 + 320 if kind == "sgx" else 48 + 520
    made_for = quotes[kind][place : place + 64]
    said = verify(quotes[kind], made_for, ready, collateral, now).facts
    assert said["tcb"] == WHOLE[kind].get("tcb", ["UpToDate"])[0]
    with pytest.raises(NotReady, match="expired"):
        verify(quotes[kind], made_for, ready, collateral, int(time.time()))
    default = prepare(
        ADAPTER.validate_python(
            {k: v for k, v in WHOLE[kind].items() if k not in ("tcb", "advisories")}
        )
    )
    if kind == "sgx":  # its machine is not up to date
        with pytest.raises(Refused, match="TCB is ConfigurationAndSWHardeningNeeded"):
            verify(quotes[kind], made_for, default, collateral, now)
    else:
        assert verify(quotes[kind], made_for, default, collateral, now)


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_recorded_evidence_that_was_changed_or_cut(recorded, kind):
    """Never accepted and never another error, whatever byte is changed; but for padding."""
    quotes, collateral, now = recorded
    quote = quotes[kind]
    ready = prepare(ADAPTER.validate_python(WHOLE[kind]))
    place = 48 + 320 if kind == "sgx" else 48 + 520
    made_for = quote[place : place + 64]
    end = len(quote.rstrip(b"\0")) - 1

    def is_refused(content: bytes) -> bool:
        try:
            verify(content, made_for, ready, collateral, now)
        except Refused:
            return True
        return False

    assert all(is_refused(quote[:size]) for size in range(0, end, 41))
    # Nobody signs the four bytes that say how long the signature's data is, nor what follows it.
    length = 48 + (384 if kind == "sgx" else 584)
    unsigned = {*range(length, length + 4), *range(length + 4 + 128, len(quote))}

    @given(st.integers(0, len(quote) - 1), st.integers(1, 255))
    @hypothesis_settings(
        max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def one_byte(at, mask) -> None:
        changed = bytearray(quote)
        changed[at] ^= mask
        answer = is_refused(bytes(changed))
        assert answer or at in unsigned

    one_byte()
    assert is_refused(os.urandom(5000))
    assert is_refused(b"")
