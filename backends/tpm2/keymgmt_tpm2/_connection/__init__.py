"""Reaching a TPM: in time, in turn, and what is asked of it."""
