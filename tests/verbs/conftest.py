from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keymgmt import Config, seal
from keymgmt._verify import PublicKey

FILES = {
    "model.xml": b"<net/>" * 100,
    "model.bin": bytes(range(256)) * 10_000,
    "sub/empty": b"",
}


@dataclass
class Site:
    """A folder with a file provider, two publishers, a plain model, and ways to make configs."""

    root: Path
    policy: dict[str, Any]

    def config(self, **policy: Any) -> Config:
        data = {
            "providers": {"local": {"backend": "file", "path": str(self.root / "keys")}},
            "policy": self.policy | policy,
            "seal": {"sign": "local:publisher"},
        }
        return Config(data, path=self.root / "keymgmt.toml")

    @property
    def provider(self) -> Any:
        return self.config().provider("local")

    @property
    def plain(self) -> Path:
        return self.root / "model"

    def seal(self, *to: str, target: str = "m.sealed", **options: Any) -> Path:
        path = self.root / target
        options = {"keys": self.config()} | options
        seal(self.plain, path, to=to or ["local:a"], **options)
        return path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "keys").mkdir(mode=0o700)
    made = Site(tmp_path, {"publishers": {"pub.pem": ["*"]}})
    for name, content in FILES.items():
        file = made.plain / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    provider = made.config().provider("local")
    for key in "abc":
        provider.create_key(key, "aes256", {})
    for key in ("publisher", "stranger"):
        provider.create_key(key, "ed25519", {})
        pem = "pub.pem" if key == "publisher" else "stranger.pem"
        (tmp_path / pem).write_bytes(PublicKey(provider.public_key(key)).to_pem())
    return made


@pytest.fixture
def tree_of(site: Site) -> Any:
    """The content of every file below a folder, to see that nothing changed."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(Path(parent, name).relative_to(folder)): Path(parent, name).read_bytes()
            for parent, _, names in os.walk(folder)
            for name in names
        }

    return read
