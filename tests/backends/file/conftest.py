"""A key directory of its own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from keymgmt_file import FileProvider, FileSettings

from keymgmt.backend import SecretSource

Open = Callable[..., FileProvider]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def open_store(path, tmp_path) -> Iterator[Open]:
    """Make providers: ``open_store(passphrase="...", at=another_directory)``."""
    made: list[FileProvider] = []

    def make(passphrase: str | None = None, at: Path | None = None) -> FileProvider:
        source = None
        if passphrase is not None:
            file = tmp_path / f"passphrase-{len(made)}"
            file.touch(mode=0o600)
            file.write_text(passphrase + "\n")
            source = SecretSource(file=file)
        made.append(FileProvider("local", FileSettings(path=at or path, passphrase=source)))
        return made[-1]

    yield make
    for provider in made:
        provider.close()


@pytest.fixture
def files(open_store) -> FileProvider:
    return open_store()


@pytest.fixture
def cheap(monkeypatch) -> None:
    """New passphrase files get Argon2id parameters that take no time, and protect nothing."""
    monkeypatch.setattr("keymgmt_file._passphrase.NEW_KDF", (8, 1, 1))
