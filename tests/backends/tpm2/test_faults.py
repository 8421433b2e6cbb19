"""Bad days of a TPM: absent, cleared, swapped, full, killed, hung, tampered with."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from bits import flipped
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._connection.tpm import Tpm
from keymgmt_tpm2._setup import set_up as make_root_key
from programs import run_python

from keymgmt.backend import (
    ConfigError,
    Dek,
    KeyNotFound,
    ProviderUnavailable,
    WrongKey,
)

CONTEXT = b"a context"


@pytest.fixture
def dek():
    with Dek.generate() as dek:
        yield dek


@pytest.fixture
def wrapped(provider, dek):
    provider.create_key("dev", "ecc-p256", {})
    return provider.wrap("dev", dek, CONTEXT)


def changed(provider, **updates) -> Tpm2Provider:
    return Tpm2Provider("tpm", provider.settings.model_copy(update=updates))


def slots(provider) -> tuple[list[int], list[int]]:
    """Loaded objects and sessions; the session's own query loads nothing."""
    return provider.service.run(
        "looking", lambda tpm: (tpm.handles(0x80000000), tpm.handles(0x02000000)), pinned=False
    )


def objects_in_the_end(provider) -> list[int]:
    """Loaded objects, once the operation that was left behind has freed its own."""
    end = time.monotonic() + 20
    while (objects := slots(provider)[0]) and time.monotonic() < end:
        time.sleep(0.05)
    return objects


def edit(provider, key, change) -> None:
    path = provider.keys.path / f"{key}.json"
    data = json.loads(path.read_bytes())
    change(data["versions"][-1])
    path.write_text(json.dumps(data))


def flip(text: str, position: int) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[position] ^= 1
    return base64.b64encode(raw).decode()


def test_no_tpm(provider, wrapped):
    with changed(provider, tcti="device:/dev/no-such-tpm") as none:
        with pytest.raises(ProviderUnavailable, match="/dev/no-such-tpm does not exist") as caught:
            none.unwrap(wrapped, CONTEXT)
        assert "firmware" in str(caught.value.hint)
        assert not none.check().ok
    with changed(provider, tcti="swtpm:host=127.0.0.1,port=1") as none:
        with pytest.raises(ProviderUnavailable, match=r"not reached.*port=1"):
            none.unwrap(wrapped, CONTEXT)
        (failed,) = [finding for finding in none.check().findings if finding.status == "failed"]
        assert "port=1" in failed.detail
        assert "correct tcti" in str(failed.hint)
        # Sealing to it takes no TPM.
        assert none.wrap("dev", Dek.generate(), CONTEXT)


def test_what_is_no_tpm_device(provider, wrapped, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        changed(provider, tcti=f"device:{tmp_path}/file") as none,
        pytest.raises(ProviderUnavailable, match="is not a device"),
    ):
        none.unwrap(wrapped, CONTEXT)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving up permissions takes root")
def test_no_permission():
    """A device that only root may use stands for a TPM that belongs to others."""
    names = ("mem", "console", "kmsg", "port", "tty0", "net/tun", "vcs", "loop-control")
    device = next((f"/dev/{name}" for name in names if only_roots(f"/dev/{name}")), None)
    if device is None:
        pytest.skip("no device here that only root may use")
    program = (
        "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from keymgmt_tpm2._connection.tcti import look_for_device\n"
        "from keymgmt.backend import AccessDenied\n"
        f"try: look_for_device('device:{device}')\n"
        "except AccessDenied as error: print(error, '|', error.hint)\n"
    )
    # Imports first: the interpreter may lie where nobody else may look.
    lines = program.splitlines()
    program = "\n".join([*lines[1:3], lines[0], *lines[3:]])
    result = run_python(program)
    assert f"no permission to use {device}" in result.stdout, result.stderr
    assert "tss" in result.stdout


def only_roots(path: str) -> bool:
    try:
        info = Path(path).stat()
    except OSError:
        return False
    return stat.S_ISCHR(info.st_mode) and not info.st_mode & 0o006


