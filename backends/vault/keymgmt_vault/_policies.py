"""The least policy for each kind of machine, in HCL; docs/backends/vault.md explains them."""

from __future__ import annotations

from typing import Final

__all__ = ["policy_of"]

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
_ROLES: Final = {
    "seal": ("sealing machine", _USE % "encrypt" + _READ),
    "open": ("edge device", _USE % "decrypt"),
    "rotate": ("rotator", _READ + _RETIRE),
    "publish": ("publisher", _READ + _USE % "sign"),
}


def policy_of(role: str, mount: str, native: str) -> str:
    """The policy of a role for one key; mount and name have matched their grammar."""
    title, rules = _ROLES[role]
    return f"# role: {title}\n" + rules.format(mount=mount, key=native)
