"""keymgmt backend ``pkcs11``: keys in an HSM or token, through PKCS#11."""

from keymgmt_pkcs11._provider import Pkcs11Provider
from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["Pkcs11Provider", "Pkcs11Settings"]
