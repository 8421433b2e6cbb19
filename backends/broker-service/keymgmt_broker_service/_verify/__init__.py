"""The policies for evidence, and the check of evidence against them.

SGX and TDX quotes are verified by dcap-qvl against collateral that lies in a folder; TPM quotes by
keymgmt-tpm2. What is judged here is what the verifier says of a quote, and nothing else of it.
"""

from keymgmt_broker_service._verify._collateral import (
    Collateral,
    NotReady,
    Refused,
    load_collateral,
)
from keymgmt_broker_service._verify._policies import AnyPolicy, SgxPolicy, TdxPolicy, TpmPolicy
from keymgmt_broker_service._verify._quotes import Claims, Judge, Ready, examine, prepare

__all__ = [
    "AnyPolicy",
    "Claims",
    "Collateral",
    "Judge",
    "NotReady",
    "Ready",
    "Refused",
    "SgxPolicy",
    "TdxPolicy",
    "TpmPolicy",
    "examine",
    "load_collateral",
    "prepare",
]
