"""The least that each kind of machine needs, as docs/backends/vault.md has it, in HCL."""

from __future__ import annotations

from typing import Final

__all__ = ["ROLES", "policy"]

_READ: Final = """path "{mount}/keys/{key}" {{
  capabilities = ["read"]
}}
"""
_USE: Final = """path "{mount}/%s/{key}" {{
  capabilities = ["update"]
}}
"""
_RETIRE: Final = """path "{mount}/keys/{key}/rotate" {{
  capabilities = ["update"]
}}
path "{mount}/keys/{key}/config" {{
  capabilities = ["update"]
  allowed_parameters = {{
    "min_decryption_version" = []
  }}
}}
"""
ROLES: Final = {
    "sealing machine": _USE % "encrypt" + _READ,
    "edge device": _USE % "decrypt",
    "rotator": _READ + _RETIRE,
    "publisher": _READ + _USE % "sign",
}


def policy(role: str, mount: str, native: str) -> str:
    """The policy of a role for one key; mount and name have matched their grammar."""
    return f"# role: {role}\n" + ROLES[role].format(mount=mount, key=native)
