"""Key files locked with a passphrase: what opens them, what does not, and what stays on disk."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from keymgmt_file import FileProvider, FileSettings

from keymgmt.backend import AccessDenied, ConfigError, Dek, ProviderError, SecretSource

Open = Callable[..., FileProvider]


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def states(files: FileProvider) -> set[bool]:
    return set(files.locked_keys().values())


def fill(files: FileProvider) -> list[str]:
    for kind in ("aes256", "ed25519", "hpke-x25519"):
        files.create_key(f"key-{kind}", kind, {})
    return [info.key for info in files.list_keys()]


def test_lock_and_unlock(open_store: Open, path: Path) -> None:
    plain = open_store()
    names = fill(plain)
    before = {name: (path / f"{name}.jwks").read_bytes() for name in names}
    with Dek.generate() as dek:
        wrapped = plain.wrap("key-aes256", dek, b"")
        locked = open_store("correct horse")
        assert locked.unwrap(wrapped, b"") == dek
        assert locked.lock() == 3
        assert states(locked) == {True}
        assert locked.lock() == 0
        on_disk = b"".join(each.read_bytes() for each in path.iterdir())
        for content in before.values():
            (jwk,) = json.loads(content)["keys"]
            assert not [v for n, v in jwk.items() if n in ("k", "d", "x") and v.encode() in on_disk]
        assert all((path / f"{name}.jwks").stat().st_mode & 0o777 == 0o600 for name in names)

        assert locked.unwrap(wrapped, b"") == dek
        assert open_store("correct horse").unwrap(wrapped, b"") == dek
        for other in (open_store("wrong horse"), open_store()):
            for call in (
                lambda p=other: p.unwrap(wrapped, b""),
                lambda p=other: p.wrap("key-aes256", dek, b""),
                lambda p=other: p.sign("key-ed25519", b""),
                lambda p=other: p.rotate_key("key-aes256"),
                lambda p=other: p.create_key("new", "aes256", {}),
                other.list_keys,
                other.unlock,
            ):
                with pytest.raises(AccessDenied):
                    call()
            assert not other.check().ok
        assert locked.list_keys() == open_store("correct horse").list_keys()
        assert len(locked.list_keys()) == 3

        assert locked.unlock() == 3
        assert {n: (path / f"{n}.jwks").read_bytes() for n in names} == before
        assert plain.unwrap(wrapped, b"") == dek


def test_a_locked_file_is_what_the_manual_says(open_store: Open, path: Path) -> None:
    files = open_store("correct horse")
    files.create_key("release", "aes256", {})
    data = json.loads((path / "release.jwks").read_text())
    kdf = data["kdf"]
    # RFC 9106, section 4, second choice; OWASP asks for 19456 KiB and 2 passes at least.
    assert (kdf["name"], kdf["memory_kib"], kdf["passes"], kdf["lanes"]) == (
        *("argon2id", 65536, 3, 4),
    )
    key = Argon2id(
        salt=decode(kdf["salt"]), length=32, iterations=3, lanes=4, memory_cost=65536
    ).derive(b"correct horse")
    bound = json.dumps(["keymgmt-file-locked/1", "release", kdf], sort_keys=True).encode()
    content = AESGCM(key).decrypt(decode(data["nonce"]), decode(data["ciphertext"]), bound)
    assert json.loads(content)["keys"][0]["kid"] == "1"


def test_what_is_made_in_a_locked_store_is_locked(open_store: Open, path: Path) -> None:
    files = open_store("correct horse")
    fill(files)
    files.create_key("new", "aes256", {})
    files.rotate_key("key-aes256")
    files.rotate_key("key-aes256")
    files.retire_version("key-aes256", "1")
    assert states(files) == {True}
    salts = {json.loads(each.read_text())["kdf"]["salt"] for each in path.glob("*.jwks")}
    assert len(salts) == 1, "one derivation opens them all"


def test_a_passphrase_that_is_new_in_the_config_locks_nothing_by_reading(open_store: Open) -> None:
    fill(open_store())
    files = open_store("correct horse")
    files.list_keys()
    assert states(files) == {False}
    (finding, *_) = files.check().findings
    assert finding.status == "warning"
    assert "keymgmt file lock local" in str(finding.hint)


def test_a_store_that_is_partly_locked_reads_and_heals(open_store: Open, path: Path) -> None:
    files = open_store("correct horse")
    names = fill(files)
    plain = (path / "key-aes256.jwks").read_bytes()
    files.unlock()
    mixed = (path / "key-ed25519.jwks").read_bytes()
    (path / "key-aes256.jwks").write_bytes(plain)
    assert [info.key for info in files.list_keys()] == names
    with pytest.raises(AccessDenied):
        open_store("another passphrase").lock()
    assert (path / "key-ed25519.jwks").read_bytes() == mixed
    assert files.lock() == 2
    assert states(files) == {True}


def test_change_the_passphrase(open_store: Open) -> None:
    old, new = open_store("correct horse"), open_store("battery staple")
    names = fill(old)
    with Dek.generate() as dek:
        wrapped = old.wrap("key-aes256", dek, b"")
        with pytest.raises(AccessDenied):
            new.lock(lambda: bytearray(b"third"))
        assert old.lock(lambda: bytearray(b"battery staple")) == 3
        assert new.unwrap(wrapped, b"") == dek
        assert [info.key for info in new.list_keys()] == names
        with pytest.raises(AccessDenied):
            old.unwrap(wrapped, b"")
        with pytest.raises(AccessDenied):
            open_store("correct horse").unwrap(wrapped, b"")


def test_locking_takes_a_passphrase_from_the_config(open_store: Open) -> None:
    files = open_store()
    fill(files)
    with pytest.raises(ConfigError) as caught:
        files.lock()
    assert "passphrase = {" in str(caught.value.hint)
    assert states(files) == {False}


@pytest.mark.parametrize(
    "change",
    [
        {"memory_kib": (1 << 20) + 1},
        {"memory_kib": 1 << 60},
        {"memory_kib": 31},
        {"memory_kib": 65536.0},
        {"memory_kib": True},
        {"passes": 11},
        {"passes": 0},
        {"passes": -1},
        {"lanes": 5},
        {"lanes": 0},
        {"name": "argon2i"},
        {"salt": "AAAA"},
        {"salt": "A" * 1000},
        {"salt": 7},
        {"more": 1},
        {"memory_kib": None},
    ],
)
def test_parameters_are_bounded_before_they_are_used(
    open_store: Open, path: Path, change: dict
) -> None:
    files = open_store("correct horse")
    files.create_key("release", "aes256", {})
    data = json.loads((path / "release.jwks").read_text())
    data["kdf"].update(change)
    (path / "release.jwks").write_text(json.dumps(data))
    again = open_store("correct horse")
    with pytest.raises(ProviderError, match="damaged, of another format, or asks for more"):
        again.describe_key("release")


@pytest.mark.parametrize(
    "change",
    [{"nonce": "AAAA"}, {"ciphertext": "AAAA"}, {"format": "x"}, {"kdf": []}, {"ciphertext": 1}],
)
def test_a_damaged_envelope(open_store: Open, path: Path, change: dict) -> None:
    files = open_store("correct horse")
    files.create_key("release", "aes256", {})
    data = json.loads((path / "release.jwks").read_text())
    (path / "release.jwks").write_text(json.dumps({**data, **change}))
    with pytest.raises(ProviderError, match="damaged"):
        files.describe_key("release")


def test_weaker_parameters_and_other_names_do_not_open(open_store: Open, path: Path) -> None:
    files = open_store("correct horse")
    files.create_key("release", "aes256", {})
    files.create_key("another", "aes256", {})
    content = (path / "release.jwks").read_text()
    (path / "another.jwks").write_text(content)
    with pytest.raises(AccessDenied, match="'another' does not open"):
        files.describe_key("another")
    data = json.loads(content)
    data["kdf"]["passes"] = 1
    (path / "release.jwks").write_text(json.dumps(data))
    with pytest.raises(AccessDenied):
        files.describe_key("release")


class Counter:
    """A passphrase that counts how often it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> None:
        self.asked = 0
        self.answers = answers
        monkeypatch.setattr(SecretSource, "read", lambda _: self.read())

    def read(self) -> bytearray:
        self.asked += 1
        return bytearray(self.answers[min(self.asked, len(self.answers)) - 1])


