"""The findings of ``keymgmt doctor`` about a TPM: its maker, its state, and what opens now."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from keymgmt.backend import ANCHOR_START, AccessDenied, Finding, Health, KeymgmtError
from keymgmt_tpm2._errors import TpmError, translate
from keymgmt_tpm2._lockout import CLEAR, Lockout
from keymgmt_tpm2.policy._anchor import check_anchor
from keymgmt_tpm2.policy._authorize import authorize, check_satisfied
from keymgmt_tpm2.policy._policy import WEAK_HINT

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._keys import TpmKey

__all__ = ["examine"]

_REVISION: Final = 0x102
_MANUFACTURER: Final = 0x105
_VENDOR: Final = range(0x106, 0x10A)
_FIRMWARE: Final = (0x10B, 0x10C)
_SESSIONS_FREE: Final = 0x204
_OBJECTS_FREE: Final = 0x207


def examine(service: Service, key: str | None, round_trip: Callable[[str], None]) -> Health:
    """Every finding of ``KeyProvider.check``; no PIN is sent unless ``key`` is given.

    Args:
        service: the TPM and its key directory.
        key: the key to try, or None to examine all keys.
        round_trip: wraps and unwraps, or signs, with a key.
    """
    findings: list[Finding] = []
    try:
        service.run(
            "looking at the TPM", lambda tpm: findings.extend(_tpm(service, tpm)), pinned=False
        )
        names = service.keys.names() if key is None else [key]
        if key is None and not names:
            service.keys.check_there()
            make = f"create a key with: keymgmt keys create {service.name}:KEY"
            where = f"{service.keys.path}: no keys yet"
            findings.append(Finding("key directory", "warning", where, make))
    except KeymgmtError as error:
        return Health((*findings, Finding.failure("TPM", error)))
    if service.settings.anchor is not None:
        where = service.settings.anchor_index
        try:
            if check_anchor(service) == ANCHOR_START:
                unbound = f"{where}, no file is bound to it yet: an old file would be accepted"
                findings.append(
                    Finding("anchor", "warning", unbound, "the next model that opens binds it")
                )
            else:
                findings.append(Finding("anchor", "ok", f"{where}, as pinned, and can be moved"))
        except KeymgmtError as error:
            findings.append(Finding.failure("anchor", error))
    for name in names:
        try:
            findings.append(_key(service, name, round_trip if key is not None else None))
        except KeymgmtError as error:
            findings.append(Finding.failure(f"key {name}", error))
    return Health(tuple(findings))


def _tpm(service: Service, tpm: Tpm) -> list[Finding]:
    values = tpm.properties()
    vendor = b"".join(values.get(number, 0).to_bytes(4, "big") for number in _VENDOR)
    words = [
        _text(values.get(_MANUFACTURER, 0).to_bytes(4, "big")),
        _text(vendor),
        "firmware " + ".".join(f"{values.get(n, 0):x}" for n in _FIRMWARE),
        f"specification revision {values.get(_REVISION, 0) / 100:.2f}",
        f"through {service.settings.tcti}",
    ]
    return [
        Finding("TPM", "ok", ", ".join(word for word in words if word)),
        _pcr_banks(tpm),
        _root_key(service, tpm),
        _lockout(values),
        _slots(service, values),
        _endorsement(tpm),
    ]


def _text(raw: bytes) -> str:
    return "".join(chr(byte) for byte in raw if 0x20 <= byte < 0x7F).strip()


def _pcr_banks(tpm: Tpm) -> Finding:
    names = tpm.banks()
    listed = ", ".join(names) or "none"
    if "sha256" in names:
        return Finding("PCR banks", "ok", listed)
    hint = "name a bank of these with the PCRs, such as --option pcr=sha384:7"
    return Finding("PCR banks", "warning", listed, hint if names else None)


def _root_key(service: Service, tpm: Tpm) -> Finding:
    settings, name = service.settings, "storage root key"
    try:
        srk = tpm.srk()
        actual = tpm.name_of(srk).hex()
        if settings.srk_name is None:
            detail = f"{settings.srk} is {actual}, and no name is pinned"
            line = f'add to [providers.{service.name}]: srk_name = "{actual}"'
            return Finding(name, "failed", detail, line)
        tpm.check_srk_name(srk)
    except TpmError as error:
        return Finding.failure(name, translate(error, f"nothing at {settings.srk}"))
    except KeymgmtError as error:
        return Finding.failure(name, error)
    return Finding(name, "ok", f"{settings.srk} is {actual}, as pinned")


def _lockout(values: dict[int, int]) -> Finding:
    state = Lockout.of(values)
    detail = f"{state}, lockout authorisation recovers in {state.recovery} s"
    if state.locked:
        hint = f"{state.given_back}; {CLEAR}"
        return Finding("lockout", "failed", f"locked: {detail}; {state.causes}", hint)
    if not state.counted:
        return Finding("lockout", "ok", detail)
    return Finding("lockout", "warning", f"{detail}; {state.causes}", CLEAR)


def _endorsement(tpm: Tpm) -> Finding:
    """The certificates of its endorsement keys that the TPM holds, which enrolment needs."""
    from keymgmt_tpm2.enroll._certificates import load_certificate
    from keymgmt_tpm2.enroll._nv import certificates, read_chain

    name, descriptions, problem = "endorsement key certificate", [], ""
    for profile, content in certificates(tpm):
        try:
            certificate = load_certificate(content)
            issuer, end = certificate.issuer.rfc4514_string(), certificate.not_valid_after_utc
            descriptions.append(f"{profile} by {issuer}, until {end:%Y-%m-%d}")
        except ValueError as error:
            descriptions.append(f"{profile}: {error}")
            problem = "give the certificate that its maker publishes with --ek-certificate"
    if not descriptions:
        text = "none in the TPM: enrolment takes --ek-certificate FILE of the maker"
        return Finding(name, "ok", text)
    if chain := read_chain(tpm):
        descriptions.append(f"with {len(chain)} bytes of the chain")
    return Finding(name, "warning" if problem else "ok", "; ".join(descriptions), problem or None)


def _slots(service: Service, values: dict[int, int]) -> Finding:
    objects, sessions = values.get(_OBJECTS_FREE, 0), values.get(_SESSIONS_FREE, 0)
    manager = "with" if service.settings.resource_managed else "without"
    detail = f"{objects} objects and {sessions} sessions free, {manager} a resource manager"
    if objects < 2 or sessions < 1:
        free = f"free the objects of crashed programs with: keymgmt tpm flush {service.name}"
        return Finding("slots", "warning", detail, free)
    return Finding("slots", "ok", detail)


def _key(service: Service, name: str, round_trip: Callable[[str], None] | None) -> Finding:
    key = service.keys.read(name)
    policy = key.newest.policy
    detail = f"{key.kind}, version {key.newest.version}, policy {policy}"
    start = time.perf_counter()
    if round_trip is None:
        if name in service.refused:
            raise AccessDenied(f"the TPM refused the PIN of {name!r}", hint="correct its source")
        service.run(f"{service.name}:{name}", lambda tpm: _check_policy(service, tpm, key))
        holds = "its policy holds now" + (", the PIN was not tried" if policy.pin else "")
        detail = f"{detail}: {holds}"
    else:
        round_trip(name)
        took = (time.perf_counter() - start) * 1000
        detail = f"{detail}: {key.purpose}s, in {took:.0f} ms"
    if weak := policy.weakness:
        return Finding(f"key {name}", "warning", f"{detail}; {weak}", WEAK_HINT)
    return Finding(f"key {name}", "ok", detail)


def _check_policy(service: Service, tpm: Tpm, key: TpmKey) -> None:
    version = key.newest
    session = tpm.session(policy=bool(version.policy.digest))
    tpm.load(version.public, version.private)
    if version.policy.digest:
        authorize(tpm, session, service, version.policy, f"the key {key.key!r}")
        check_satisfied(tpm, session, version.public.policy)
