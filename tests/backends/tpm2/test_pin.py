"""PINs: a person is asked once, wrong ones and power cuts lock nobody out."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
from forks import in_child
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2._setup import LockoutChange, set_up

from keymgmt.backend import AccessDenied, Dek, LockedOut, SecretSource

CONTEXT = b"a context"
RIGHT = "correct-pin-71"


@pytest.fixture
def wrapped(settings, pin_file):
    """A data key, wrapped for the key "dev", whose PIN is RIGHT."""
    with_pin = settings.model_copy(update={"pin": SecretSource(file=pin_file)})
    with Tpm2Provider("tpm", with_pin) as provider, Dek.generate() as dek:
        provider.create_key("dev", "ecc-p256", {"pin": "yes"})
        return provider.wrap("dev", dek, CONTEXT)


class Person:
    """Who types these answers at a prompt, the last one again and again."""

    def __init__(self, monkeypatch, *answers):
        self.asked, self.answers = 0, answers
        monkeypatch.setattr("keymgmt._providers.secret_source.getpass.getpass", self.type)
        monkeypatch.setattr("keymgmt._providers.secret_source.sys.stdin", self)

    def isatty(self):
        return True

    def type(self, prompt):
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


@pytest.fixture
def prompting(settings):
    with Tpm2Provider(
        "tpm", settings.model_copy(update={"pin": SecretSource(prompt="PIN of the TPM")})
    ) as provider:
        yield provider


def unwrap_in_threads(provider, wrapped, count):
    """How many of them opened, and how many were denied."""
    results, barrier = [], threading.Barrier(count)

    def use():
        barrier.wait()
        try:
            provider.unwrap(wrapped, CONTEXT).wipe()
        except (AccessDenied, LockedOut):
            results.append("denied")
        else:
            results.append("opened")

    threads = [threading.Thread(target=use) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results.count("opened"), results.count("denied")


@pytest.fixture
def mistaken(settings, tmp_path):
    """Settings whose PIN is a wrong one."""
    path = tmp_path / "wrong"
    path.write_text("wrong-pin")
    path.chmod(0o600)
    return settings.model_copy(update={"pin": SecretSource(file=path)})


@pytest.fixture
def right(settings, pin_file):
    """Settings with the right PIN."""
    return settings.model_copy(update={"pin": SecretSource(file=pin_file)})


def lockout(settings):
    with Tpm2Provider("tpm", settings) as provider:
        return provider.service.run("looking", lambda tpm: tpm.lockout())


def opens(settings, wrapped) -> bool:
    with Tpm2Provider("tpm", settings) as provider, provider.unwrap(wrapped, CONTEXT):
        return True


def test_threads_with_a_wrong_pin_leave_the_last_try(mistaken, wrapped, right):
    with Tpm2Provider("tpm", mistaken) as provider:
        assert unwrap_in_threads(provider, wrapped, 6) == (0, 6)
        assert not provider.check().ok
    state = lockout(mistaken)
    assert (state.counted, state.limit, state.locked) == (2, 3, False)
    assert opens(right.model_copy(update={"use_last_try": True}), wrapped)


def _unwrap(settings, wrapped, results) -> None:
    try:
        results.put(opens(settings, wrapped))
    except (AccessDenied, LockedOut) as error:
        results.put(type(error).__name__)


def test_processes_with_a_wrong_pin_leave_the_last_try(mistaken, right, wrapped):
    """Whatever process made the other tries, and at the same moment."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_unwrap, args=(mistaken, wrapped, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert answers == ["AccessDenied", "AccessDenied", "LockedOut", "LockedOut"]
    with pytest.raises(LockedOut, match="2 of 3 tries are counted, and the last one is kept") as c:
        opens(right, wrapped)
    assert "--clear-lockout" in str(c.value.hint)
    assert "use_last_try" in str(c.value.hint)
    assert not lockout(right).locked
    assert opens(right.model_copy(update={"use_last_try": True}), wrapped)


def test_power_cuts_are_not_called_wrong_pins(right, swtpm, wrapped):
    """Three with the right PIN in use: it says so, and whoever owns the TPM has a way out."""
    told = right.model_copy(update={"use_last_try": True})
    for _ in range(2):
        assert opens(told, wrapped)
        swtpm.restart()
    assert lockout(right).counted == 2
    with pytest.raises(LockedOut, match=r"lost power without.* need not have been wrong"):
        opens(right, wrapped)
    assert opens(told, wrapped)
    swtpm.restart()
    with pytest.raises(LockedOut, match=r"is locked: 3 of 3 tries.*lost power"):
        opens(told, wrapped)
    with Tpm2Provider("tpm", right) as provider:
        found = next(f for f in provider.check().findings if f.name == "lockout")
        assert found.status == "failed"
        assert "lost power" in found.detail
        set_up(provider, change=LockoutChange(clear=True))
    assert opens(right, wrapped)


def test_a_person_is_asked_once_for_all_threads_and_forks(prompting, wrapped, monkeypatch):
    person = Person(monkeypatch, RIGHT)
    assert unwrap_in_threads(prompting, wrapped, 6) == (6, 0)
    assert person.asked == 1

    def use():
        prompting.unwrap(wrapped, CONTEXT).wipe()
        assert person.asked == 1

    in_child(use)
    prompting.close()
    prompting.unwrap(wrapped, CONTEXT).wipe()
    assert person.asked == 2, "nothing is kept by a closed provider"


def test_a_person_who_errs_is_asked_again(prompting, wrapped, monkeypatch):
    person = Person(monkeypatch, "wrong-pin", RIGHT)
    with pytest.raises(AccessDenied, match="1 of 3"):
        prompting.unwrap(wrapped, CONTEXT)
    prompting.unwrap(wrapped, CONTEXT).wipe()
    prompting.unwrap(wrapped, CONTEXT).wipe()
    assert person.asked == 2
