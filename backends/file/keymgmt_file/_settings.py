"""The config table of a key directory."""

from __future__ import annotations

from keymgmt.backend import ConfigPath, SecretSource, Settings

__all__ = ["FileSettings"]


class FileSettings(Settings):
    """``[providers.NAME]`` with ``backend = "file"``.

    Attributes:
        path: the key directory; relative to the config file.
        passphrase: the source of the passphrase of locked key files; see ``keymgmt file lock``.
    """

    path: ConfigPath
    passphrase: SecretSource | None = None