def test_no_root_key(swtpm, tmp_path):
    settings = Tpm2Settings(keys=tmp_path / "k", tcti=swtpm.tcti, srk_name="000b" + "00" * 32)
    with Tpm2Provider("tpm", settings) as provider:
        with pytest.raises(KeyNotFound, match="no storage root key at 0x81000001") as caught:
            provider.create_key("dev", "ecc-p256", {})
        assert "keymgmt tpm setup" in str(caught.value.hint)
        with pytest.raises(KeyNotFound, match="no storage root key"):
            make_root_key(provider)
        root = next(f for f in provider.check().findings if f.name == "storage root key")
        assert (root.status, root.detail) == (
            "failed",
            "the TPM has no storage root key at 0x81000001",
        )


def test_a_root_key_that_is_not_pinned(provider, wrapped):
    with changed(provider, srk_name=None) as unpinned:
        with pytest.raises(ConfigError, match="no srk_name"):
            unpinned.unwrap(wrapped, CONTEXT)
        root = next(f for f in unpinned.check().findings if f.name == "storage root key")
        assert f'srk_name = "{provider.settings.srk_name}"' in str(root.hint)


def test_another_tpm(provider, wrapped, make_swtpm, set_up):
    """Another TPM is known by its root key; with that one pinned, by the key that it refuses."""
    other = make_swtpm("other")
    theirs = set_up(other)
    with (
        changed(provider, tcti=other.tcti) as moved,
        pytest.raises(ProviderUnavailable, match="the config pins") as caught,
    ):
        moved.unwrap(wrapped, CONTEXT)
    assert "another TPM" in str(caught.value.hint)
    with (
        changed(provider, tcti=other.tcti, srk_name=theirs.srk_name) as moved,
        pytest.raises(KeyNotFound, match="another or a cleared TPM"),
    ):
        moved.unwrap(wrapped, CONTEXT)


def test_a_cleared_tpm(provider, wrapped):
    from tpm2_pytss import constants as c

    provider.service.run("clearing", lambda tpm: tpm.call("clear", c.ESYS_TR.LOCKOUT))
    with pytest.raises(KeyNotFound, match="no storage root key"):
        provider.unwrap(wrapped, CONTEXT)
    name = make_root_key(provider, create=True).name
    assert name != provider.settings.srk_name
    with pytest.raises(ProviderUnavailable, match="the config pins") as caught:
        provider.unwrap(wrapped, CONTEXT)
    assert "cleared" in str(caught.value.hint)
    with changed(provider, srk_name=name) as again, pytest.raises(KeyNotFound, match="cleared TPM"):
        again.unwrap(wrapped, CONTEXT)


def test_a_tampered_private_part(provider, wrapped):
    edit(provider, "dev", lambda v: v.update(private=flip(v["private"], 40)))
    with pytest.raises(KeyNotFound, match="damaged"):
        provider.unwrap(wrapped, CONTEXT)
    edit(provider, "dev", lambda v: v.update(private=base64.b64encode(b"short").decode()))
    with pytest.raises(Exception, match="tpm:dev@1"):
        provider.unwrap(wrapped, CONTEXT)


def test_a_tampered_public_part(provider, wrapped):
    # Attributes, curve or algorithm: refused when the file is read.
    for position in (0, 4, 6, 10, 12):
        edit(provider, "dev", lambda v, p=position: v.update(public=flip(v["public"], p)))
        with pytest.raises(ProviderUnavailable, match="is refused"):
            provider.unwrap(wrapped, CONTEXT)
        edit(provider, "dev", lambda v, p=position: v.update(public=flip(v["public"], p)))
    # Another point of the curve: the TPM refuses it.
    provider.create_key("other", "ecc-p256", {})
    public = json.loads((provider.keys.path / "other.json").read_bytes())["versions"][0]["public"]
    edit(provider, "dev", lambda v: v.update(public=public))
    mixed = provider.wrap("dev", Dek.generate(), CONTEXT)
    with pytest.raises(KeyNotFound, match="damaged"):
        provider.unwrap(mixed, CONTEXT)
    # And what was wrapped before is known to be another key's without asking it.
    with pytest.raises(WrongKey, match="another key of that name"):
        provider.unwrap(wrapped, CONTEXT)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"{", b'{"format":"keymgmt.tpm2-key/1"}', b"[" * 100000]
)
def test_a_key_file_that_is_none(provider, wrapped, content):
    (provider.keys.path / "dev.json").write_bytes(content)
    with pytest.raises(ProviderUnavailable, match=r"dev\.json"):
        provider.unwrap(wrapped, CONTEXT)


