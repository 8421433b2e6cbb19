"""Quotes: the boot state that a device's TPM states, and the policy that it must satisfy."""

from keymgmt_tpm2.enroll._certificates import AttestationError
from keymgmt_tpm2.quote._file import Quote
from keymgmt_tpm2.quote._policy import DevicePolicy, Devices

__all__ = ["AttestationError", "DevicePolicy", "Devices", "Quote"]
