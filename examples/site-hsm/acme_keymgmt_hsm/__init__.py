"""The keymgmt backend ``acme-hsm``: an HSM of the site, over KMIP."""

from acme_keymgmt_hsm.provider import AcmeHsmProvider, AcmeHsmSettings

__all__ = ["AcmeHsmProvider", "AcmeHsmSettings"]
