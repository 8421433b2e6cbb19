"""A development server for keymgmt's Vault backend: ``keymgmt vault dev``."""

from keymgmt_vault_dev._server import DevServer

__all__ = ["DevServer"]
