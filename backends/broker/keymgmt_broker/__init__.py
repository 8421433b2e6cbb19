"""keymgmt backend ``broker``: a key for this machine alone, against evidence of what runs on it."""

from keymgmt_broker._provider import BrokerProvider
from keymgmt_broker._settings import BrokerSettings

__all__ = ["BrokerProvider", "BrokerSettings"]
