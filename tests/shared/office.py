"""Who enrols devices and who approves boot states, as keys in the test; and what a device boots."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._policy import Approver

from keymgmt.backend import Signature, recipient_message, signatures_file


class Signer:
    """A key of an office or of an approver."""

    def __init__(self, path) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key()
        self.der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.pem = path
        path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message, ec.ECDSA(hashes.SHA256()))

    def state(self, recipient, file, *, attested=True) -> None:
        """Write a recipient file with a signature beside it."""
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(recipient.to_bytes())
        signature = self.sign(recipient_message(recipient, attested=attested))
        signed = signatures_file([Signature(signature, self.der)])
        file.with_name(f"{file.name}.sig").write_bytes(signed)

    def approve(self, state, counter=None) -> Approval:
        approver = Approver(self.der)
        message = Approval.message(state, counter, approver)
        return Approval(state, counter, approver, self.sign(message))


def boot(genuine, *measured: tuple[int, bytes]) -> None:
    """Measure events into the TPM as firmware does."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    def extend(tpm):
        for index, data in measured:
            digest = t.TPMT_HA(hashAlg=c.TPM2_ALG.SHA256)
            digest.digest.sha256 = hashlib.sha256(data).digest()
            listed = t.TPML_DIGEST_VALUES([digest])
            tpm.call("pcr_extend", c.ESYS_TR.parse(f"pcr{index}"), listed)

    genuine.service.run("measuring", extend)
