"""Quotes of SGX and TDX, and their collateral, of a root of our own.

A ``World`` is what Intel is for real machines: a root, the authority that certifies processors (PCK
CA), one processor, and who signs TCB info and QE identity. Whoever trusts its root takes its quotes
for genuine, so nothing but tests does. Layouts are those of Intel's "SGX/TDX DCAP Quoting Library
API", appendix A; the certificate's extension is that of "SGX PCK Certificate and Certificate
Revocation List Profile Specification".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MRENCLAVE, MRSIGNER, MR_TD = b"\xe1" * 32, b"\x51" * 32, b"\x7d" * 48
RTMRS = tuple(bytes([0xA0 + index]) * 48 for index in range(4))
QE_SIGNER = "8c" * 32
SVN, PCE_SVN = 5, 11
SIGNING = "Intel SGX TCB Signing"
_OID = "1.2.840.113741.1.13.1"


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def _pair(number: str, value: bytes) -> bytes:
    oid = x509.ObjectIdentifier(f"{_OID}.{number}")
    parts = [int(part) for part in oid.dotted_string.split(".")]
    encoded = bytearray([parts[0] * 40 + parts[1]])
    for part in parts[2:]:
        groups = [part & 0x7F]
        while part := part >> 7:
            groups.insert(0, part & 0x7F | 0x80)
        encoded += bytes(groups)
    return _der(0x30, _der(0x06, bytes(encoded)) + value)


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


class Key:
    """A P-256 key, whose signatures are r and s as SGX has them."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        point = self.private.public_key().public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint
        )
        self.point = point[1:]

    def sign(self, message: bytes) -> bytes:
        r, s = decode_dss_signature(self.private.sign(message, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


class World:
    """A root and one platform below it.

    Args:
        now: when everything was issued an hour ago; the present if None.
        days: how long collateral counts.
        fmspc: kind of platform, 6 bytes.
        flags: what the platform's certificate says: dynamic platform, cached keys, SMT.
        status: state of the platform's TCB, for SGX and for TDX.
        advisories: those of that state.
        evaluation: number of the evaluation of TCB info.
        signer: common name of who signs TCB info and QE identity.
        revoked: which certificates are revoked: "pck", "ca", "signer".
    """

    def __init__(
        self,
        *,
        now: int | None = None,
        days: float = 30,
        fmspc: bytes = bytes.fromhex("00906ed50000"),
        flags: tuple[bool, bool, bool] | None = (True, True, True),
        status: str = "UpToDate",
        advisories: Iterable[str] = (),
        evaluation: int = 17,
        signer: str = SIGNING,
        revoked: Iterable[str] = (),
    ) -> None:
        moment = datetime.now(UTC) if now is None else datetime.fromtimestamp(now, UTC)
        self.start = moment.replace(microsecond=0) - timedelta(hours=1)
        self.end = self.start + timedelta(days=days)
        self.fmspc, self.status, self.advisories = fmspc, status, list(advisories)
        self.evaluation = evaluation
        self._keys = {name: Key() for name in ("root", "ca", "signer", "pck", "attestation")}
        self._names = {
            "root": "Intel SGX Root CA",
            "ca": "Intel SGX PCK Platform CA",
            "signer": signer,
            "pck": "Intel SGX PCK Certificate",
        }
        self._serials = {name: x509.random_serial_number() for name in self._names}
        self.root = self._certificate("root", "root")
        self._ca = self._certificate("ca", "root")
        self._signer = self._certificate("signer", "root")
        self._pck = self._certificate("pck", "ca", self._extension(flags))
        self._revoked = {self._serials[name] for name in revoked}

    # Certificates

    def _name(self, name: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(x509.NameOID.COMMON_NAME, self._names[name]),
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Intel Corporation"),
                x509.NameAttribute(x509.NameOID.COUNTRY_NAME, "US"),
            ]
        )

    def _certificate(
        self, name: str, issuer: str, extension: bytes | None = None
    ) -> x509.Certificate:
        public = self._keys[name].private.public_key()
        authority = name in ("root", "ca")
        usage = dict.fromkeys(
            [
                *("digital_signature", "content_commitment", "key_encipherment"),
                *("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
                *("encipher_only", "decipher_only"),
            ],
            False,
        )
        usage |= dict.fromkeys(
            ("key_cert_sign", "crl_sign") if authority else ("digital_signature",), True
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(self._name(name))
            .issuer_name(self._name(issuer))
            .public_key(public)
            .serial_number(self._serials[name])
            .not_valid_before(self.start - timedelta(days=1))
            .not_valid_after(self.start + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if extension is not None:
            oid = x509.ObjectIdentifier(_OID)
            builder = builder.add_extension(
                x509.UnrecognizedExtension(oid, extension), critical=False
            )
        return builder.sign(self._keys[issuer].private, hashes.SHA256())

    def _extension(self, flags: tuple[bool, bool, bool] | None) -> bytes:
        svns = [_pair(f"2.{index}", _integer(SVN)) for index in range(1, 17)]
        svns += [
            _pair("2.17", _integer(PCE_SVN)),
            _pair("2.18", _der(0x04, bytes([SVN]) * 16)),
        ]
        parts = [
            _pair("1", _der(0x04, b"\x99" * 16)),
            _pair("2", _der(0x30, b"".join(svns))),
            _pair("3", _der(0x04, bytes(2))),
            _pair("4", _der(0x04, self.fmspc)),
            _pair("5", _der(0x0A, b"\x01")),
        ]
        if flags is not None:
            said = [
                _pair(f"7.{index}", _der(0x01, b"\xff" if flag else b"\0"))
                for index, flag in enumerate(flags, 1)
            ]
            parts += [_pair("6", _der(0x04, b"\x66" * 16)), _pair("7", _der(0x30, b"".join(said)))]
        return _der(0x30, b"".join(parts))

    def _crl(self, issuer: str) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name(issuer))
            .last_update(self.start)
            .next_update(self.end)
            .add_extension(x509.CRLNumber(1), critical=False)
        )
        for serial in self._revoked:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(revoked.revocation_date(self.start).build())
        crl = builder.sign(self._keys[issuer].private, hashes.SHA256())
        return crl.public_bytes(Encoding.DER)

    # Collateral

    def collateral(self, kind: str, *, signed_by: str = "signer") -> dict[str, str]:
        """The collateral of this platform for ``sgx`` or ``tdx``, as dcap-qvl writes it.

        ``signed_by`` names another key under the root, and its certificate, as the signer.
        """
        chain = {"signer": [self._signer], "pck": [self._pck, self._ca]}[signed_by]
        parts = [certificate.public_bytes(Encoding.PEM).decode() for certificate in chain]
        root = self.root.public_bytes(Encoding.PEM).decode()
        ca = self._ca.public_bytes(Encoding.PEM).decode()
        made = {
            "pck_crl_issuer_chain": ca + root,
            "root_ca_crl": self._crl("root").hex(),
            "pck_crl": self._crl("ca").hex(),
        }
        for name, content in (("tcb_info", self._tcb(kind)), ("qe_identity", self._qe(kind))):
            text = json.dumps(content, separators=(",", ":"))
            made[f"{name}_issuer_chain"] = "".join(parts) + root
            made[name] = text
            made[f"{name}_signature"] = self._keys[signed_by].sign(text.encode()).hex()
        return made

    def _dates(self) -> dict[str, Any]:
        return {
            "issueDate": _time(self.start),
            "nextUpdate": _time(self.end),
            "tcbEvaluationDataNumber": self.evaluation,
        }

    def _level(self, tcb: dict[str, Any], status: str, advisories: list[str]) -> dict[str, Any]:
        date = _time(self.start - timedelta(days=300))
        level = {"tcb": tcb, "tcbDate": date, "tcbStatus": status}
        return level | ({"advisoryIDs": advisories} if advisories else {})

    def _tcb(self, kind: str) -> dict[str, Any]:
        tcb: dict[str, Any] = {
            "sgxtcbcomponents": [{"svn": SVN}] * 16,
            "pcesvn": PCE_SVN,
        }
        info = {
            "id": kind.upper(),
            "version": 3,
            **self._dates(),
            "fmspc": self.fmspc.hex().upper(),
        }
        info |= {"pceId": "0000", "tcbType": 0}
        if kind == "tdx":
            tcb["tdxtcbcomponents"] = [{"svn": SVN}] + [{"svn": 0}] * 15
            zero = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
            module = self._level({"isvsvn": 3}, "UpToDate", [])
            info["tdxModule"] = zero
            info["tdxModuleIdentities"] = [{"id": "TDX_01", **zero, "tcbLevels": [module]}]
        return info | {"tcbLevels": [self._level(tcb, self.status, self.advisories)]}

    def _qe(self, kind: str) -> dict[str, Any]:
        return {
            "id": "QE" if kind == "sgx" else "TD_QE",
            "version": 2,
            **self._dates(),
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER.upper(),
            "isvprodid": 1,
            "tcbLevels": [self._level({"isvsvn": 8}, "UpToDate", [])],
        }

    def write(self, folder: Path, kinds: Iterable[str] = ("sgx", "tdx")) -> Path:
        """Write the collateral as a service reads it, and ``root.der`` beside the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            path = folder / f"{kind}-{self.fmspc.hex()}.json"
            path.write_text(json.dumps(self.collateral(kind)))
        root = folder.with_name("root.der")
        root.write_bytes(self.root.public_bytes(Encoding.DER))
        return root

    # Quotes

    def sgx(
        self,
        report_data: bytes,
        *,
        mrenclave: bytes = MRENCLAVE,
        mrsigner: bytes = MRSIGNER,
        product: int = 1,
        svn: int = 3,
        debug: bool = False,
    ) -> bytes:
        """A quote of version 3 of an enclave; report data is padded with zeros."""
        body = _enclave(
            report_data, mrenclave, mrsigner, product, svn, attributes=0x05 | 0x02 * debug
        )
        return self._quote(3, 0, body)

    def tdx(
        self,
        report_data: bytes,
        *,
        version: int = 4,
        newer: bool = False,
        mr_td: bytes = MR_TD,
        rtmrs: tuple[bytes, ...] = RTMRS,
        attributes: int = 1 << 28,
    ) -> bytes:
        """A quote of version 4 or 5 of a guest; ``newer`` is a report of TDX 1.5, in version 5."""
        body = bytes([SVN, 1]) + bytes(14)
        body += bytes(48 + 48 + 8) + attributes.to_bytes(8, "little") + bytes(8)
        body += mr_td + bytes(3 * 48) + b"".join(rtmrs) + report_data.ljust(64, b"\0")
        if newer:
            body += bytes([SVN, 1]) + bytes(14) + bytes(48)
        if version == 5:
            head = (3 if newer else 2).to_bytes(2, "little") + len(body).to_bytes(4, "little")
            body = head + body
        return self._quote(version, 0x81, body)

    def _quote(self, version: int, tee: int, body: bytes) -> bytes:
        head = version.to_bytes(2, "little") + b"\x02\0" + tee.to_bytes(4, "little") + bytes(4)
        head += bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        attestation, authentication = self._keys["attestation"], b"\xaa" * 32
        signed = head + body
        bound = hashlib.sha256(attestation.point + authentication).digest()
        signer = bytes.fromhex(QE_SIGNER)
        report = _enclave(bound, bytes(32), signer, 1, 8, attributes=0x15)
        chain = b"".join(
            certificate.public_bytes(Encoding.PEM)
            for certificate in (self._pck, self._ca, self.root)
        )
        inner = report + self._keys["pck"].sign(report)
        inner += len(authentication).to_bytes(2, "little") + authentication
        inner += b"\x05\0" + len(chain).to_bytes(4, "little") + chain
        if version > 3:
            inner = b"\x06\0" + len(inner).to_bytes(4, "little") + inner
        data = attestation.sign(signed) + attestation.point + inner
        return signed + len(data).to_bytes(4, "little") + data


def _enclave(
    report_data: bytes, mrenclave: bytes, mrsigner: bytes, product: int, svn: int, attributes: int
) -> bytes:
    """The 384 bytes of an SGX report's body."""
    body = bytes([SVN]) * 16 + bytes(4) + bytes(28)
    body += attributes.to_bytes(8, "little") + (0xE7).to_bytes(8, "little")
    body += mrenclave + bytes(32) + mrsigner + bytes(96)
    body += product.to_bytes(2, "little") + svn.to_bytes(2, "little") + bytes(60)
    return body + report_data.ljust(64, b"\0")
