"""Quotes: what a device's TPM states of its boot state, and whether that is what is wanted."""

from keymgmt_tpm2.enroll._certificates import AttestationError
from keymgmt_tpm2.quote._policy import DevicePolicy, Devices

__all__ = ["AttestationError", "DevicePolicy", "Devices"]
