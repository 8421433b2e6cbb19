"""``keymgmt demo`` as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys


def test_demo_shows_it_all_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "keymgmt.cli", "demo"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for expected in (
        "manifest.json",
        "magika.bin.floe",
        "opens with file:models@1",
        "python 0.99",
        ".so elf ",
        "IntegrityError",
        "CannotUnlock",
        "UntrustedPublisher",
        "ConfigError",
    ):
        assert expected in shown
    assert shown.count("hint:") >= 5
    assert "\\n" not in shown
    assert " NO " not in shown
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
