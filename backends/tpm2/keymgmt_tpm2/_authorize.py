"""Satisfying the policy of a key in a session, and saying plainly why it does not hold.

The order is the one that the policy was computed in: PolicyPCR, PolicyNV, PolicyAuthorize,
PolicyAuthValue. PCR values are read first, so that a refusal names the PCR that differs and an
approval that fits is chosen; what counts is what the TPM then says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpm2_pytss import constants as c
from tpm2_pytss import types as t

from keymgmt.backend import AccessDenied
from keymgmt_tpm2._approval import Approval
from keymgmt_tpm2._errors import POLICY_NV, TpmError
from keymgmt_tpm2._policy import Approver, Counter, PcrState, Policy, compare
from keymgmt_tpm2._structures import sha256
from keymgmt_tpm2._tpm import Tpm

__all__ = ["authorize"]

_SIGN_HINT = "approve this boot state on the approver's machine: keymgmt tpm policy sign"


def authorize(tpm: Tpm, policy: Policy, approvals: Sequence[Approval], what: str) -> Any:
    """A session in which a key with this policy may be used once.

    Args:
        tpm: connected; nothing transient need be loaded yet.
        policy: of the key.
        approvals: installed ones, of any approver.
        what: the key, for messages.

    Raises:
        AccessDenied: the policy does not hold now; the message names the PCR or the approval.
    """
    if not policy.digest:
        return tpm.session()
    session = tpm.session(policy=True)
    if policy.pcrs:
        _policy_pcr(tpm, session, policy.pcrs, what)
    if policy.approver:
        _use_approval(tpm, session, policy.approver, approvals, what)
    if policy.pin:
        tpm.call("policy_auth_value", session)
    return session


def _policy_pcr(tpm: Tpm, session: Any, wanted: PcrState, what: str) -> None:
    if difference := compare(wanted, tpm.pcrs(wanted.bank, wanted.indices)):
        raise AccessDenied(
            f"{what} is bound to another boot state: {difference}",
            hint="boot into the state it was made in, or open with another group and make a key "
            "with signed policy, which survives updates",
        )
    tpm.call("policy_pcr", session, b"", str(wanted))


def _use_approval(
    tpm: Tpm, session: Any, approver: Approver, approvals: Sequence[Approval], what: str
) -> None:
    ours = [approval for approval in approvals if approval.approver == approver]
    if not ours:
        raise AccessDenied(
            f"{what} wants an approval of the boot state, and none of its approver is installed",
            hint="keymgmt tpm policy install PROVIDER FILE",
        )
    reasons = []
    for approval in ours:
        now = tpm.pcrs(approval.pcrs.bank, approval.pcrs.indices)
        if difference := compare(approval.pcrs, now):
            reasons.append(difference)
            continue
        if reason := _try(tpm, session, approval):
            reasons.append(reason)
            tpm.call("policy_restart", session)
            continue
        return
    shown = " | ".join(dict.fromkeys(reasons[:4]))
    raise AccessDenied(f"no approval for {what} holds now: {shown}", hint=_SIGN_HINT)


def _try(tpm: Tpm, session: Any, approval: Approval) -> str | None:
    tpm.call("policy_pcr", session, b"", str(approval.pcrs))
    if approval.counter and (reason := _policy_nv(tpm, session, approval.counter)):
        return reason
    structure, ref = approval.approver.structure(), approval.approver.ref.encode()
    r, s = approval.rs()
    signature = t.TPMT_SIGNATURE(sigAlg=c.TPM2_ALG.ECDSA)
    signature.signature.ecdsa.hash = c.TPM2_ALG.SHA256
    signature.signature.ecdsa.signatureR = r
    signature.signature.ecdsa.signatureS = s
    key = tpm.load_verifier(structure)
    try:
        digest = sha256(approval.digest, ref)
        ticket = tpm.call("verify_signature", key, digest, signature)
        tpm.call("policy_authorize", session, approval.digest, structure.name, ticket, ref)
    except TpmError as error:
        if error.lost:
            raise
        return f"the TPM refused the approval of {approval} ({error.raw:#x})"
    finally:
        tpm.flush(key)
    return None


def _policy_nv(tpm: Tpm, session: Any, counter: Counter) -> str | None:
    index = tpm.persistent(counter.index)
    if index is None:
        return f"this TPM has no counter {counter.index:#010x}, which the approval names"
    try:
        operation = c.TPM2_EO.UNSIGNED_LE
        tpm.call("policy_nv", index, index, session, counter.operand, operation, 0)
    except TpmError as error:
        if error.code == POLICY_NV:
            return f"the approval is outdated: counter {counter.index:#010x} > {counter.value}"
        raise
    return None
