"""A PyKMIP server with TLS: its own authority, a database of its own, stopped with its children."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acme_keymgmt_hsm import AcmeHsmProvider, AcmeHsmSettings
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from kmip.core import enums
from kmip.pie.client import ProxyKmipClient

START = """
import sys
from kmip.services.server import server
sys.argv = ["pykmip-server", "-f", sys.argv[1], "-l", sys.argv[2]]
server.main()
"""


class Authority:
    """A certificate authority that issues to files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._folder = folder
        self.file = folder / f"{name}.pem"
        builder = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        usage = dict.fromkeys(
            [
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ],
            False,
        )
        builder = builder.add_extension(
            x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True
        )
        self.file.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def _builder(
        self, name: x509.Name, public: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )

    def issue(
        self, name: str, *, server: bool = False, host: str = "localhost"
    ) -> tuple[Path, Path]:
        """A certificate and its private key (0600)."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key()).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if server:
            names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate, private = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        private.touch(0o600)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private


class Hsm:
    """A PyKMIP server on a free port, its certificates, and what may befall it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder, "acme-ca")
        self.client = self.authority.issue("line7")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        certificate, key = self.authority.issue("hsm", server=True)
        (folder / "policy").mkdir()
        (folder / "server.conf").write_text(
            f"""[server]
hostname=127.0.0.1
port={self.port}
certificate_path={certificate}
key_path={key}
ca_path={self.authority.file}
auth_suite=TLS1.2
policy_path={folder / "policy"}
enable_tls_client_auth=True
database_path={folder / "keys.db"}
"""
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it or let it go on, and wait until it listens."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGCONT)
            return
        with (self.folder / "out").open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, self.folder / "server.conf", self.folder / "log"],
                stdout=out,
                stderr=out,
                cwd=self.folder,
                # Its manager process outlives it, so all of it is one group.
                start_new_session=True,
            )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((self.folder / "out").read_text()) from None
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """End it and its children at once."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def hang(self) -> None:
        """Let it take connections and answer nothing."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def settings(self, **other: object) -> AcmeHsmSettings:
        certificate, key = self.client
        given = {
            "host": "localhost",
            "port": self.port,
            "ca_file": self.authority.file,
            "certificate": certificate,
            "private_key": key,
            "timeout": 5.0,
        }
        return AcmeHsmSettings.model_validate(given | other)

    def provider(self, **other: object) -> AcmeHsmProvider:
        return AcmeHsmProvider("site", self.settings(**other))

    def console(self) -> ProxyKmipClient:
        """What the HSM's operator types at."""
        certificate, key = self.client
        return ProxyKmipClient(
            hostname="127.0.0.1",
            port=self.port,
            cert=str(certificate),
            key=str(key),
            ca=str(self.authority.file),
            ssl_version="PROTOCOL_TLSv1_2",
            config="nothing",
        )

    def make_key(self, name: str) -> str:
        masks = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
        with self.console() as console:
            uid = console.create(
                enums.CryptographicAlgorithm.AES, 256, name=name, cryptographic_usage_mask=masks
            )
            console.activate(uid)
        return str(uid)

    def revoke(self, uid: str) -> None:
        with self.console() as console:
            console.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hsm]:
    hsm = Hsm(tmp_path_factory.mktemp("hsm"))
    try:
        hsm.start()
        for name in ("kit", "other"):
            hsm.make_key(name)
        yield hsm
    finally:
        hsm.start()
        hsm.stop()