def test_a_key_directory_that_others_use(provider, wrapped):
    provider.keys.path.chmod(0o755)
    with pytest.raises(ProviderUnavailable, match="others can use it") as caught:
        provider.unwrap(wrapped, CONTEXT)
    assert caught.value.hint == f"chmod go= {provider.keys.path}"


def fill(tpm: Tpm, public, private) -> int:
    """Take every object slot that is free, as a crashed program does."""
    parent, code, count = tpm.srk(), 0, 0
    from keymgmt_tpm2._errors import TpmError
    from keymgmt_tpm2._structures import sized
    from tpm2_pytss import types as t

    while not code:
        blob = t.TPM2B_PUBLIC.unmarshal(sized(public.raw))[0]
        try:
            tpm.call("load", parent, t.TPM2B_PRIVATE.unmarshal(sized(private))[0], blob)
            count += 1
        except TpmError as error:
            code = error.code
    assert code == 0x902
    return count


def test_slots_that_somebody_else_holds(provider, wrapped, tmp_path, dek):
    foreign = Tpm2Provider("f", provider.settings.model_copy(update={"keys": tmp_path / "other"}))
    foreign.create_key("theirs", "ecc-p256", {})
    version = foreign.keys.read("theirs").newest
    assert foreign.service.run("fill", lambda tpm: fill(tpm, version.public, version.private)) >= 2
    with changed(provider, timeout=1.0) as hasty:
        start = time.monotonic()
        # Making a key may take longer than other calls, and is told of it as soon.
        for call in (
            lambda: hasty.unwrap(wrapped, CONTEXT),
            lambda: hasty.create_key("new", "ecc-p256", {}),
        ):
            with pytest.raises(ProviderUnavailable, match="all its object slots are") as caught:
                call()
            assert "keymgmt tpm flush" in str(caught.value.hint)
        assert time.monotonic() - start < 30
        full = next(f for f in hasty.check().findings if f.name == "slots")
        assert full.status == "warning"
    # The other program ends while ours waits for a slot.
    threading.Timer(
        0.3, lambda: foreign.service.run("free", lambda tpm: tpm.free_all(), pinned=False)
    ).start()
    with changed(provider, timeout=20.0) as patient, patient.unwrap(wrapped, CONTEXT) as again:
        assert again == dek


def _die_in_the_middle(settings, wrapped) -> None:
    """Killed with a key and a session in the TPM."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    Tpm.ecdh = die
    with Tpm2Provider("tpm", settings) as provider:
        provider.unwrap(wrapped, CONTEXT)


def test_what_our_own_killed_processes_left_is_freed(provider, wrapped, dek):
    """At once, objects and sessions, and nothing of anybody else's."""
    theirs = provider.service.run("foreign", foreign_session, pinned=False)
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        process = context.Process(target=_die_in_the_middle, args=(provider.settings, wrapped))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert len(slots(provider)[1]) <= 2
    with provider.unwrap(wrapped, CONTEXT) as again:
        assert again == dek
    assert slots(provider) == ([], [theirs])
    assert [path.name for path in provider.keys.path.glob(".loaded*")] == []


def test_what_they_left_is_freed_after_a_connection_that_broke(provider, wrapped, wire, dek):
    """The first try to free it never reached the TPM."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die_in_the_middle, args=(provider.settings, wrapped))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cut = []

    def intercept(command: bytes) -> None:
        if command[6:10] == bytes.fromhex("00000165") and not cut:  # TPM2_FlushContext
            cut.append(command)
            raise EOFError

    wire.intercept = intercept
    with changed(provider, tcti=wire.tcti) as tapped, tapped.unwrap(wrapped, CONTEXT) as again:
        assert again == dek
    assert cut
    assert slots(provider) == ([], [])


def start_session(tpm):
    """A session as another program starts it."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    return tpm.call(
        "start_auth_session",
        tpm_key=c.ESYS_TR.NONE,
        bind=c.ESYS_TR.NONE,
        session_type=c.TPM2_SE.HMAC,
        symmetric=t.TPMT_SYM_DEF(algorithm=c.TPM2_ALG.NULL),
        auth_hash=c.TPM2_ALG.SHA256,
    )


