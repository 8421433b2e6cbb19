"""The sealed-model format, as SPEC.md says it: bytes to objects and back, without any key service.

``manifest`` what is in a model, ``keys`` who may open it, ``signatures`` who made it, ``digests``
and ``payload`` the encrypted files, ``folder`` where all of it lies.
"""
