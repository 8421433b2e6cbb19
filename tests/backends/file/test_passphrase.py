"""A key directory locked with a passphrase: what opens it, what does not, what stays on disk."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from forks import in_child
from keymgmt_file import FileProvider, FileSettings
from keymgmt_file._passphrase import Passphrase

from keymgmt.backend import AccessDenied, ConfigError, Dek, ProviderError, SecretSource

Open = Callable[..., FileProvider]


def states(files: FileProvider) -> set[bool]:
    return set(files.key_files.locked_keys().values())


def fill(files: FileProvider) -> list[str]:
    for kind in ("aes256", "ed25519", "hpke-x25519"):
        files.create_key(f"key-{kind}", kind, {})
    return [info.key for info in files.list_keys()]


def change(files: FileProvider, to: FileProvider) -> None:
    """Give a directory the passphrase that another provider of it is configured with."""
    files.key_files.change_passphrase(Passphrase(to.settings.passphrase, "local"))


@pytest.mark.usefixtures("cheap")
def test_lock_and_unlock(open_store, path):
    plain = open_store()
    names = fill(plain)
    before = {name: (path / f"{name}.jwks").read_bytes() for name in names}
    with Dek.generate() as dek:
        wrapped = plain.wrap("key-aes256", dek, b"")
        locked = open_store("correct horse battery")
        assert locked.unwrap(wrapped, b"") == dek
        assert locked.key_files.lock() == 3
        assert states(locked) == {True}
        assert locked.key_files.lock() == 0
        on_disk = b"".join(each.read_bytes() for each in path.iterdir())
        for content in before.values():
            (jwk,) = json.loads(content)["keys"]
            assert not [v for n, v in jwk.items() if n in ("k", "d", "x") and v.encode() in on_disk]
        assert all(each.stat().st_mode & 0o777 == 0o600 for each in path.iterdir())

        assert locked.unwrap(wrapped, b"") == dek
        assert open_store("correct horse battery").unwrap(wrapped, b"") == dek
        for other in (open_store("wrong horse"), open_store()):
            for call in (
                lambda p=other: p.unwrap(wrapped, b""),
                lambda p=other: p.wrap("key-aes256", dek, b""),
                lambda p=other: p.sign("key-ed25519", b""),
                lambda p=other: p.rotate_key("key-aes256"),
                lambda p=other: p.create_key("new", "aes256", {}),
                other.list_keys,
                other.key_files.unlock,
            ):
                with pytest.raises(AccessDenied):
                    call()
            assert not other.check().ok
        assert locked.list_keys() == open_store("correct horse battery").list_keys()
        assert len(locked.list_keys()) == 3

        assert locked.key_files.unlock() == 3
        assert {n: (path / f"{n}.jwks").read_bytes() for n in names} == before
        assert not (path / "passphrase.json").exists()
        assert plain.unwrap(wrapped, b"") == dek


def test_a_locked_directory_is_what_the_manual_says(open_store, path):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    data = json.loads((path / "passphrase.json").read_text())
    kdf = data["kdf"]
    # RFC 9106, section 4, second choice; OWASP asks for 19456 KiB and 2 passes at least.
    assert (kdf["name"], kdf["memory_kib"], kdf["passes"], kdf["lanes"]) == (
        *("argon2id", 65536, 3, 4),
    )
    derived = Argon2id(
        salt=base64.b64decode(kdf["salt"]), length=32, iterations=3, lanes=4, memory_cost=65536
    ).derive(b"correct horse battery")
    sealed = base64.b64decode(data["sealed"])
    kek = AESGCM(derived).decrypt(
        sealed[:12], sealed[12:], b"keymgmt-file-locked/1 passphrase.json"
    )
    assert len(kek) == 32
    data = json.loads((path / "release.jwks").read_text())
    assert set(data) == {"format", "sealed"}
    sealed = base64.b64decode(data["sealed"])
    content = AESGCM(kek).decrypt(sealed[:12], sealed[12:], b"keymgmt-file-locked/1 release.jwks")
    assert json.loads(content)["keys"][0]["kid"] == "1"


@pytest.mark.usefixtures("cheap")
def test_what_is_made_in_a_locked_directory_is_locked(open_store, path):
    files = open_store("correct horse battery")
    fill(files)
    once = (path / "passphrase.json").read_bytes()
    files.create_key("new", "aes256", {})
    files.rotate_key("key-aes256")
    files.rotate_key("key-aes256")
    files.retire_version("key-aes256", "1")
    assert states(files) == {True}
    assert (path / "passphrase.json").read_bytes() == once, "one derivation opens them all"
    sealed = {json.loads(each.read_text())["sealed"][:16] for each in path.glob("*.jwks")}
    assert len(sealed) == 4, "each has a nonce of its own"


def test_a_passphrase_that_is_new_in_the_config_locks_nothing_by_reading(open_store, path):
    fill(open_store())
    files = open_store("correct horse battery")
    files.list_keys()
    assert states(files) == {False}
    assert not (path / "passphrase.json").exists()
    (finding, *_) = files.check().findings
    assert finding.status == "warning"
    assert "keymgmt file lock local" in str(finding.hint)


@pytest.mark.usefixtures("cheap")
def test_a_directory_that_is_partly_locked_reads_and_heals(open_store, path):
    files = open_store("correct horse battery")
    names = fill(files)
    held = (path / "passphrase.json").read_bytes()
    locked = (path / "key-aes256.jwks").read_bytes()
    files.key_files.unlock()
    # As a run of `unlock` leaves it that was killed.
    plain = (path / "key-ed25519.jwks").read_bytes()
    (path / "key-aes256.jwks").write_bytes(locked)
    (path / "passphrase.json").touch(mode=0o600)
    (path / "passphrase.json").write_bytes(held)
    assert [info.key for info in files.list_keys()] == names
    assert files.check().findings[0].status == "warning"
    with pytest.raises(AccessDenied):
        open_store("another passphrase").key_files.lock()
    assert (path / "key-ed25519.jwks").read_bytes() == plain
    assert files.key_files.lock() == 2
    assert states(files) == {True}


@pytest.mark.usefixtures("cheap")
def test_change_the_passphrase(open_store, path):
    old, new = open_store("correct horse battery"), open_store("another battery staple")
    names = fill(old)
    with Dek.generate() as dek:
        wrapped = old.wrap("key-aes256", dek, b"")
        with pytest.raises(AccessDenied):
            change(new, to=open_store("third"))
        before = {each: (path / f"{each}.jwks").read_bytes() for each in names}
        change(old, to=new)
        assert {each: (path / f"{each}.jwks").read_bytes() for each in names} == before
        assert new.unwrap(wrapped, b"") == dek
        assert [info.key for info in new.list_keys()] == names
        with pytest.raises(AccessDenied):
            old.unwrap(wrapped, b"")
        with pytest.raises(AccessDenied):
            open_store("correct horse battery").unwrap(wrapped, b"")
        new.key_files.unlock()
        with pytest.raises(ConfigError, match="not locked") as caught:
            change(new, to=old)
        assert caught.value.hint == "keymgmt file lock local"


def test_locking_takes_a_passphrase_from_the_config(open_store, path):
    files = open_store()
    fill(files)
    with pytest.raises(ConfigError) as caught:
        files.key_files.lock()
    assert "passphrase = {" in str(caught.value.hint)
    assert states(files) == {False}
    assert not (path / "passphrase.json").exists()


@pytest.mark.parametrize(
    "kdf",
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
        None,
    ],
)
def test_parameters_are_bounded_before_they_are_used(open_store, path, kdf, cheap, monkeypatch):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    data = json.loads((path / "passphrase.json").read_text())
    data["kdf"] = {**data["kdf"], "memory_kib": 64, "lanes": 4, **kdf} if kdf else []
    (path / "passphrase.json").write_text(json.dumps(data))
    monkeypatch.setattr("keymgmt_file._passphrase.Argon2id", None)
    with pytest.raises(ProviderError, match=r"passphrase\.json .*is damaged"):
        open_store("correct horse battery").describe_key("release")


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("file", ["passphrase.json", "release.jwks"])
@pytest.mark.parametrize(
    "damage",
    [{"sealed": "AAAA"}, {"sealed": ""}, {"sealed": 1}, {"sealed": "!"}, {"format": "x"}, {"x": 1}],
)
def test_a_damaged_file(open_store, path, file, damage):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    data = json.loads((path / file).read_text())
    damaged = json.dumps({**data, **damage})
    (path / file).write_text(damaged)
    for call in (
        lambda: files.describe_key("release"),
        lambda: files.rotate_key("release"),
        files.key_files.unlock,
    ):
        with pytest.raises(ProviderError, match=r"damaged|does not open"):
            call()
    assert (path / file).read_text() == damaged, "what is damaged is not written over"
    assert (path / "passphrase.json").exists()


@pytest.mark.usefixtures("cheap")
def test_what_belongs_to_another_name_or_directory_does_not_open(open_store, path, tmp_path):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    files.create_key("another", "aes256", {})
    other = open_store("correct horse battery", at=tmp_path / "other")
    other.create_key("release", "aes256", {})
    (path / "another.jwks").write_bytes((path / "release.jwks").read_bytes())
    with pytest.raises(ProviderError, match="'another', renamed, or locked with another"):
        files.describe_key("another")
    (path / "release.jwks").write_bytes((tmp_path / "other" / "release.jwks").read_bytes())
    with pytest.raises(ProviderError, match=r"locked with another passphrase\.json"):
        files.describe_key("release")


@pytest.mark.usefixtures("cheap")
def test_no_second_passphrase_file_while_locked_files_need_the_first(open_store, path):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    (path / "passphrase.json").rename(path / "away")
    for call in (
        lambda: files.describe_key("release"),
        lambda: files.create_key("new", "aes256", {}),
        files.key_files.lock,
        files.key_files.unlock,
    ):
        with pytest.raises(ProviderError, match=r"passphrase\.json that opens them is missing"):
            call()
    assert not (path / "passphrase.json").exists()
    (path / "away").rename(path / "passphrase.json")
    assert files.describe_key("release").newest == "1"


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


@pytest.mark.usefixtures("cheap")
def test_asked_once_for_all_keys_threads_and_forks(path, monkeypatch):
    counter = Counter(monkeypatch, b"correct horse battery")
    with prompting(path) as files:
        fill(files)
        assert counter.asked == 2, "a passphrase that nothing can check yet is asked for twice"
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

        def again() -> None:
            assert files.unwrap(wrapped, b"") == dek
            assert counter.asked == 1

        in_child(again)
        files.close()
        files.list_keys()
        assert counter.asked == 2, "close wiped what was opened"


@pytest.mark.usefixtures("cheap")
def test_a_fork_while_another_thread_is_asked(path, monkeypatch):
    counter = Counter(monkeypatch, b"correct horse battery")
    with prompting(path) as files:
        fill(files)
    asked, answer = threading.Event(), threading.Event()

    def slow() -> bytearray:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            answer.wait()
        return bytearray(b"correct horse battery")

    monkeypatch.setattr(counter, "read", slow)
    with prompting(path) as files:
        thread = threading.Thread(target=files.list_keys)
        thread.start()
        asked.wait()

        def look() -> None:
            assert files.describe_key("key-aes256").newest == "1"

        in_child(look)
        answer.set()
        thread.join()


@pytest.mark.usefixtures("cheap")
def test_a_mistyped_passphrase_is_asked_again_and_not_at_once(path, monkeypatch):
    counter = Counter(monkeypatch, b"correct horse battery")
    with prompting(path) as files:
        fill(files)
    counter.asked, counter.answers = 0, (b"corect horse battery", b"correct horse battery")
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


@pytest.mark.usefixtures("cheap")
def test_a_passphrase_that_is_mistyped_the_first_time_locks_nothing(path, monkeypatch):
    Counter(monkeypatch, b"correct horse battery", b"corect horse battery")
    with prompting(path) as files, pytest.raises(ConfigError, match="differ"):
        files.create_key("release", "aes256", {})
    assert not [each for each in path.iterdir() if each.name != ".lock"]


@pytest.mark.usefixtures("cheap")
def test_a_damaged_file_does_not_make_the_others_ask_again(path, monkeypatch):
    counter = Counter(monkeypatch, b"correct horse battery")
    with prompting(path) as files:
        fill(files)
    (path / "damaged.jwks").touch(mode=0o600)
    (path / "damaged.jwks").write_bytes((path / "key-aes256.jwks").read_bytes())
    counter.asked = 0
    with prompting(path) as files:
        for _ in range(2):
            with pytest.raises(ProviderError, match="damaged"):
                files.describe_key("damaged")
            files.describe_key("key-aes256")
        assert counter.asked == 1


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("file", ["release.jwks", "passphrase.json"])
def test_a_locked_directory_is_refused_open_to_others(open_store, path, file):
    files = open_store("correct horse battery")
    files.create_key("release", "aes256", {})
    (path / file).chmod(0o644)
    with pytest.raises(AccessDenied, match="refused"):
        files.describe_key("release")


@pytest.mark.usefixtures("cheap")
def test_the_passphrase_stands_in_no_file(open_store, path):
    files = open_store("correct horse battery staple")
    fill(files)
    content = b"".join(each.read_bytes() for each in path.iterdir())
    assert b"correct horse battery" not in content
