"""``unseal --memory``: onto a file system in memory that is not swapped, or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from programs import run

SWAP = "Filename\tType\tSize\tUsed\tPriority\n/dev/sda9 partition 1000 0 -2\n"


def unseal(site: Any, where: Path, *options: str, swap: str = "") -> tuple[int, str]:
    """Run it with a tmpfs, one with ``noswap`` and a ramfs below ``where``, and such swap."""
    folders = ("tmpfs", "noswap", "ramfs")
    for name in folders:
        (where / name).mkdir(exist_ok=True)
    (where / "swaps").write_text(swap)
    script = (
        f"mount -t tmpfs x {where}/tmpfs && mount -t tmpfs -o noswap x {where}/noswap && "
        f"mount -t ramfs x {where}/ramfs && mount --bind {where}/swaps /proc/swaps && "
        'target=$1 && shift && "$@" && cat "$target/a.txt"'
    )
    target = options[-1]
    command = [sys.executable, "-m", "keymgmt.cli", "unseal", str(site.sealed), "--memory"]
    line = ["unshare", "-m", "sh", "-c", script, "sh", target, *command, *options]
    done = run(*line, env=site.env())
    return done.returncode, done.stdout + done.stderr


def test_where_it_goes(needs_root, site, tmp_path):
    for kind in ("tmpfs", "noswap", "ramfs"):
        code, said = unseal(site, tmp_path, str(tmp_path / kind / "m"))
        assert (code, said.splitlines()[-2:]) == (
            0,
            ["hello", "this is plaintext in memory: delete it when you are done"],
        )
    for kind, code in (("tmpfs", 3), ("noswap", 0), ("ramfs", 0)):
        assert unseal(site, tmp_path, str(tmp_path / kind / "m"), swap=SWAP)[0] == code
    code, said = unseal(site, tmp_path, str(tmp_path / "tmpfs" / "m"), swap=SWAP)
    assert "could be swapped out to /dev/sda9" in said
    allowed = unseal(site, tmp_path, "--allow-swap", str(tmp_path / "tmpfs" / "m"), swap=SWAP)
    assert allowed[0] == 0


def test_a_disk_is_refused_and_nothing_is_left(needs_root, site, tmp_path):
    on = run("stat", "-f", "-c", "%T", tmp_path).stdout
    code, said = unseal(site, tmp_path, str(tmp_path / "m"))
    if on.strip() in ("tmpfs", "ramfs"):
        assert code == 0
    else:
        assert code == 3
        assert "which is not in memory" in said
        assert {each.name for each in tmp_path.iterdir()} == {"tmpfs", "noswap", "ramfs", "swaps"}
