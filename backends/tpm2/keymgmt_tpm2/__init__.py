"""keymgmt backend for TPM 2.0: keys bound to this device and its boot state."""

from keymgmt_tpm2._provider import Tpm2Provider
from keymgmt_tpm2._settings import Tpm2Settings

__all__ = ["Tpm2Provider", "Tpm2Settings"]
