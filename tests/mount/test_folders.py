"""Folders of links to files in memory: an exchange is noticed, what is left behind is swept."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keymgmt._mount import folders


def fill(memory: object) -> None:
    memory[:] = b"plain"  # type: ignore[index]


@pytest.fixture
def folder() -> Iterator[folders.MemfdFolder]:
    made = folders.MemfdFolder()
    made.write("sub/model.bin", 5, fill)
    made.write("model.xml", 5, fill)
    yield made
    made.close()


def test_nothing_was_changed(folder):
    assert (folder.path / "sub" / "model.bin").read_bytes() == b"plain"
    (folder.path / "what-the-program-writes").write_bytes(b"x")
    assert folder.changed() is None


def test_a_link_that_was_exchanged_and_put_back(folder, tmp_path):
    link, aside = folder.path / "sub" / "model.bin", folder.path / "aside"
    link.rename(aside)
    link.symlink_to(tmp_path / "another")
    assert folder.changed() == "sub/model.bin"
    link.unlink()
    aside.rename(link)
    assert (folder.path / "sub" / "model.bin").read_bytes() == b"plain"
    assert folder.changed() == "sub/model.bin"


def test_a_link_that_was_made_anew(folder):
    link = folder.path / "model.xml"
    target = link.readlink()
    link.unlink()
    link.symlink_to(target)
    assert folder.changed() == "model.xml"


def test_what_a_killed_process_left_is_swept_by_the_next():
    program = (
        "from keymgmt._mount.folders import MemfdFolder\n"
        "made = MemfdFolder()\n"
        "made.write('model.xml', 5, lambda memory: memory.write(b'plain'))\n"
        "print(made.path, flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        # In use: nobody takes it for abandoned.
        folders.MemfdFolder().close()
        assert left.is_dir()
        other.send_signal(signal.SIGKILL)
    assert left.is_dir()
    folders.MemfdFolder().close()
    assert not left.exists()
