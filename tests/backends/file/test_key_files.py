"""Files of keys: who may read them, what is damage, and what is nobody's business."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable

import pytest
from forks import NOBODY, in_child
from hypothesis import example, given
from hypothesis import strategies as st
from keymgmt_file import FileProvider
from keymgmt_file._jwk import KeySet, read_json
from keymgmt_file._passphrase import decrypt_file

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    ProviderError,
    ProviderUnavailable,
    is_version,
)

Open = Callable[..., FileProvider]


def test_private_whatever_the_umask(files, path):
    before = os.umask(0)
    try:
        files.create_key("release", "aes256", {})
        files.rotate_key("release")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {each.stat().st_mode & 0o777 for each in path.iterdir()} == {0o600}


@pytest.mark.parametrize(("what", "mode"), [("", 0o750), ("", 0o701), ("release.jwks", 0o640)])
def test_refused_when_others_can_read(files, path, what, mode):
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        (path / what).chmod(mode)
        for call in (
            lambda: files.wrap("release", dek, b""),
            lambda: files.unwrap(wrapped, b""),
            lambda: files.describe_key("release"),
            lambda: files.rotate_key("release"),
            files.list_keys,
        ):
            # A failure of this provider, so that another group of the policy is tried.
            with pytest.raises(AccessDenied, match="refused: others can use it") as caught:
                call()
            assert str(caught.value.hint) == f"chmod go= {path / what}"
        (finding,) = [each for each in files.check().findings if each.status == "failed"]
        assert finding.hint == f"chmod go= {path / what}"
        (path / what).chmod(0o600 if what else 0o700)
        assert files.unwrap(wrapped, b"") == dek
        assert files.describe_key("release").newest == "1"


def test_refused_where_others_could_exchange_it(open_store, tmp_path):
    shared = tmp_path / "shared"
    files = open_store(at=shared / "keys")
    files.create_key("release", "aes256", {})
    shared.chmod(0o777)
    with pytest.raises(AccessDenied, match="others can write it") as caught:
        files.describe_key("release")
    assert str(caught.value.hint) == f"chmod go-w {shared}"


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_what_is_made_is_accepted_whatever_the_umask(open_store, tmp_path, mask):
    files = open_store(at=tmp_path / "a" / "b" / "keys")
    before = os.umask(mask)
    try:
        files.create_key("release", "aes256", {})
    finally:
        os.umask(before)
    assert files.check("release").ok
    assert (tmp_path / "a" / "b" / "keys").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_refused_when_it_belongs_to_another(files, path):
    files.create_key("release", "aes256", {})
    os.chown(path / "release.jwks", 4711, -1)
    with pytest.raises(AccessDenied, match="belongs to user 4711") as caught:
        files.describe_key("release")
    assert str(caught.value.hint) == f"chown 0 {path / 'release.jwks'}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_denied(files, path):
    files.create_key("release", "aes256", {})
    wrapped = files.wrap("release", Dek.generate(), b"")

    def use() -> None:
        os.setuid(NOBODY)
        for call in (
            lambda: files.unwrap(wrapped, b""),
            lambda: files.rotate_key("release"),
            lambda: files.create_key("another", "aes256", {}),
            files.list_keys,
        ):
            with pytest.raises(AccessDenied, match="permission denied"):
                call()
        assert not files.check().ok

    in_child(use)


def test_a_key_file_is_a_regular_file(files, path, tmp_path):
    files.create_key("release", "aes256", {})
    (path / "release.jwks").rename(tmp_path / "elsewhere")
    # A link counts as much as what it points to and everything on the way to that.
    (path / "release.jwks").symlink_to(tmp_path / "elsewhere")
    assert files.describe_key("release").newest == "1"
    (tmp_path / "elsewhere").chmod(0o644)
    with pytest.raises(AccessDenied, match="refused"):
        files.describe_key("release")
    (path / "release.jwks").unlink()
    os.mkfifo(path / "release.jwks", 0o600)
    with pytest.raises(ProviderError, match="not a regular file"):
        files.describe_key("release")


SECRET = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


GOOD = {"kty": "oct", "alg": "HKDF-SHA384-A256GCM", "kid": "1", "k": SECRET}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '"' + SECRET,
        "[]",
        "{}",
        '{"keys": []}',
        '{"keys": {"0": 1}}',
        '{"keys": [null]}',
        '{"keys": [[]]}',
        "[" * 100_000,
        json.dumps({"keys": [GOOD]})[:-1],
        json.dumps({"keys": [GOOD]}).replace('"kid"', '"k": "AA", "kid"'),
        json.dumps({"keys": [GOOD, GOOD]}),
        json.dumps({"keys": [GOOD, {**GOOD, "kid": "2", "alg": "hpke-p256"}]}),
        json.dumps({"keys": [{**GOOD, "alg": "A256GCM"}]}),
        json.dumps({"keys": [{**GOOD, "kid": 1}]}),
        json.dumps({"keys": [{**GOOD, "kid": "0"}]}),
        json.dumps({"keys": [{**GOOD, "kid": "../1"}]}),
        json.dumps({"keys": [{**GOOD, "k": SECRET[:-1]}]}),
        json.dumps({"keys": [{**GOOD, "k": SECRET[:-1] + "="}]}),
        json.dumps({"keys": [{**GOOD, "k": SECRET[:-1] + "\u00e9"}]}),
        json.dumps({"keys": [{**GOOD, "k": [1] * 43}]}),
        json.dumps({"keys": [{**GOOD, "iat": 1e400}]}).replace("Infinity", "1e400"),
        json.dumps({"keys": [{**GOOD, "iat": 10**40}]}),
        '{"keys": [{"iat": ' + "1" * 5000 + "}]}",
        json.dumps({"keys": [GOOD]}).replace('"1"', '"1\\ud800"'),
        "\xff",
    ],
)
def test_a_damaged_file_is_said_and_kept(files, path, content):
    files.create_key("release", "aes256", {})
    (path / "release.jwks").write_bytes(content.encode("latin-1", "replace"))
    with Dek.generate() as dek:
        for call in (
            lambda: files.wrap("release", dek, b""),
            lambda: files.rotate_key("release"),
            lambda: files.retire_version("release", "1"),
            files.list_keys,
        ):
            with pytest.raises(ProviderError, match="the key file of 'release' is damaged") as e:
                call()
            assert SECRET[:-1] not in "".join(traceback.format_exception(e.value))
    with pytest.raises(ConfigError, match="there is a key"):
        files.create_key("release", "aes256", {})
    assert (path / "release.jwks").read_bytes() == content.encode("latin-1", "replace")
    assert not files.check().ok


NAMES = st.sampled_from(
    [
        *("keys", "kty", "alg", "crv", "kid", "k", "d", "x", "y", "priv", "pub", "iat", "revoked"),
        *("format", "sealed"),
    ]
)


VALUES = st.sampled_from([*GOOD.values(), "keymgmt-file-locked/1", "EC", "P-256"])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=50)
    | VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=12,
)


CHANGES = st.dictionaries(NAMES, JSON, max_size=2)


@given(
    st.binary(max_size=200)
    | JSON.map(lambda data: json.dumps(data).encode())
    | CHANGES.map(lambda change: json.dumps({"keys": [{**GOOD, **change}]}).encode())
)
@example(json.dumps({"keys": [GOOD]}).encode())
def test_any_bytes_are_a_key_or_a_provider_error(content):
    try:
        reader = read_json(content, "the key file")
        if "sealed" in reader.names():
            decrypt_file("release.jwks", reader, bytearray(32))
        keys = KeySet.parse("release", reader)
    except ProviderError:
        return
    info = keys.info()
    assert is_version(info.newest)
    with keys.secret(info.newest) as secret:
        assert keys.kind.length == len(secret)
    assert KeySet.parse("release", read_json(keys.dump(), "the key file")) == keys


def test_a_file_of_any_size_is_bounded(files, path):
    files.create_key("release", "aes256", {})
    with (path / "release.jwks").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ProviderError, match="larger than"):
        files.describe_key("release")


def test_a_directory_that_is_missing(files, path):
    # Not mounted, perhaps: what cannot be looked at is not reported as empty.
    with pytest.raises(ProviderUnavailable, match="does not exist"):
        files.list_keys()
    assert not files.check().ok
    with pytest.raises(ProviderUnavailable, match="does not exist") as caught:
        files.wrap("release", Dek.generate(), b"")
    assert "keymgmt keys create" in str(caught.value.hint)
    assert not path.exists()
    path.mkdir(mode=0o700)
    (finding,) = files.check().findings
    assert finding.status == "warning"
    path.rmdir()
    path.write_text("a file")
    with pytest.raises(ProviderError):
        files.create_key("release", "aes256", {})
    path.chmod(0o600)
    with pytest.raises(ProviderUnavailable, match="not a directory"):
        files.create_key("release", "aes256", {})
    assert not files.check().ok


def test_files_of_others_are_left_alone(files, path):
    files.create_key("release", "aes256", {})
    for name in ("README", "Release.jwks", "a..b.jwks", ".hidden.jwks", "release.jwks.bak"):
        (path / name).write_text("mine")
    files.rotate_key("release")
    assert [info.key for info in files.list_keys()] == ["release"]
    assert (path / "README").read_text() == "mine"
    assert (path / ".hidden.jwks").read_text() == "mine"


def test_a_directory_without_write_access_still_opens(files, path):
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        path.chmod(0o500)
        before = sorted(path.iterdir())
        try:
            assert files.unwrap(wrapped, b"") == dek
        finally:
            path.chmod(0o700)
        assert sorted(path.iterdir()) == before
