"""Satisfy the policy of a key in a session, or say plainly why it does not hold.

The order is the one that the policy was computed in: an approval (PolicyPCR, PolicyNV,
PolicyAuthorize), then PCRs of the key itself (PolicyPCR), then PolicyAuthValue. PCR values are read
once and first, so that a refusal names the PCR that differs and an approval that fits is chosen;
what counts is what the TPM then says. Approvals are tried one by one: whatever is wrong with one
hides no other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import AccessDenied, KeyNotFound, ProviderUnavailable
from keymgmt_tpm2._errors import POLICY_FAIL, POLICY_NV, TpmError
from keymgmt_tpm2.policy._approval import AnyApproval, boot_signatures, installed
from keymgmt_tpm2.policy._policy import Counter, PcrState, Policy, compare

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["authorize", "check_satisfied"]

log: Final = logging.getLogger("keymgmt.tpm2")
_SIGN_HINT: Final = (
    "approve this boot state on the approver's machine: keymgmt tpm policy sign APPROVAL "
    "--key FILE --pcr LIST"
)
_CLOSED: Final = (
    "boot into the state it was made in, or open with another group and make a key with signed "
    "policy, which survives updates"
)


def authorize(
    tpm: Tpm, session: Any, service: Service, policy: Policy, label: str, closed: str = _CLOSED
) -> None:
    """Make a policy session one in which a key with this policy may be used once.

    Args:
        tpm: connected; one transient object may be loaded.
        session: a policy session, or any where the policy is *none*.
        service: of the TPM; it says where the approvals of the policy's approver are.
        policy: of the key.
        label: the key, for messages.
        closed: the hint where PCRs of the policy itself have other values.

    Raises:
        AccessDenied: the policy does not hold now; the message names the PCR or the approval.
    """
    approvals = _approvals(service, policy)
    present = _present(tpm, [*approvals, *([policy.pcrs] if policy.pcrs else [])])
    if policy.pcrs and (difference := compare(policy.pcrs, present[policy.pcrs.bank])):
        raise AccessDenied(f"{label} is bound to another boot state: {difference}", hint=closed)
    if policy.approver:
        _use_one(tpm, session, approvals, present, label)
    if policy.pcrs:
        tpm.call("policy_pcr", session, b"", str(policy.pcrs))
    if policy.pin:
        tpm.call("policy_auth_value", session)


def check_satisfied(tpm: Tpm, session: Any, digest: bytes) -> None:
    """TpmError where the TPM would not use a key with this authPolicy in this session."""
    answer = tpm.call("policy_get_digest", session)
    if bytes(answer) != digest:
        raise TpmError(POLICY_FAIL)


def _approvals(service: Service, policy: Policy) -> list[AnyApproval]:
    """Those of its approver: installed ones, and the signatures of the booted kernel."""
    if policy.approver is None:
        return []
    ours = [each for each in installed(service.keys.path) if each.approver == policy.approver]
    try:
        path = service.settings.pcr_signatures
        return [*ours, *(boot_signatures(path, policy.approver) if path else ())]
    except ProviderUnavailable as error:
        if not ours:
            raise
        log.warning("the signatures of the booted kernel cannot be used: %s", error)
        return list(ours)


def _present(tpm: Tpm, bound: Iterable[AnyApproval | PcrState]) -> dict[str, PcrState | None]:
    """The PCRs that any of them names, each bank read once; None for a bank that is missing."""
    indices: dict[str, set[int]] = {}
    for each in bound:
        indices.setdefault(each.bank, set()).update(each.indices)
    states: dict[str, PcrState | None] = {}
    for bank, listed in indices.items():
        try:
            states[bank] = tpm.pcrs(bank, listed)
        except KeyNotFound:
            states[bank] = None
    return states


def _use_one(
    tpm: Tpm,
    session: Any,
    approvals: Sequence[AnyApproval],
    present: Mapping[str, PcrState | None],
    label: str,
) -> None:
    """Put the first approval that holds into the session; AccessDenied where none does."""
    if not approvals:
        raise AccessDenied(
            f"{label} wants an approval of the boot state, and none of its approver is installed",
            hint="keymgmt tpm policy install PROVIDER FILE",
        )
    reasons: list[str] = []
    for approval in approvals:
        reason = approval.difference(present[approval.bank]) or _try(tpm, session, approval)
        if reason is None:
            return
        reasons.append(reason)
    shown = " | ".join(list(dict.fromkeys(reasons))[:4])
    raise AccessDenied(f"no approval for {label} holds now: {shown}", hint=_SIGN_HINT)


def _try(tpm: Tpm, session: Any, approval: AnyApproval) -> str | None:
    """Why the TPM refuses the approval, or None where the session now has it."""
    key, ref = approval.approver.structure(), approval.approver.ref.encode()
    try:
        ticket = tpm.verify(key, approval.digest + ref, approval.signature)
        pcrs = f"{approval.bank}:{','.join(map(str, approval.indices))}"
        tpm.call("policy_pcr", session, b"", pcrs)
        if approval.counter and (reason := _policy_nv(tpm, session, approval.counter)):
            tpm.call("policy_restart", session)
            return reason
        tpm.call("policy_authorize", session, approval.digest, key.name, ticket, ref)
    except TpmError as error:
        if error.lost or error.fault.passing:
            raise
        tpm.call("policy_restart", session)
        return f"the TPM refused the approval of {approval} ({error.raw:#x})"
    return None


def _policy_nv(tpm: Tpm, session: Any, counter: Counter) -> str | None:
    index = tpm.persistent(counter.index)
    if index is None:
        tpm.check_owner_enabled()
        return f"this TPM has no counter {counter.index:#010x}, which the approval names"
    try:
        tpm.policy_nv(session, index, counter.operand)
    except TpmError as error:
        if error.code == POLICY_NV:
            return f"the approval is outdated: counter {counter.index:#010x} > {counter.value}"
        if error.lost or error.fault.passing:
            raise
        return f"the counter {counter.index:#010x} cannot be read ({error.raw:#x})"
    return None
