"""What ``keymgmt doctor`` says of a TPM: who made it, what it holds, what opens now and why not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from keymgmt.backend import AccessDenied, Dek, Finding, Health, KeymgmtError, UnwrapFailed
from keymgmt_tpm2 import _approval
from keymgmt_tpm2._errors import TpmError, translate
from keymgmt_tpm2._service import lockout_state

if TYPE_CHECKING:
    from keymgmt_tpm2._keys import TpmKey, TpmKeyVersion
    from keymgmt_tpm2._provider import Tpm2Provider
    from keymgmt_tpm2._tpm import Tpm

__all__ = ["examine"]

_REVISION: Final = 0x102
_MANUFACTURER: Final = 0x105
_VENDOR: Final = range(0x106, 0x10A)
_FIRMWARE: Final = (0x10B, 0x10C)
_SESSIONS_FREE: Final = 0x204
_OBJECTS_FREE: Final = 0x207
_RECOVERY: Final = 0x211
_BANKS: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}


def examine(provider: Tpm2Provider, key: str | None) -> Health:
    """Every finding of ``KeyProvider.check``; no PIN is sent unless ``key`` is given."""
    findings: list[Finding] = []
    try:
        provider.service.run(
            "looking at the TPM", lambda tpm: findings.extend(_tpm(provider, tpm)), pinned=False
        )
        names = provider.keys.names() if key is None else [key]
        if key is None and not names:
            make = f"make one with: keymgmt keys create {provider.name}:KEY"
            where = f"{provider.key_directory}: no keys yet"
            findings.append(Finding("key directory", "warning", where, make))
    except KeymgmtError as error:
        return Health((*findings, _failed("TPM", error)))
    for name in names:
        try:
            findings.append(_key(provider, name, round_trip=key is not None))
        except KeymgmtError as error:
            findings.append(_failed(f"key {name}", error))
    return Health(tuple(findings))


def _failed(name: str, error: KeymgmtError) -> Finding:
    return Finding(name, "failed", str(error), error.hint)


def _tpm(provider: Tpm2Provider, tpm: Tpm) -> list[Finding]:
    values = tpm.properties()
    vendor = b"".join(values.get(number, 0).to_bytes(4, "big") for number in _VENDOR)
    words = [
        _text(values.get(_MANUFACTURER, 0).to_bytes(4, "big")),
        _text(vendor),
        "firmware " + ".".join(f"{values.get(n, 0):x}" for n in _FIRMWARE),
        f"specification revision {values.get(_REVISION, 0) / 100:.2f}",
        f"through {provider.settings.tcti}",
    ]
    return [
        Finding("TPM", "ok", ", ".join(word for word in words if word)),
        _pcr_banks(tpm),
        _root_key(provider, tpm),
        _lockout(tpm, values),
        _slots(provider, values),
    ]


def _text(raw: bytes) -> str:
    return "".join(chr(byte) for byte in raw if 0x20 <= byte < 0x7F).strip()


def _pcr_banks(tpm: Tpm) -> Finding:
    from tpm2_pytss import constants as c

    answer = tpm.call("get_capability", c.TPM2_CAP.PCRS, 0, 16)
    capability = answer[1]
    data = capability.data
    assigned = data.assignedPCR
    names = []
    for position in range(len(assigned)):
        selection = assigned[position]
        if any(bytes(selection.pcrSelect)):
            number = int(selection.hash)
            names.append(_BANKS.get(number, f"{number:#06x}"))
    listed = ", ".join(names) or "none"
    return Finding("PCR banks", "ok" if "sha256" in names else "warning", listed)


def _root_key(provider: Tpm2Provider, tpm: Tpm) -> Finding:
    settings, name = provider.settings, "storage root key"
    handle = tpm.persistent(settings.srk_handle)
    if handle is None:
        make = f"make it with: keymgmt tpm setup {provider.name} --create"
        return Finding(name, "failed", f"nothing at {settings.srk}", make)
    found = tpm.name_of(handle).hex()
    if settings.srk_name is None:
        line = f'add to [providers.{provider.name}]: srk_name = "{found}"'
        return Finding(name, "failed", f"{settings.srk} is {found}, and no name is pinned", line)
    if found != settings.srk_name:
        return Finding(
            name,
            "failed",
            f"{settings.srk} is {found}, and the config pins {settings.srk_name}",
            "this is another TPM, it was cleared, or something stands between",
        )
    return Finding(name, "ok", f"{settings.srk} is {found}, as pinned")


def _lockout(tpm: Tpm, values: dict[int, int]) -> Finding:
    counted, limit, interval, locked = lockout_state(tpm)
    recovery = values.get(_RECOVERY, 0)
    detail = (
        f"{counted} of {limit} wrong tries counted, one given back every {interval} s, "
        f"lockout authorisation recovers in {recovery} s"
    )
    if locked:
        return Finding(
            "lockout",
            "failed",
            f"locked: {detail}",
            "wait, or reset it as the owner: tpm2_dictionarylockout --clear-lockout",
        )
    return Finding("lockout", "warning" if counted else "ok", detail)


def _slots(provider: Tpm2Provider, values: dict[int, int]) -> Finding:
    from keymgmt_tpm2._connection import is_resource_managed

    objects, sessions = values.get(_OBJECTS_FREE, 0), values.get(_SESSIONS_FREE, 0)
    managed = is_resource_managed(provider.settings.tcti)
    detail = f"{objects} objects and {sessions} sessions free, " + (
        "with a resource manager" if managed else "without a resource manager"
    )
    if objects < 2 or sessions < 1:
        free = f"keymgmt tpm flush {provider.name} frees what crashed programs left"
        return Finding("slots", "warning", detail, free)
    return Finding("slots", "ok", detail)


def _key(provider: Tpm2Provider, name: str, *, round_trip: bool) -> Finding:
    info = provider.describe_key(name)
    key = provider.keys.read(name)
    policy = key.newest.policy
    said = f"{info.kind}, version {info.newest}, policy {policy}"
    start = time.perf_counter()
    if not round_trip:
        if provider.service.refused_before(name):
            raise AccessDenied(f"the TPM refused the PIN of {name!r}", hint="correct its source")
        provider.service.run(f"{provider.name}:{name}", lambda tpm: _holds(provider, tpm, key))
        asked = "its policy holds now" + (", the PIN was not tried" if policy.pin else "")
        return Finding(f"key {name}", "ok", f"{said}: {asked}")
    if info.purpose == "sign":
        provider.sign(name, b"keymgmt check")
    else:
        with Dek.generate() as dek, provider.unwrap(provider.wrap(name, dek, b""), b"") as again:
            if dek != again:
                raise UnwrapFailed(f"the key {name!r} does not give back what it wrapped")
    took = (time.perf_counter() - start) * 1000
    return Finding(f"key {name}", "ok", f"{said}: {info.purpose}s, in {took:.0f} ms")


def _holds(provider: Tpm2Provider, tpm: Tpm, key: TpmKey) -> None:
    from keymgmt_tpm2._authorize import authorize

    version: TpmKeyVersion = key.newest
    approvals = _approval.installed(provider.key_directory)
    session = authorize(tpm, version.policy, approvals, f"the key {key.key!r}")
    if version.policy.digest:
        answer = tpm.call("policy_get_digest", session)
        if bytes(answer) != version.public.policy:
            raise translate(TpmError(0x99D), f"the key {key.key!r}")
    tpm.load(version.public, version.private)