def prompting(path: Path) -> FileProvider:
    return FileProvider("local", FileSettings(path=path, passphrase=SecretSource(prompt="?")))


def test_asked_once_for_all_keys_threads_and_forks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch, b"correct horse")
    with prompting(path) as files:
        fill(files)
    counter.asked = 0
    with prompting(path) as files, Dek.generate() as dek:
        assert counter.asked == 0, "a provider asks for nothing before it must"
        found: list[bool] = []
        barrier = threading.Barrier(8)

        def use() -> None:
            barrier.wait()
            wrapped = files.wrap("key-aes256", dek, b"")
            found.append(files.unwrap(wrapped, b"") == dek)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 8
        files.list_keys()
        assert counter.asked == 1

        wrapped = files.wrap("key-aes256", dek, b"")
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if files.unwrap(wrapped, b"") == dek and counter.asked == 1 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

        files.close()
        files.list_keys()
        assert counter.asked == 2, "close wiped what was derived"


def test_a_mistyped_passphrase_is_asked_again_and_not_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch, b"correct horse")
    with prompting(path) as files:
        fill(files)
    counter.asked, counter.answers = 0, (b"corect horse", b"correct horse")
    now = time.monotonic()
    monkeypatch.setattr("keymgmt_file._passphrase.time.monotonic", lambda: now)
    with prompting(path) as files:
        for _ in range(100):
            with pytest.raises(AccessDenied):
                files.describe_key("key-aes256")
        assert counter.asked == 1, "one open tries many recipients"
        now += 4
        assert files.describe_key("key-aes256").newest == "1"
        assert counter.asked == 2


def test_a_damaged_file_does_not_make_the_others_ask_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch, b"correct horse")
    with prompting(path) as files:
        fill(files)
    (path / "damaged.jwks").touch(mode=0o600)
    (path / "damaged.jwks").write_bytes((path / "key-aes256.jwks").read_bytes())
    counter.asked = 0
    now = time.monotonic()
    monkeypatch.setattr("keymgmt_file._passphrase.time.monotonic", lambda: now)
    with prompting(path) as files:
        for name in ("damaged", "key-aes256", "damaged", "key-aes256"):
            if name == "damaged":
                with pytest.raises(AccessDenied):
                    files.describe_key(name)
            else:
                files.describe_key(name)
            now += 2
        now += 4
        files.describe_key("key-aes256")
        assert counter.asked == 1


def test_a_locked_store_is_refused_open_to_others(open_store: Open, path: Path) -> None:
    files = open_store("correct horse")
    files.create_key("release", "aes256", {})
    (path / "release.jwks").chmod(0o644)
    with pytest.raises(ConfigError, match="refused"):
        files.describe_key("release")


def test_the_passphrase_stands_in_no_file(open_store: Open, path: Path) -> None:
    files = open_store("correct horse battery staple")
    fill(files)
    content = b"".join(each.read_bytes() for each in path.iterdir())
    assert b"correct horse" not in content
