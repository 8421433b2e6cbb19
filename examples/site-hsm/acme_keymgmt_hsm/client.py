"""One KMIP session over mutual TLS: locate a key, encrypt 32 bytes, decrypt them.

PyKMIP does the protocol. Its TLS checks the server's chain and not its name, and takes settings
from files of the user, so connecting is done here.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kmip.core import enums
from kmip.core.factories.attributes import AttributeFactory
from kmip.pie.client import ProxyKmipClient
from kmip.services.kmip_client import KMIPProxy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["BLOCK", "Session", "Version"]

BLOCK: Final = 16
CTR: Final = {
    "cryptographic_algorithm": enums.CryptographicAlgorithm.AES,
    "block_cipher_mode": enums.BlockCipherMode.CTR,
}


@dataclass(frozen=True)
class Version:
    """A key object: ``uid`` is the HSM's word for it; ``created`` is seconds since 1970."""

    uid: str
    created: int
    active: bool


class _Proxy(KMIPProxy):  # type: ignore[misc]
    def __init__(self, host: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        # A section that nobody writes, so that ~/.pykmip says nothing here.
        super().__init__(host=host, port=port, config="keymgmt", ssl_version="PROTOCOL_TLS_CLIENT")
        self.timeout = timeout
        self._context = context

    def _create_socket(self, sock: socket.socket) -> None:
        self.socket = self._context.wrap_socket(sock, server_hostname=self.host)
        self.socket.settimeout(self.timeout)


class Session:
    """One connection, used by one thread at a time; PyKMIP's errors and OSError come out."""

    def __init__(
        self, host: str, port: int, ca: Path, certificate: Path, key: Path, end: float
    ) -> None:
        """Connect before ``end`` (of ``time.monotonic``)."""
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key)
        self._client = ProxyKmipClient(config="keymgmt", ssl_version="PROTOCOL_TLS_CLIENT")
        self._client.proxy = _Proxy(host, port, context, _left(end))
        self._names = AttributeFactory()
        self._client.open()

    def versions(self, name: str, end: float) -> list[Version]:
        """The AES-256 keys of that name, from oldest to newest; none where it is missing."""
        wanted: Sequence[tuple[enums.AttributeType, Any]] = (
            (enums.AttributeType.NAME, name),
            (enums.AttributeType.OBJECT_TYPE, enums.ObjectType.SYMMETRIC_KEY),
            (enums.AttributeType.CRYPTOGRAPHIC_ALGORITHM, enums.CryptographicAlgorithm.AES),
            (enums.AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
        )
        attributes = [self._names.create_attribute(kind, value) for kind, value in wanted]
        found = []
        for uid in self._within(end).locate(attributes=attributes):
            _, values = self._within(end).get_attributes(uid, ["State", "Initial Date"])
            said = {each.attribute_name.value: each.attribute_value.value for each in values}
            active = said.get("State") == enums.State.ACTIVE
            found.append(Version(str(uid), int(said.get("Initial Date", 0)), active))
        return sorted(found, key=lambda each: (each.created, len(each.uid), each.uid))

    def encrypt(self, uid: str, plaintext: memoryview, end: float) -> bytes:
        """Encrypt under a random counter block, which is put in front."""
        counter = os.urandom(BLOCK)
        sealed, _ = self._within(end).encrypt(
            bytes(plaintext), uid=uid, cryptographic_parameters=CTR, iv_counter_nonce=counter
        )
        return counter + bytes(sealed)

    def decrypt(self, uid: str, blob: bytes, end: float) -> bytearray:
        """Reverse ``encrypt``; whatever comes out has not been authenticated."""
        counter, sealed = blob[:BLOCK], blob[BLOCK:]
        return bytearray(
            self._within(end).decrypt(
                sealed, uid=uid, cryptographic_parameters=CTR, iv_counter_nonce=counter
            )
        )

    def _within(self, end: float) -> Any:
        self._client.proxy.socket.settimeout(_left(end))
        return self._client

    def close(self) -> None:
        """Disconnect."""
        self._client.close()

    def abandon(self) -> None:
        """Let go of the connection without a word: in a forked child it is the parent's."""
        proxy = self._client.proxy
        inherited, proxy.socket = proxy.socket, None
        if inherited is not None:
            os.close(inherited.detach())


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time limit is over")
    return left
