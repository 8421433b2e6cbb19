"""A folder that is exchanged: nothing of others is deleted, and who could read it still can."""

from __future__ import annotations

import os
import stat
import struct

import pytest

import keymgmt
from keymgmt import errors
from keymgmt.sealed.folder import SealedFolder

SERVICE, GROUP = 12345, 23456
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")


def reseal(site, path, **options):
    return keymgmt.reseal(path, to=["local:b"], keys=site.config(), **options)


def seal_again(site, path, **options):
    return site.seal("local:b", force=True, **options)


REPLACES = pytest.mark.parametrize("replace", [reseal, seal_again])


def nothing_left(site):
    return not [path.name for path in site.root.iterdir() if path.name.endswith(".tmp")]


@REPLACES
@pytest.mark.parametrize(
    "foreign", ["LICENSE", ".git/config", "payload/notes.txt", "payload/empty/", "keys.json.bak"]
)
def test_what_others_put_beside_a_model_is_not_deleted(site, tree_of, replace, foreign):
    path = site.seal()
    (path / foreign).parent.mkdir(exist_ok=True)
    if foreign.endswith("/"):
        (path / foreign).mkdir()
    else:
        (path / foreign).write_text("mine")
    before = tree_of(path)
    with pytest.raises(errors.KeymgmtError, match=foreign.split("/")[-2 if "/" in foreign else 0]):
        replace(site, path)
    assert tree_of(path) == before
    assert (path / foreign).exists()
    assert nothing_left(site)


def test_a_reseal_into_another_folder_is_the_way_out(site):
    path = site.seal()
    (path / "LICENSE").write_text("mine")
    with pytest.raises(errors.ConfigError, match="LICENSE") as caught:
        reseal(site, path)
    assert "another folder" in caught.value.hint
    reseal(site, path, target=site.root / "new.sealed")
    assert (path / "LICENSE").read_text() == "mine"


@REPLACES
def test_what_comes_while_it_is_replaced_is_not_deleted(site, monkeypatch, replace):
    """Also in the moment in which the folders are exchanged."""
    path = site.seal()
    release = keymgmt.inspect(path).manifest.id
    exchange = keymgmt._system.files._rename
    calls = []

    def late(source, target, flags):
        if not calls:
            (path / "LICENSE").write_text("mine")
        calls.append(flags)
        exchange(source, target, flags)

    monkeypatch.setattr("keymgmt._system.files._rename", late)
    with pytest.raises(errors.ConfigError, match="LICENSE"):
        replace(site, path)
    assert len(calls) == 2
    assert (path / "LICENSE").read_text() == "mine"
    assert keymgmt.inspect(path).manifest.id == release
    assert nothing_left(site)


@pytest.mark.parametrize("damaged", ["manifest.json", "keys.json", "signatures.json"])
def test_only_what_parses_as_a_sealed_model_is_replaced(site, tree_of, damaged):
    path = site.seal()
    (path / damaged).write_text('{"format": "mine"}')
    before = tree_of(path)
    with pytest.raises(errors.ConfigError, match="no sealed model"):
        site.seal(force=True)
    assert tree_of(path) == before


def test_what_a_killed_rewrap_left_does_not_stop_it(site):
    path = site.seal()
    (path / ".keys.json.0123456789abcdef.tmp").write_bytes(b"half")
    reseal(site, path)
    names = sorted(entry.name for entry in path.iterdir())
    assert names == ["keys.json", "manifest.json", "payload", "signatures.json"]


def access(path):
    info = path.stat()
    return info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)


@REPLACES
def test_the_mode_stays(site, replace):
    path = site.seal()
    modes = {
        path: 0o2750,
        path / "payload": 0o710,
        path / "payload" / "model.bin.floe": 0o640,
        path / "manifest.json": 0o604,
        path / "keys.json": 0o600,
    }
    for file, mode in modes.items():
        file.chmod(mode)
    replace(site, path)
    assert {file: stat.S_IMODE(file.stat().st_mode) for file in modes} == modes


@needs_root
@REPLACES
def test_owner_and_group_stay(site, replace):
    path = site.seal()
    files = [path, *path.rglob("*")]
    for file in files:
        os.chown(file, SERVICE, GROUP)
    path.chmod(0o700)
    before = {file: access(file) for file in files}
    replace(site, path)
    assert {file: access(file) for file in files} == before


@needs_root
def test_a_file_that_is_new_is_read_by_whom_the_folder_is(site):
    path = site.seal()
    os.chown(path, SERVICE, GROUP)
    path.chmod(0o750)
    (site.plain / "more.bin").write_bytes(b"more")
    seal_again(site, path)
    assert access(path / "payload" / "more.bin.floe") == (SERVICE, GROUP, 0o640)


@needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_owner_that_cannot_be_kept_is_refused_before_the_work(site, monkeypatch, tree_of):
    path = site.seal()
    os.chown(path, SERVICE, SERVICE)
    before = tree_of(path)
    # As a user who reads root's files and is not root.
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(errors.ConfigError, match="belongs to") as caught:
        reseal(site, path, progress=lambda *_: pytest.fail("it began to write"))
    assert "another folder" in caught.value.hint
    assert tree_of(path) == before
    assert nothing_left(site)


def test_an_access_list_stays(site):
    """As ``setfacl -m u:12345:rx`` writes it: linux/posix_acl_xattr.h."""
    path = site.seal()
    entries = [(1, 7, -1), (2, 5, SERVICE), (4, 5, -1), (16, 5, -1), (32, 0, -1)]
    content = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *each) for each in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", content)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    reseal(site, path)
    assert os.getxattr(path, "system.posix_acl_access") == content


def test_more_files_than_a_model_may_have(site, monkeypatch):
    """The bound is named; 50 000 small files would be the same with more patience."""
    monkeypatch.setattr("keymgmt._verbs.plain_files.MAX_FILES", 2)
    with pytest.raises(errors.ConfigError, match=r"has 3 files.* at most 2") as caught:
        site.seal()
    assert caught.value.hint


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_an_error_of_a_descriptor_names_the_path(site, monkeypatch, call):
    path = site.seal()
    (path / "keys.json").chmod(0o640)

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=r"Input/output error: '(?!/proc).*m\.sealed"):
        keymgmt.rewrap(path, add=["local:b"], keys=site.config())


def test_a_file_system_without_locks_is_named(site, monkeypatch):
    path = site.seal()

    def failing(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", failing)
    with pytest.raises(OSError, match=r"No locks available: '.*m\.sealed/\.keymgmt\.lock'"):
        keymgmt.rewrap(path, add=["local:b"], keys=site.config())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes other users")
def test_what_another_user_puts_into_the_folder_is_not_given_away(site, tmp_path):
    """Who owns the folder beside it may rename what is being made, and cannot reach into it."""
    secret = tmp_path / "secret"
    secret.write_text("root's own")
    secret.chmod(0o600)
    theirs = site.root / "theirs"
    theirs.mkdir()
    path = site.seal(target="theirs/m.sealed")
    for each in (theirs, path, *path.rglob("*")):
        os.chown(each, 12345, 12345)
    done = []

    def swap(*_):
        (temporary,) = [p for p in theirs.iterdir() if p.name.endswith(".tmp")]
        child = os.fork()
        if not child:
            try:
                os.setresuid(12345, 12345, 12345)
                (temporary / "payload").rename(temporary / "aside")
                (temporary / "payload").symlink_to(tmp_path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        done.append(stat.S_IMODE(temporary.stat().st_mode))

    keymgmt.reseal(path, to=["local:a"], keys=site.config(), progress=swap)
    assert done
    assert set(done) == {0o700}
    info = secret.stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (0, 0o600)
    assert path.stat().st_uid == 12345


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_whatever_the_umask_others_cannot_write(site, umask):
    before = os.umask(umask)
    try:
        path = site.seal()
        keymgmt.reseal(path, site.root / "again.sealed", to=["local:a"], keys=site.config())
    finally:
        os.umask(before)
    for folder in (path, site.root / "again.sealed"):
        for each in (folder, *folder.rglob("*")):
            assert not stat.S_IMODE(each.stat().st_mode) & 0o022, each


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes other users")
def test_a_killed_rewrap_of_root_does_not_lock_the_owner_out(site):
    path = site.seal()
    for each in (site.root, *site.root.rglob("*")):
        os.chown(each, SERVICE, SERVICE)
    child = os.fork()
    if not child:
        folder = SealedFolder(path)
        folder.lock()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    info = (path / ".keymgmt.lock").stat()
    assert (info.st_uid, info.st_gid) == (SERVICE, SERVICE)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_not_ours_is_named(site, kind):
    path = site.seal()
    lock = path / ".keymgmt.lock"
    lock.mkdir() if kind == "folder" else lock.symlink_to("/nowhere")
    (path / ".keys.json.0123456789abcdef.tmp").mkdir()
    with pytest.raises(errors.ConfigError, match=r"\.keymgmt\.lock is not a file") as caught:
        keymgmt.rewrap(path, add=["local:b"], keys=site.config())
    assert caught.value.hint == "remove it"
    lock.rmdir() if kind == "folder" else lock.unlink()
    keymgmt.rewrap(path, add=["local:b"], keys=site.config())
