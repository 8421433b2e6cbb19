"""Seal models for machines you do not control; open them in memory with a key from any service."""

from keymgmt._config import Config, load_config
from keymgmt._harden import harden, unencrypted_swap
from keymgmt._inspect import Inspection, inspect
from keymgmt._mount import mount
from keymgmt._open import SealedModel
from keymgmt._open import open_model as open  # noqa: A004 - keymgmt.open, as in gzip and tarfile
from keymgmt._prove import Verification, unseal, verify
from keymgmt._reseal import reseal
from keymgmt._rewrap import Rewrapped, rewrap
from keymgmt._seal import seal
from keymgmt._sign import sign
from keymgmt._tree import Failure, rewrap_tree
from keymgmt._usage import Usage, usage

__all__ = [
    "Config",
    "Failure",
    "Inspection",
    "Rewrapped",
    "SealedModel",
    "Usage",
    "Verification",
    "harden",
    "inspect",
    "load_config",
    "mount",
    "open",
    "reseal",
    "rewrap",
    "rewrap_tree",
    "seal",
    "sign",
    "unencrypted_swap",
    "unseal",
    "usage",
    "verify",
]
