"""keymgmt backend ``vault``: the Transit engine of HashiCorp Vault and OpenBao."""

from keymgmt_vault._provider import VaultProvider
from keymgmt_vault._settings import VaultSettings

__all__ = ["VaultProvider", "VaultSettings"]
