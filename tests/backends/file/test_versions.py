"""A key file that was restored or exchanged: what notices, what is refused, and the way out."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from keymgmt_file import FileProvider
from keymgmt_file._versions import problem

from keymgmt.backend import Dek, KeymgmtError, ProviderError, WrongKey

Open = Callable[..., FileProvider]
KINDS = ["aes256", "hpke-x25519", "ed25519"]


def use(files: FileProvider, kind: str) -> object:
    if kind == "ed25519":
        return files.sign("release", b"a manifest")
    with Dek.generate() as dek:
        return files.wrap("release", dek, b"")


def is_refused(files: FileProvider, kind: str, why: str) -> bool:
    """Whether everything that would make something new is refused, and the doctor says why."""
    calls: list[Callable[[], object]] = [
        lambda: use(files, kind),
        lambda: files.rotate_key("release"),
        lambda: files.retire_version("release", "1"),
    ]
    if kind == "hpke-x25519":
        calls.append(lambda: files.export_recipient("release"))
    if kind == "ed25519":
        calls.append(lambda: files.public_key("release"))
    for call in calls:
        with pytest.raises(ProviderError, match=why) as caught:
            call()
        assert "keymgmt file accept local:release" in str(caught.value.hint)
    (finding,) = [each for each in files.check().findings if each.name == "key release"]
    assert why in finding.detail
    return finding.status == "failed"


def accept(files: FileProvider) -> str:
    with files.key_files.changing():
        keys = files.key_files.find("release")
        files.key_files.add_version(keys)
    return keys.newest


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_key_file_makes_no_second_version_of_a_number(files, path, kind):
    files.create_key("release", kind, {})
    backup = (path / "release.jwks").read_bytes()
    files.rotate_key("release")
    newest = (path / "release.jwks").read_bytes()
    (path / "release.jwks").write_bytes(backup)
    assert is_refused(files, kind, "it lacks version 2")
    assert (path / "release.jwks").read_bytes() == backup

    # One way out: the newest file comes back.
    (path / "release.jwks").write_bytes(newest)
    assert use(files, kind)
    assert files.check().ok
    # The other: what is there goes on, above every number that was ever used.
    (path / "release.jwks").write_bytes(backup)
    assert accept(files) == "3"
    assert use(files, kind)
    assert [each.version for each in files.rotate_key("release").versions] == ["1", "3", "4"]
    assert files.check().ok


@pytest.mark.parametrize("kind", KINDS)
def test_two_directories_that_made_different_versions_of_a_number(
    files, open_store, path, tmp_path, kind
):
    files.create_key("release", kind, {})
    shutil.copytree(path, tmp_path / "copy")
    copy = open_store(at=tmp_path / "copy")
    assert files.rotate_key("release").newest == copy.rotate_key("release").newest == "2"
    shutil.copyfile(tmp_path / "copy" / "release.jwks", path / "release.jwks")
    assert is_refused(files, kind, "its version 2 is another one than the version 2 of before")
    assert accept(files) == "3"
    assert use(files, kind)


def test_what_was_wrapped_under_the_other_version_is_known_as_such(
    files, open_store, path, tmp_path
):
    files.create_key("release", "aes256", {})
    shutil.copytree(path, tmp_path / "copy")
    copy = open_store(at=tmp_path / "copy")
    files.rotate_key("release")
    copy.rotate_key("release")
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        with pytest.raises(WrongKey, match="another key of that name"):
            copy.unwrap(wrapped, b"")
        # Opening asks nothing of what is known: models open as long as their version is there.
        shutil.copyfile(path / "release.jwks", tmp_path / "copy" / "release.jwks")
        assert copy.unwrap(wrapped, b"") == dek


def test_another_key_of_the_name(files, open_store, path, tmp_path):
    files.create_key("release", "aes256", {})
    other = open_store(at=tmp_path / "other")
    other.create_key("release", "aes256", {})
    shutil.copyfile(tmp_path / "other" / "release.jwks", path / "release.jwks")
    assert is_refused(files, "aes256", "its version 1 is another one")


def test_a_key_that_was_deleted_and_made_again_counts_on(files, path):
    files.create_key("release", "aes256", {})
    files.rotate_key("release")
    (path / "release.jwks").unlink()
    assert files.create_key("release", "aes256", {}).newest == "3"
    assert use(files, "aes256")
    files.delete_key("release")
    assert [each.name for each in path.glob("*.jwks")] == []
    assert files.create_key("release", "aes256", {}).newest == "4"
    assert use(files, "aes256")


def test_a_newer_key_file_from_elsewhere_is_taken(files, open_store, path, tmp_path):
    files.create_key("release", "aes256", {})
    shutil.copytree(path, tmp_path / "build")
    build = open_store(at=tmp_path / "build")
    build.rotate_key("release")
    build.rotate_key("release")
    build.retire_version("release", "1")
    shutil.copyfile(tmp_path / "build" / "release.jwks", path / "release.jwks")
    assert use(files, "aes256")
    assert files.rotate_key("release").newest == "4"


def test_a_directory_that_knows_nothing_takes_what_is_there(files, path):
    files.create_key("release", "aes256", {})
    files.create_key("another", "aes256", {})
    (path / "versions.json").unlink()
    assert use(files, "aes256")
    files.rotate_key("release")
    assert set(json.loads((path / "versions.json").read_text())["keys"]) == {"release"}


def test_an_identity_is_what_the_manual_says(files, path):
    files.create_key("release", "ed25519", {})
    jwk = json.loads((path / "release.jwks").read_text())["keys"][0]
    secret = base64.urlsafe_b64decode(jwk["d"] + "=")
    identity = HKDFExpand(SHA384(), 16, b"keymgmt-file identity 1").derive(secret).hex()
    assert json.loads((path / "versions.json").read_text()) == {
        "format": "keymgmt-file-versions/1",
        "keys": {"release": {"1": identity}},
    }


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": "x", "keys": {}}', '{"format": "keymgmt-file-versions/1"}']
)
def test_what_is_known_is_never_taken_for_nothing(files, path, content):
    files.create_key("release", "aes256", {})
    wrapped = use(files, "aes256")
    before = (path / "release.jwks").read_bytes()
    (path / "versions.json").write_text(content)
    for call in (lambda: use(files, "aes256"), lambda: files.rotate_key("release")):
        with pytest.raises(KeymgmtError, match=r"versions\.json is damaged"):
            call()
    assert (path / "release.jwks").read_bytes() == before
    files.unwrap(wrapped, b"").wipe()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "found", "why"),
    [
        ({}, {"7": "a"}, None),
        ({"1": "a"}, {"1": "a"}, None),
        ({"1": "a"}, {"1": "a", "2": "b"}, None),
        ({"1": "a", "2": "b"}, {"2": "b"}, None),
        ({"1": "a", "2": "b"}, {"2": "b", "3": "c"}, None),
        ({"9": "a", "10": "b"}, {"9": "a"}, "it lacks version 10"),
        ({"1": "a", "2": "b"}, {"1": "a", "2": "c"}, "its version 2"),
        ({"1": "a", "2": "b"}, {"1": "c", "2": "b", "3": "d"}, "its version 1"),
        ({"1": "a"}, {"2": "b"}, "none of the versions"),
    ],
)
def test_which_files_go_on_from_what_is_known(known, found, why):
    said = problem(known, found)
    assert said is None if why is None else why in str(said)
