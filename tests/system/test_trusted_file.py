"""Who could have written a file that decides whom to trust, or holds a secret."""

from __future__ import annotations

import grp
import os
import pwd
import struct
import sys
import threading
from pathlib import Path

import pytest
from programs import run

from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError, ProviderUnavailable

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def read(path: Path, access: str = "trusted", **options: object) -> bytearray:
    arguments = {"label": "config", "limit": 100, "access": access} | options
    return read_file(path, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    path = folder / "file"
    path.write_bytes(b"content")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("access", ["any", "trusted"])
def test_a_file_of_ours_is_read(file, access):
    assert read(file, access) == b"content"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_what_a_umask_makes(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = tmp_path / "made"
        folder.mkdir()
        (folder / "file").write_bytes(b"content")
    finally:
        os.umask(before)
    user = pwd.getpwuid(os.geteuid())
    alone = (
        folder.stat().st_gid == user.pw_gid
        and not set(grp.getgrgid(user.pw_gid).gr_mem) - {user.pw_name}
        and not any(
            each.pw_gid == user.pw_gid and each.pw_uid != user.pw_uid for each in pwd.getpwall()
        )
    )
    if umask == 0o022 or (umask == 0o002 and alone):
        assert read(folder / "file") == b"content"
    else:
        with pytest.raises(ConfigError, match=r"in .*made, is refused: others can write") as raised:
            read(folder / "file")
        assert raised.value.hint == f"chmod {'go-w' if umask == 0 else 'g-w'} {folder}"


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o602])
def test_a_file_that_others_can_write_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ConfigError, match="is refused: others can write it") as raised:
        read(file)
    assert raised.value.hint == f"chmod go-w {file}"
    assert read(file, "any") == b"content"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_private_file_is_nobody_elses(file, mode):
    file.chmod(mode)
    with pytest.raises(ProviderUnavailable, match="others can use it") as raised:
        read(file, "private", error=ProviderUnavailable)
    assert raised.value.hint == f"chmod go= {file}"


def test_the_group_of_others(file):
    groups = [each.gr_gid for each in grp.getgrall() if each.gr_gid != os.getegid()]
    if os.geteuid() != 0:
        pytest.skip("only root gives files to any group")
    os.chown(file, -1, groups[0])
    file.chmod(0o664)
    with pytest.raises(ConfigError, match="its group") as raised:
        read(file)
    assert raised.value.hint == f"chmod g-w {file}"


@root_only
def test_a_folder_of_another_user_on_the_way(file):
    os.chown(file.parent, 12345, -1)
    with pytest.raises(
        ConfigError, match=r"in .*folder, is refused: it belongs to user 12345"
    ) as raised:
        read(file)
    # The folder may be the home of that user, as for root after `sudo -E`.
    assert "chown" not in str(raised.value.hint)


def test_a_sticky_folder_keeps_what_is_ours(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "file").write_bytes(b"content")
    assert read(shared / "file") == b"content"
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="others can write it"):
        read(shared / "file")


@root_only
def test_a_link_that_another_user_planted_in_a_sticky_folder(tmp_path, file):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / "keymgmt.toml"
    link.symlink_to(file)
    assert read(link) == b"content"
    os.lchown(link, 12345, -1)
    with pytest.raises(ConfigError, match=r"is refused: it belongs to user 12345"):
        read(link)


def test_a_chain_of_links_is_followed_and_each_is_looked_at(tmp_path, file):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    (open_folder / "second").symlink_to(Path("..") / "folder" / "file")
    (tmp_path / "first").symlink_to(open_folder / "second")
    assert read(tmp_path / "first") == b"content"
    open_folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"in .*open, is refused: others can write it"):
        read(tmp_path / "first")


def test_what_lies_above_the_target_of_a_link(tmp_path, file):
    """``link/..`` is the folder above what the link points to, and not the one that holds it."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "file").write_bytes(b"good")
    open_folder = tmp_path / "open"
    (open_folder / "inner").mkdir(parents=True)
    (open_folder / "file").write_bytes(b"evil")
    (tmp_path / "good" / "link").symlink_to(open_folder / "inner")
    assert read(tmp_path / "good" / "link" / ".." / "file") == b"evil"
    open_folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"in .*open, is refused: others can write it"):
        read(tmp_path / "good" / "link" / ".." / "file")


@pytest.mark.parametrize("above", [False, True])
def test_an_access_list_is_no_group_of_ones_own(file, above):
    place = file.parent if above else file
    entries = [(1, 7, -1), (2, 7, 12050), (4, 7, -1), (16, 7, -1), (32, 4, -1)]
    content = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *each) for each in entries)
    try:
        os.setxattr(place, "system.posix_acl_access", content)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    with pytest.raises(ConfigError, match="by its access list") as raised:
        read(file)
    assert raised.value.hint == f"setfacl -b {place}"


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="cannot read the config"):
        read(tmp_path / "a")


@root_only
def test_a_bind_mount_of_another_owner(tmp_path, file):
    program = """if True:
        import os, subprocess, sys
        from pathlib import Path
        from keymgmt._system.libc import check, libc
        from keymgmt._system.trusted_file import read_file
        from keymgmt.errors import ConfigError

        check(libc.unshare(0x00020000))  # CLONE_NEWNS
        check(libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None))  # private, recursively
        source, place, file = sys.argv[1:]
        check(libc.mount(source.encode(), place.encode(), None, 1 << 12, None))  # MS_BIND
        try:
            read_file(Path(file), label="config", limit=100, access="trusted")
        except ConfigError as error:
            print(error)
        """
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"theirs")
    os.chown(other, 12345, -1)
    command = [sys.executable, "-c", program, str(other), str(file.parent), str(file)]
    done = run(*command)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this container may not mount")
    assert f"in {file.parent}, is refused: it belongs to user 12345" in done.stdout, done.stderr


@pytest.mark.parametrize("access", ["any", "trusted", "private"])
def test_a_fifo_does_not_block(tmp_path, access):
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read(tmp_path / "fifo", access)


def test_bounds_and_absence(file):
    file.write_bytes(b"x" * 101)
    with pytest.raises(ConfigError, match="larger than 100 bytes"):
        read(file)
    with pytest.raises(ConfigError, match=r"cannot read the config .*: No such file") as raised:
        read(file.with_name("none"), hint="make one")
    assert raised.value.hint == "make one"
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    with pytest.raises(ConfigError, match="NUL"):
        read(Path("a\0b"))


def test_a_file_that_is_exchanged_all_the_time_is_never_mixed(tmp_path):
    file, end = tmp_path / "file", threading.Event()
    file.write_bytes(b"a" * 50)

    def exchange() -> None:
        while not end.is_set():
            for letter in (b"b", b"a"):
                other = tmp_path / "other"
                other.write_bytes(letter * 50)
                other.replace(file)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(300):
            try:
                content = read(file)
            except ConfigError as error:
                assert "while it was read" in str(error)  # noqa: PT017 - either will do
            else:
                assert content in (b"a" * 50, b"b" * 50)
    finally:
        end.set()
        thread.join()


def test_what_the_kernel_makes_as_it_is_read():
    """It says that it has no bytes: sysfs, configfs, securityfs."""
    path = Path("/proc/self/limits")
    assert path.stat().st_size == 0
    assert read(path, "any", limit=1 << 20).startswith(b"Limit")
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        read(path, "any", limit=10)
