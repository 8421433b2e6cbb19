"""What a policy asks of evidence, and whether evidence satisfies it.

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
from keymgmt_broker_service._verify._quotes import Claims, Ready, prepare, verify

__all__ = [
    "AnyPolicy",
    "Claims",
    "Collateral",
    "NotReady",
    "Ready",
    "Refused",
    "SgxPolicy",
    "TdxPolicy",
    "TpmPolicy",
    "load_collateral",
    "prepare",
    "verify",
]
