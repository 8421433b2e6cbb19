"""Killed at any moment, or with the disk full: the old state or the new one, and nothing else."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from rounds import Rounds, rewrap_killed

import keymgmt
from keymgmt import errors

pytestmark = pytest.mark.once

NIGHTLY = os.environ.get("KEYMGMT_TEST_NIGHTLY")
ROUNDS = 500 if NIGHTLY else 100 if os.environ.get("CI") else 15

SEAL = "keymgmt.seal(words[0], words[1], to=['local:a'], keys=config, force=True)"
UNSEAL = "keymgmt.unseal(words[0], words[1], keys=config)"


@pytest.fixture
def config_file(site) -> Path:
    file = site.root / "keymgmt.toml"
    file.write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n[seal]\nsign = "local:publisher"\n'
    )
    file.chmod(0o600)
    return file


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_seal_killed_at_random_points(site, config_file):
    target = site.root / "k.sealed"
    config = keymgmt.load_config(config_file)
    with Rounds(SEAL, config_file, site.plain, target) as rounds:
        assert rounds.whole() == 0
        killed = 0
        for _ in range(ROUNDS):
            if random.random() < 0.5:
                shutil.rmtree(target, ignore_errors=True)
            existed = target.exists()
            status = rounds.killed()
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL)
            assert target.exists() or not existed
            if target.exists():
                with keymgmt.open(target, keys=config) as model:
                    assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
        assert killed > ROUNDS // 5
        assert rounds.whole() == 0
    assert left_behind(site.root) == []


def test_unseal_killed_at_random_points(site, config_file, tree_of):
    path, target = site.seal(), site.root / "plain"
    with Rounds(UNSEAL, config_file, path, target) as rounds:
        assert rounds.whole() == 0
        killed = 0
        for _ in range(ROUNDS):
            shutil.rmtree(target, ignore_errors=True)
            status = rounds.killed()
            killed += status == -signal.SIGKILL
            if target.exists():
                assert tree_of(target) == tree_of(site.plain)
        assert killed > ROUNDS // 5
        shutil.rmtree(target, ignore_errors=True)
        assert rounds.whole() == 0
    assert left_behind(site.root) == [], "plaintext that a kill left is swept up by the next"


def test_rewrap_of_a_tree_killed_at_random_points(site, config_file):
    tree = site.root / "tree"
    tree.mkdir()
    first = site.seal(target="tree/m0.sealed")
    for number in range(1, 48):
        shutil.copytree(first, tree / f"m{number}.sealed")
    rewrap_killed(
        tree,
        config_file,
        lambda: site.provider.rotate_key("a"),
        lambda path: (Path(path) / "keys.json").read_bytes(),
        site.root / "journal",
        100 if NIGHTLY else 4,
    )
    assert not list(tree.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB; mounting needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(site, small_disk):
    path = site.seal()
    for call in (
        lambda: keymgmt.seal(
            site.plain, small_disk / "m.sealed", to=["local:a"], keys=site.config()
        ),
        lambda: keymgmt.unseal(path, small_disk / "plain", keys=site.config()),
    ):
        with pytest.raises((OSError, errors.KeymgmtError)) as caught:
            call()
        if isinstance(caught.value, OSError):
            assert caught.value.errno == errno.ENOSPC
        assert list(small_disk.iterdir()) == []


def test_a_payload_that_cannot_be_read(site, monkeypatch):
    path = site.seal()
    real = os.preadv

    def preadv(fd, buffers, offset, *flags):
        if offset > 1_000_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset, *flags)

    with keymgmt.open(path, keys=site.config()) as model:
        monkeypatch.setattr(os, "preadv", preadv)
        buffer = bytearray(b"\xff" * model.manifest.file("model.bin").size)
        with pytest.raises(errors.SealedModelError, match=r"model\.bin"):
            model.read_into("model.bin", buffer)
        # What was written is wiped; what was not is as the caller left it.
        assert set(buffer) <= {0, 0xFF}


def test_two_seals_to_one_target(site):
    """One wins, the other is refused, and nothing is mixed."""
    target = site.root / "m.sealed"
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def seal() -> None:
        start.wait()
        try:
            keymgmt.seal(site.plain, target, to=["local:a"], keys=site.config())
            outcomes.append("sealed")
        except errors.ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=seal) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "sealed"]
    keymgmt.verify(target, keys=site.config())
    assert left_behind(site.root) == []


def test_a_source_that_changes_meanwhile(site):
    grown = threading.Event()

    def grow(done: int, total: int) -> None:
        if not grown.is_set():
            grown.set()
            with (site.plain / "model.bin").open("ab") as file:
                file.write(b"more")
            time.sleep(0.01)

    with pytest.raises(errors.ConfigError, match="changed"):
        site.seal(progress=grow)
    assert not (site.root / "m.sealed").exists()
