"""Collateral: what Intel signs of its platforms, from a folder that another job fills.

A file is what dcap-qvl writes of one kind of platform (``QuoteCollateralV3.to_json``), and says
itself which that is; its name does not matter. The verifier takes TCB info and QE identity that
any key under the root signed, the key of a processor for instance. So collateral never comes from a
client, and who signed it is looked at when the folder is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509
from dcap_qvl import QuoteCollateralV3, QuoteVerifier, parse_quote

from keymgmt.backend import AccessDenied, ConfigError, check_trusted, read_file

__all__ = ["Collateral", "Entry", "NotReady", "Platform", "Refused", "load_collateral"]

MAX_FILE: Final = 4 << 20
_FMSPC: Final = re.compile(r"[0-9A-F]{12}")
_AUTHORITIES: Final = ("processor", "platform")
_SIGNER: Final = "Intel SGX TCB Signing"
_FETCH: Final = "fetch it anew, from Intel's PCS or from your PCCS"


class Refused(AccessDenied):
    """The evidence does not satisfy the policy."""


class NotReady(Refused):
    """The evidence cannot be judged now, by a fault of the service and not of the machine."""


class Platform(NamedTuple):
    """The kind of platform that a piece of collateral is for.

    Attributes:
        kind: ``sgx`` or ``tdx``.
        fmspc: the kind of platform, 12 hex digits.
        ca: which authority certified its processors: ``processor`` or ``platform``.
    """

    kind: str
    fmspc: str
    ca: str

    def __str__(self) -> str:
        return f"{self.kind} {self.fmspc} {self.ca}"


@dataclass(frozen=True)
class Entry:
    """The collateral of one kind of platform.

    Attributes:
        path: its file.
        content: the collateral as the verifier takes it.
        since: the time from which it is valid, in seconds since 1970.
        until: the time at which the first part of it expires, in seconds since 1970.
    """

    path: Path
    content: Any
    since: int
    until: int


@dataclass(frozen=True)
class Collateral:
    """A folder of collateral as it was read.

    Attributes:
        verifier: the verifier, with its root certificate.
        entries: the collateral by platform.
    """

    verifier: Any
    entries: Mapping[Platform, Entry]

    def find(self, platform: Platform, now: int) -> Any:
        """The collateral of a platform; NotReady where none is valid now."""
        entry = self.entries.get(platform)
        if entry is None:
            raise NotReady(f"no collateral of the platform {platform}", hint=_FETCH)
        if not entry.since <= now < entry.until:
            word = "expired" if now >= entry.until else "is of the future: look at the clock"
            raise NotReady(f"the collateral {entry.path.name} {word}", hint=_FETCH)
        return entry.content


def platform_of(quote: bytes) -> Platform:
    """The platform that a quote names; Refused where it is not a quote."""
    try:
        parsed = parse_quote(quote)
        kind, fmspc, ca = parsed.quote_type().lower(), parsed.fmspc().upper(), parsed.ca()
    except ValueError as error:
        raise Refused(f"no quote: {error!s:.200}") from error
    if not _FMSPC.fullmatch(fmspc) or ca not in _AUTHORITIES:
        raise Refused("the quote is of an unknown kind of platform")
    return Platform(kind, fmspc, ca)


def load_collateral(folder: Path, unsafe_root: Path | None = None) -> Collateral:
    """Read a folder of collateral.

    Args:
        folder: of ``*.json``, which others cannot write.
        unsafe_root: certificate in DER that is trusted in place of Intel's root: for tests alone.

    Raises:
        ConfigError: the folder or a file of it is wrong, or signed by another than Intel's signer
            of TCB info; or no file is there.
    """
    check_trusted(folder, label="folder of collateral", private=False)
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError as error:
        raise ConfigError(f"cannot list {folder}: {error.strerror}") from error
    entries: dict[Platform, Entry] = {}
    for path in paths:
        platform, entry = _read(path)
        # Of two files the newer one; a job that writes beside the old file is no fault.
        if platform not in entries or entries[platform].until < entry.until:
            entries[platform] = entry
    if not entries:
        raise ConfigError(f"{folder} holds no collateral", hint=_FETCH)
    if unsafe_root is None:
        return Collateral(QuoteVerifier(), entries)
    root = bytes(read_file(unsafe_root, label="root certificate", limit=MAX_FILE, access="trusted"))
    try:
        x509.load_der_x509_certificate(root)
        return Collateral(QuoteVerifier(root), entries)
    except ValueError as error:
        raise ConfigError(f"{unsafe_root} is no certificate in DER: {error}") from error


def _read(path: Path) -> tuple[Platform, Entry]:
    content = bytes(read_file(path, label="collateral", limit=MAX_FILE, access="trusted"))
    try:
        collateral = QuoteCollateralV3.from_json(content.decode())
        chains = (collateral.tcb_info_issuer_chain, collateral.qe_identity_issuer_chain)
        certificates = [x509.load_pem_x509_certificates(chain.encode()) for chain in chains]
        tcb, qe = json.loads(collateral.tcb_info), json.loads(collateral.qe_identity)
        crls = [x509.load_der_x509_crl(crl) for crl in (collateral.root_ca_crl, collateral.pck_crl)]
        issuer = _common_name(crls[1].issuer)
        # "Intel SGX PCK Processor CA", "Intel SGX PCK Platform CA"
        ca = next(word for word in _AUTHORITIES if word in issuer.lower())
        platform = Platform(tcb["id"].lower(), tcb["fmspc"].upper(), ca)
        ends = [_moment(each["nextUpdate"]) for each in (tcb, qe)]
        ends += [crl.next_update_utc.timestamp() for crl in crls if crl.next_update_utc]
        ends += [each.not_valid_after_utc.timestamp() for chain in certificates for each in chain]
        since = max(_moment(each["issueDate"]) for each in (tcb, qe))
    except (
        *(ValueError, KeyError, TypeError, AttributeError),
        *(StopIteration, RecursionError, IndexError),
    ) as error:
        raise ConfigError(f"{path} is no collateral: {error!r:.200}", hint=_FETCH) from error
    # The verifier takes a block of any name for a certificate, and this reader does not.
    if any(
        chain.count("-----BEGIN") != len(read)
        for chain, read in zip(chains, certificates, strict=True)
    ):
        raise ConfigError(
            f"{path} has something besides certificates in a chain of certificates",
            hint="somebody may have made it: fetch it anew from Intel or from your PCCS",
        )
    for chain in certificates:
        if _common_name(chain[0].subject) != _SIGNER:
            raise ConfigError(
                f"{path} is signed by {_common_name(chain[0].subject)!r:.80}, not by {_SIGNER!r}",
                hint="somebody may have made it: fetch it anew from Intel or from your PCCS",
            )
    return platform, Entry(path, collateral, int(since), int(min(ends)))


def _common_name(name: x509.Name) -> str:
    """The common name; ValueError where there is not exactly one."""
    (attribute,) = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no time zone in {text!r:.40}")
    return moment.timestamp()