def until_refused(call) -> int:
    """Call until the TPM refuses; its code."""
    from keymgmt_tpm2._errors import TpmError

    while True:
        try:
            call()
        except TpmError as error:
            return error.code


def foreign_session(tpm) -> int:
    before = tpm.handles(0x02000000)
    start_session(tpm)
    return next(each for each in tpm.handles(0x02000000) if each not in before)


def test_flush_frees_the_sessions_that_others_saved(provider, wrapped):
    def save(tpm):
        return until_refused(lambda: tpm.call("context_save", start_session(tpm)))

    assert provider.service.run("saving", save, pinned=False) == 0x905
    with (
        changed(provider, timeout=1.0) as hasty,
        pytest.raises(ProviderUnavailable, match="by sessions that programs saved") as caught,
    ):
        hasty.unwrap(wrapped, CONTEXT)
    assert "keymgmt tpm flush" in str(caught.value.hint)
    assert provider.service.run("free", lambda tpm: tpm.free_all(), pinned=False) == 64
    provider.unwrap(wrapped, CONTEXT).wipe()


def test_waiting_in_line_is_not_a_calls_own_time(provider, wrapped, wire):
    """Many threads, each slow, none slower than the limit: everybody gets his turn."""
    wire.intercept = lambda command: time.sleep(0.05)  # a quarter of a second for an unwrap
    failures = []

    def use(patient):
        try:
            patient.unwrap(wrapped, CONTEXT).wipe()
        except ProviderUnavailable as error:
            failures.append(str(error))

    with changed(provider, tcti=wire.tcti, timeout=4.0) as patient:
        threads = [threading.Thread(target=use, args=(patient,)) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_session_slots_that_somebody_else_holds(provider, wrapped):
    def take(tpm):
        assert until_refused(lambda: start_session(tpm)) in (0x903, 0x905)

    provider.service.run("fill", take)
    with (
        changed(provider, timeout=1.0) as hasty,
        pytest.raises(ProviderUnavailable, match="all its session slots are taken"),
    ):
        hasty.unwrap(wrapped, CONTEXT)
    assert provider.service.run("free", lambda tpm: tpm.free_all(), pinned=False) == 3
    provider.unwrap(wrapped, CONTEXT).wipe()


def begin_with(event, at, monkeypatch) -> None:
    """Have something happen as a step of a call begins for the first time."""
    step, begun = getattr(Tpm, at), []

    def begin(tpm, *args, **options):
        if not begun:
            begun.append(event())
        return step(tpm, *args, **options)

    monkeypatch.setattr(Tpm, at, begin)


@pytest.mark.parametrize("at", ["load", "session", "ecdh"])
def test_a_tpm_killed_in_the_middle(provider, wrapped, swtpm, dek, monkeypatch, at):
    begin_with(swtpm.kill, at, monkeypatch)
    with pytest.raises(ProviderUnavailable, match="not reached"):
        provider.unwrap(wrapped, CONTEXT)
    swtpm.start()
    with provider.unwrap(wrapped, CONTEXT) as again:
        assert again == dek


@pytest.mark.parametrize("at", ["load", "session", "ecdh"])
def test_a_tpm_restarted_in_the_middle(provider, wrapped, swtpm, dek, monkeypatch, at):
    begin_with(swtpm.restart, at, monkeypatch)
    with provider.unwrap(wrapped, CONTEXT) as again:
        assert again == dek
    assert slots(provider) == ([], [])


@pytest.mark.parametrize("at", ["load", "session", "ecdh"])
def test_a_tpm_stopped_in_the_middle(provider, wrapped, swtpm, dek, monkeypatch, at):
    """The call comes back, and what the TPM still did for it is freed later."""
    with changed(provider, timeout=1.0) as hasty:
        begin_with(swtpm.hang, at, monkeypatch)
        start = time.monotonic()
        with pytest.raises(ProviderUnavailable, match="gave no answer within"):
            hasty.unwrap(wrapped, CONTEXT)
        assert time.monotonic() - start < 20
        monkeypatch.undo()
        swtpm.resume()
        patient = hasty.settings.model_copy(update={"timeout": 20.0})
        hasty.service.settings = patient
        for _ in range(6):
            with hasty.unwrap(wrapped, CONTEXT) as again:
                assert again == dek
        assert objects_in_the_end(hasty) == []


def test_an_interrupt_ends_a_call_that_hangs(provider, wrapped, swtpm, dek, capfd):
    """Ctrl-C comes through libtss2 as what it is, and nothing is read from a broken answer."""
    swtpm.hang()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        provider.unwrap(wrapped, CONTEXT)
    assert time.monotonic() - start < 4
    swtpm.resume()
    with provider.unwrap(wrapped, CONTEXT) as again:
        assert again == dek
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("at", ["load", "session", "ecdh"])
def test_an_interrupt_in_the_middle(provider, wrapped, swtpm, dek, monkeypatch, at):
    def hang():
        swtpm.hang()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    begin_with(hang, at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        provider.unwrap(wrapped, CONTEXT)
    swtpm.resume()
    for _ in range(4):
        with provider.unwrap(wrapped, CONTEXT) as again:
            assert again == dek
    assert objects_in_the_end(provider) == []


def _unwrap_many(settings, wrapped, count, results) -> None:
    try:
        with Tpm2Provider("tpm", settings) as provider:
            for _ in range(count):
                provider.unwrap(wrapped, CONTEXT).wipe()
        results.put("right")
    except Exception as error:  # noqa: BLE001 - reported by the test
        results.put(repr(error))


def test_two_processes_at_once(provider, wrapped):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    settings = provider.settings.model_copy(update={"timeout": 60.0})
    processes = [
        context.Process(target=_unwrap_many, args=(settings, wrapped, 25, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert answers == ["right", "right"]
    assert slots(provider) == ([], [])


@pytest.mark.once
def test_a_thousand_unwraps_leave_nothing(provider, wrapped):
    """Objects and sessions in the TPM, threads and file descriptors here."""
    provider.unwrap(wrapped, CONTEXT).wipe()

    def state():
        return (
            slots(provider),
            threading.active_count(),
            len(list(Path("/proc/self/fd").iterdir())),
        )

    before = state()
    for _ in range(1000):
        provider.unwrap(wrapped, CONTEXT).wipe()
    assert state() == before
    assert before[0] == ([], [])


def test_failures_leave_nothing_either(provider, wrapped, dek):
    from dataclasses import replace

    provider.create_key("bound", "ecc-p256", {"pcr": "16"})
    provider.create_key("rsa", "rsa-2048", {})
    rsa = provider.wrap("rsa", dek, CONTEXT)
    for _ in range(20):
        for bad in (replace(wrapped, blob=flipped(wrapped.blob)), wrapped, rsa):
            with pytest.raises(Exception, match="authenticate"):
                provider.unwrap(bad, b"another context")
    edit(provider, "dev", lambda v: v.update(private=flip(v["private"], 40)))
    for _ in range(20):
        with pytest.raises(KeyNotFound):
            provider.unwrap(wrapped, CONTEXT)
    assert slots(provider) == ([], [])


def test_the_settings_say_what_is_wrong(tmp_path):
    from pydantic import ValidationError

    for values in (
        {"tcti": "libtss2-tcti-evil.so"},
        {"tcti": "/tmp/evil.so:x"},
        {"tcti": "device"},
        {"tcti": "device:tpmrm0"},
        {"srk": "0x40000001"},
        {"srk_name": "abc"},
        {"timeout": 0},
        {"pin": "1234"},
        {"pins": {"../x": {"env": "A"}}},
        {"keyz": "x"},
    ):
        with pytest.raises(ValidationError):
            Tpm2Settings.model_validate({"keys": str(tmp_path)} | values)
