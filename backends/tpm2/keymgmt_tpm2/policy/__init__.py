"""The conditions under which a TPM uses a key: PINs, boot states, approvals, counters."""
