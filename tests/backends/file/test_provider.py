"""The file backend keeps the contract: with symmetric keys, with HPKE keys, and when locked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from keymgmt_file import FileProvider

from keymgmt.testing import Hook, ProviderContract, ProviderFactory

Open = Callable[..., FileProvider]


class FileContract(ProviderContract):
    """What all of them share: the service is a directory, which may be moved away."""

    kind = "aes256"
    passphrase: str | None = None

    @pytest.fixture
    def provider_factory(self, open_store, path) -> ProviderFactory:
        path.mkdir(mode=0o700)
        return lambda: open_store(self.passphrase)

    @pytest.fixture
    def wrap_key(self, provider_factory) -> str:
        files = provider_factory()
        assert isinstance(files, FileProvider)
        files.create_key("kit", self.kind, {})
        files.close()
        return "kit"

    @pytest.fixture
    def recipient_key(self, provider_factory) -> str:
        files = provider_factory()
        assert isinstance(files, FileProvider)
        files.create_key("kit-device", "hpke-x25519" if self.kind == "aes256" else self.kind, {})
        files.close()
        return "kit-device"

    @pytest.fixture
    def break_service(self, path) -> Hook:
        return lambda: path.rename(path.with_name("unplugged")) and None

    @pytest.fixture
    def heal_service(self, path) -> Hook:
        def heal() -> None:
            if not path.exists():
                path.with_name("unplugged").rename(path)

        return heal


class TestFile(FileContract):
    """Symmetric keys."""


class TestFileP256(FileContract):
    kind = "hpke-p256"


class TestFileX25519(FileContract):
    kind = "hpke-x25519"


class TestFileHybrid(FileContract):
    kind = "hpke-mlkem768-x25519"


class TestFileLocked(FileContract):
    """Key files under a passphrase."""

    passphrase = "correct horse battery staple"

    @pytest.fixture
    def denied_factory(self, open_store) -> ProviderFactory:
        return lambda: open_store("another passphrase")

    @pytest.fixture
    def secret_values(self) -> Sequence[bytes]:
        return [b"correct horse battery staple"]
