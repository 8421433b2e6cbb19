"""``keymgmt demo`` as a person runs it."""

from __future__ import annotations

import os

from programs import run_keymgmt


def test_demo_shows_it_all_and_leaves_nothing(tmp_path):
    done = run_keymgmt(
        "demo", env={**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for expected in (
        "manifest.json",
        "magika.bin.floe",
        "1 file:models@1",
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
