"""A PIN is asked for once, and a wrong one sent once, however many threads want it."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest
from keymgmt_tpm2 import Tpm2Provider

from keymgmt.backend import AccessDenied, Dek, SecretSource

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
        monkeypatch.setattr("keymgmt._secret.getpass.getpass", self.type)
        monkeypatch.setattr("keymgmt._secret.sys.stdin", self)

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
        except AccessDenied:
            results.append("denied")
        else:
            results.append("opened")

    threads = [threading.Thread(target=use) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results.count("opened"), results.count("denied")


def test_threads_send_a_wrong_pin_once(settings, wrapped, tmp_path):
    path = tmp_path / "wrong"
    path.write_text("wrong-pin")
    path.chmod(0o600)
    wrong = settings.model_copy(update={"pin": SecretSource(file=path)})
    with Tpm2Provider("tpm", wrong) as provider:
        assert unwrap_in_threads(provider, wrapped, 6) == (0, 6)
        assert "1 of 3" in provider.check().findings[3].detail


def test_a_person_is_asked_once_for_all_threads_and_forks(prompting, wrapped, monkeypatch):
    person = Person(monkeypatch, RIGHT)
    assert unwrap_in_threads(prompting, wrapped, 6) == (6, 0)
    assert person.asked == 1
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(Exception):
            prompting.unwrap(wrapped, CONTEXT).wipe()
            code = 0 if person.asked == 1 else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
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
