"""The pages on running any program, with the file backend."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("keymgmt_file")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]


def sealed(desk: Any) -> None:
    config = desk.config.parent
    desk.run("mkdir model && printf 'cat\\ndog\\n' > model/labels.txt")
    desk.run(f"mkdir -p {config.parent} && keymgmt init {config}")
    desk.run("keymgmt seal model model.sealed --name resnet50")


def test_the_page(desk):
    sealed(desk)
    desk.run_page("docs/exec.md")


def test_the_page_on_production(desk):
    sealed(desk)
    folder = Path(f"/dev/shm/keymgmt-docs-{os.getpid()}")
    desk.stand_ins = {"/dev/shm/resnet50": str(folder)}
    try:
        desk.run_page("docs/production.md")
        assert (folder / "labels.txt").read_text() == "cat\ndog\n"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_program_that_is_not_executable(desk):
    sealed(desk)
    desk.run("printf '#!/bin/sh\\necho it runs\\n' > program")
    desk.run("keymgmt exec model.sealed -- ./program", code=126)
    desk.follow("keymgmt", "chmod a+x {}")
    assert desk.run("keymgmt exec model.sealed -- ./program").out == "it runs\n"
