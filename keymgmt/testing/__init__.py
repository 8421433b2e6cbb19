"""The conformance kit for key providers: ``pip install "keymgmt[testing]"``.

``ProviderContract`` is a class of pytest tests; a backend supplies fixtures and inherits the rest.
``keymgmt plugin check NAME`` runs it against a configured provider, without a test file.
``keymgmt.testing.fakes`` has a key service in memory for other tests.
"""

from keymgmt.testing._contract import ProviderContract
from keymgmt.testing._fixtures import ContractFixtures, Hook, NewKey, ProviderFactory
from keymgmt.testing._hostile import HOSTILE_KEY_NAMES

__all__ = [
    "HOSTILE_KEY_NAMES",
    "ContractFixtures",
    "Hook",
    "NewKey",
    "ProviderContract",
    "ProviderFactory",
]
