"""Check evidence against a policy."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from dcap_qvl import QuotePolicy
from keymgmt_tpm2.quote import AttestationError, Devices, Quote

from keymgmt.backend import FormatError
from keymgmt_broker_service._verify._collateral import Collateral, NotReady, Refused, platform_of
from keymgmt_broker_service._verify._policies import (
    RTMRS,
    PlatformPolicy,
    SgxPolicy,
    TdxPolicy,
    TpmPolicy,
)

__all__ = ["Claims", "Judge", "Ready", "examine", "prepare"]

Ready: TypeAlias = SgxPolicy | TdxPolicy | Devices
"""A policy with what its files say."""
Judge: TypeAlias = Callable[[Any], "Claims"]
"""Judges evidence by a policy of its kind, as ``prepare`` gives it; raises Refused."""

R = TypeVar("R")
_REPORT_DATA: Final = 64
_FLAGS: Final = {
    "smt": "smt_enabled",
    "dynamic_platform": "dynamic_platform",
    "cached_keys": "cached_keys",
}
_DEBUG: Final = 0x02
_INIT: Final = 0x01


@dataclass(frozen=True)
class Claims:
    """What accepted evidence says.

    Attributes:
        kind: the kind of evidence.
        facts: what it states, in short public words for the audit log.
    """

    kind: str
    facts: Mapping[str, str]


def prepare(policy: SgxPolicy | TdxPolicy | TpmPolicy) -> Ready:
    """Prepare a policy for a ``Judge``; ConfigError where a file that it names is wrong."""
    return Devices.read(policy) if isinstance(policy, TpmPolicy) else policy


def examine(
    evidence: bytes, report_data: bytes, kind: str, collateral: Collateral | None, now: int
) -> Judge:
    """Verify evidence as far as that is the same for every policy, which then may judge it.

    Args:
        evidence: as a machine sent it.
        report_data: the 32 bytes that the evidence must contain.
        kind: the kind of evidence: ``sgx``, ``tdx`` or ``tpm2``.
        collateral: of Intel's platforms; None in a service that knows TPMs alone.
        now: seconds since 1970.

    Raises:
        Refused: it is not of this kind or request, or not genuine.
        NotReady: collateral is missing or expired.
    """
    if kind == "tpm2":
        quote = _proved(lambda: Quote.verify(evidence, report_data))
        return lambda devices: Claims(kind, _proved(lambda: devices.judge(quote)))
    if collateral is None:
        raise NotReady("the service has no folder of collateral")
    platform = platform_of(evidence)
    if platform.kind != kind:
        raise Refused(f"a quote of {platform.kind} and not of {kind}")
    content = collateral.find(platform, now)
    try:
        result = collateral.verifier.verify_with_policy(
            evidence, content, now, QuotePolicy.claims_only(now)
        )
    except ValueError as error:
        raise Refused(f"{error!s:.300}") from error
    claims = json.loads(result.to_json())
    report = _report(claims["report"], kind)
    wanted = report_data.ljust(_REPORT_DATA, b"\0")
    if not hmac.compare_digest(bytes.fromhex(report["report_data"]), wanted):
        raise Refused("the quote is of another request")
    return lambda policy: _machine(kind, claims, report, policy)


def _proved(check: Callable[[], R]) -> R:
    """The result of a check of a TPM's statement; Refused where it refuses."""
    try:
        return check()
    except (AttestationError, FormatError) as error:
        raise Refused(str(error)) from error


def _machine(
    kind: str, claims: Mapping[str, Any], report: Mapping[str, Any], policy: SgxPolicy | TdxPolicy
) -> Claims:
    platform = _platform(claims, policy)
    if isinstance(policy, SgxPolicy):
        return Claims(kind, _enclave(report, policy) | platform)
    return Claims(kind, _guest(report, policy) | platform)


def _report(reports: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The quote's report on the enclave or guest; Refused for an unknown kind of report."""
    ((name, report),) = reports.items()
    if (kind, name) in (("sgx", "SgxEnclave"), ("tdx", "TD10")):
        return dict(report)
    if (kind, name) == ("tdx", "TD15"):
        return dict(report["base"])
    raise Refused(f"a report of the unknown kind {name!r:.40}")


def _platform(claims: Mapping[str, Any], policy: PlatformPolicy) -> dict[str, str]:
    """Check the platform; returns facts for the log."""
    tcb, pck = claims["tcb"], claims["platform"]["pck"]
    state, advisories = tcb["status"], tcb["advisory_ids"]
    listed = ", ".join(advisories)
    if state not in policy.tcb:
        raise Refused(f"the platform's TCB is {state} ({listed or 'no advisory'})")
    if state != "UpToDate" and (more := set(advisories) - set(policy.advisories)):
        raise Refused(f"the platform's TCB is {state}, by {', '.join(sorted(more))} too")
    number = min(tcb["eval_data_number"], claims["qe"]["tcb_eval_data_number"])
    if number < policy.evaluation:
        raise Refused(f"the collateral is of evaluation {number}, before {policy.evaluation}")
    for flag in policy.refuse:
        if pck[_FLAGS[flag]] != "False":
            raise Refused(f"the platform has {flag}, or does not say")
    said = {"tcb": state, "fmspc": bytes(pck["fmspc"]).hex()}
    return said | ({"advisories": listed} if listed else {})


def _enclave(report: Mapping[str, Any], policy: SgxPolicy) -> dict[str, str]:
    first = bytes.fromhex(report["attributes"])[0]
    if first & _DEBUG or not first & _INIT:
        raise Refused("a debug enclave")
    enclave, signer = report["mr_enclave"], report["mr_signer"]
    product, svn = report["isv_prod_id"], report["isv_svn"]
    if policy.mrenclave and enclave not in policy.mrenclave:
        raise Refused(f"the enclave is {enclave}, which is none of mrenclave")
    if policy.mrsigner is not None:
        if (signer, product) != (policy.mrsigner, policy.product):
            raise Refused(f"the enclave is product {product} of the signer {signer}")
        if policy.minimum_svn is None or svn < policy.minimum_svn:
            raise Refused(f"the enclave's SVN is {svn}, less than {policy.minimum_svn}")
    return {"mrenclave": enclave, "mrsigner": signer, "product": str(product), "svn": str(svn)}


def _guest(report: Mapping[str, Any], policy: TdxPolicy) -> dict[str, str]:
    # TUD, the first byte: with any bit of it the guest is untrusted for debugging.
    if bytes.fromhex(report["td_attributes"])[0]:
        raise Refused("a guest that can be debugged")
    wanted = {
        "mr_td": policy.mr_td,
        "td_attributes": policy.attributes,
        "mr_seam": policy.mr_seam,
        **{name.replace("rtmr", "rt_mr"): getattr(policy, name) for name in RTMRS},
    }
    for name, values in wanted.items():
        if values and report[name] not in values:
            raise Refused(f"{name} is {report[name]}, which the policy does not list")
    return {name: report[name] for name in wanted}
