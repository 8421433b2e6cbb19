"""A sealed copy of what a test wrote into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from keymgmt._crypto import memory

pytest.importorskip("keymgmt_file")

Seal = Callable[[Callable[[Path], None]], Path]


@pytest.fixture
def seal(site) -> Seal:
    """``seal(write)``: the sealed copy, named ``m``, of what ``write`` puts into a folder."""

    def make(write: Callable[[Path], None]) -> Path:
        shutil.rmtree(site.plain, ignore_errors=True)
        site.plain.mkdir()
        write(site.plain)
        shutil.rmtree(site.root / "m.sealed", ignore_errors=True)
        return site.seal(name="m")

    return make


@pytest.fixture
def wiped(monkeypatch) -> list[int]:
    """The size of each private memory that was wiped in this test."""
    seen: list[int] = []

    def wipe(buffer: memory.PrivateMemory) -> None:
        real(buffer)
        seen.append(len(buffer))

    real = memory.wipe
    monkeypatch.setattr(memory, "wipe", wipe)
    return seen
