"""Satisfy the policy of a key in a session, or say plainly why it does not hold.

The order is the one that the policy was computed in: an approval (PolicyPCR, PolicyNV,
PolicyAuthorize), then PCRs of the key itself (PolicyPCR), then PolicyAuthValue. PCR values are read
once and first, so that a refusal names the PCR that differs and an approval that fits is chosen;
what counts is what the TPM then says. Approvals are tried one by one: whatever is wrong with one
hides no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpm2_pytss import constants as c
from tpm2_pytss import types as t

from keymgmt.backend import AccessDenied, KeyNotFound
from keymgmt_tpm2._connection.tpm import Tpm
from keymgmt_tpm2._errors import POLICY_NV, TpmError
from keymgmt_tpm2._structures import ecdsa_pair, sha256
from keymgmt_tpm2.policy._approval import BootSignature, Statement
from keymgmt_tpm2.policy._policy import Approver, Counter, PcrState, Policy, compare

__all__ = ["authorize", "ecdsa", "verified"]

_SIGN_HINT = (
    "approve this boot state on the approver's machine: keymgmt tpm policy sign APPROVAL "
    "--key FILE --pcr LIST"
)
_CLOSED = (
    "boot into the state it was made in, or open with another group and make a key with signed "
    "policy, which survives updates"
)


def authorize(
    tpm: Tpm,
    session: Any,
    policy: Policy,
    statements: Sequence[Statement],
    what: str,
    closed: str = _CLOSED,
) -> None:
    """Make a policy session one in which a key with this policy may be used once.

    Args:
        tpm: connected; one transient object may be loaded.
        session: a policy session, or any where the policy is *none*.
        policy: of the key.
        statements: of its approver.
        what: the key, for messages.
        closed: the hint where PCRs of the policy itself have other values.

    Raises:
        AccessDenied: the policy does not hold now; the message names the PCR or the approval.
    """
    present = _Present(tpm, [*statements, *([policy.pcrs] if policy.pcrs else [])])
    if policy.pcrs and (difference := compare(policy.pcrs, present.of(policy.pcrs))):
        raise AccessDenied(
            f"{what} is bound to another boot state: {difference}",
            hint=closed,
        )
    if policy.approver:
        _use_approval(tpm, session, statements, present, what)
    if policy.pcrs:
        tpm.call("policy_pcr", session, b"", str(policy.pcrs))
    if policy.pin:
        tpm.call("policy_auth_value", session)


class _Present:
    """The PCRs that anything asks for, each bank read once; a bank may be missing."""

    def __init__(self, tpm: Tpm, wanted: Sequence[Statement | PcrState]) -> None:
        indices: dict[str, set[int]] = {}
        for each in wanted:
            indices.setdefault(each.bank, set()).update(each.indices)
        self._states: dict[str, PcrState | None] = {}
        for bank, listed in indices.items():
            try:
                self._states[bank] = tpm.pcrs(bank, listed)
            except KeyNotFound:
                self._states[bank] = None

    def of(self, wanted: Statement | PcrState) -> PcrState | None:
        return self._states[wanted.bank]


def _use_approval(
    tpm: Tpm, session: Any, statements: Sequence[Statement], present: _Present, what: str
) -> None:
    if not statements:
        raise AccessDenied(
            f"{what} wants an approval of the boot state, and none of its approver is installed",
            hint="keymgmt tpm policy install PROVIDER FILE",
        )
    reasons: list[str] = []
    for statement in statements:
        reason = statement.difference(present.of(statement)) or _try(tpm, session, statement)
        if reason is None:
            return
        reasons.append(reason)
    shown = " | ".join(list(dict.fromkeys(reasons))[:4])
    raise AccessDenied(f"no approval for {what} holds now: {shown}", hint=_SIGN_HINT)


def _try(tpm: Tpm, session: Any, statement: Statement) -> str | None:
    """Why the TPM refuses the statement, or None where the session now has it."""
    ref = statement.approver.ref.encode()
    try:
        approver = statement.approver
        ticket = verified(tpm, approver, statement.digest + ref, _signature(statement))
        tpm.call("policy_pcr", session, b"", f"{statement.bank}:{_listed(statement)}")
        if statement.counter and (reason := _policy_nv(tpm, session, statement.counter)):
            tpm.call("policy_restart", session)
            return reason
        name = approver.structure().name
        tpm.call("policy_authorize", session, statement.digest, name, ticket, ref)
    except TpmError as error:
        if error.lost or error.fault.passing:
            raise
        tpm.call("policy_restart", session)
        return f"the TPM refused the approval of {statement} ({error.raw:#x})"
    return None


def _listed(statement: Statement) -> str:
    return ",".join(map(str, statement.indices))


def _signature(statement: Statement) -> Any:
    if isinstance(statement, BootSignature):
        signature = t.TPMT_SIGNATURE(sigAlg=c.TPM2_ALG.RSASSA)
        signature.signature.rsassa.hash = c.TPM2_ALG.SHA256
        signature.signature.rsassa.sig = statement.signature
        return signature
    return ecdsa(statement.signature)


def ecdsa(der: bytes) -> Any:
    """A TPMT_SIGNATURE of an ECDSA P-256 signature in DER."""
    signature = t.TPMT_SIGNATURE(sigAlg=c.TPM2_ALG.ECDSA)
    signature.signature.ecdsa.hash = c.TPM2_ALG.SHA256
    r, s = ecdsa_pair(der)
    signature.signature.ecdsa.signatureR = r
    signature.signature.ecdsa.signatureS = s
    return signature


def verified(tpm: Tpm, approver: Approver, message: bytes, signature: Any) -> Any:
    """The TPM's ticket that an approver signed a message."""
    key = tpm.load_verifier(approver.structure())
    try:
        return tpm.call("verify_signature", key, sha256(message), signature)
    finally:
        tpm.flush(key)


def _policy_nv(tpm: Tpm, session: Any, counter: Counter) -> str | None:
    index = tpm.persistent(counter.index)
    if index is None:
        tpm.check_owner_enabled()
        return f"this TPM has no counter {counter.index:#010x}, which the approval names"
    try:
        operation = c.TPM2_EO.UNSIGNED_LE
        tpm.call("policy_nv", index, index, session, counter.operand, operation, 0)
    except TpmError as error:
        if error.code == POLICY_NV:
            return f"the approval is outdated: counter {counter.index:#010x} > {counter.value}"
        if error.lost or error.fault.passing:
            raise
        return f"the counter {counter.index:#010x} cannot be read ({error.raw:#x})"
    return None
