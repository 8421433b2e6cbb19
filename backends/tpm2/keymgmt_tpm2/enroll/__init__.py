"""Enrolment: proving that a key is in a genuine TPM, and vouching for it."""
