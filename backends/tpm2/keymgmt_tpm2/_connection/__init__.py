"""The connection to a TPM: one operation at a time, each within a time limit."""
