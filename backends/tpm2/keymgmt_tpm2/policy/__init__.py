"""What a key asks for before the TPM uses it: PINs, boot states, approvals of them, counters."""
