"""Seal models for machines you do not control; open them in memory with a key from any service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from keymgmt import errors as errors
    from keymgmt._config.config import Config, load_config, load_settings
    from keymgmt._mount.mount import mount
    from keymgmt._mount.private import private_folder
    from keymgmt._system.harden import harden
    from keymgmt._system.swap import unencrypted_swap
    from keymgmt._verbs.find_models import Failure
    from keymgmt._verbs.inspect import Inspection, inspect
    from keymgmt._verbs.open import SealedModel
    from keymgmt._verbs.open import open_model as open  # noqa: A004 - keymgmt.open, as in gzip and tarfile
    from keymgmt._verbs.pull import Pulled, pull
    from keymgmt._verbs.push import Pushed, push
    from keymgmt._verbs.reseal import reseal
    from keymgmt._verbs.retire import Need, needs
    from keymgmt._verbs.rewrap import Rewrapped, rewrap
    from keymgmt._verbs.rewrap_groups import GroupChange
    from keymgmt._verbs.rewrap_tree import rewrap_tree
    from keymgmt._verbs.seal import seal
    from keymgmt._verbs.sign import sign
    from keymgmt._verbs.tree_verbs import Done, reseal_tree, sign_tree, verify_tree
    from keymgmt._verbs.unseal import unseal
    from keymgmt._verbs.usage import Usage, usage
    from keymgmt._verbs.verify import Verification, verify
    from keymgmt.sealed.manifest import FileEntry, Manifest

    __version__: str

__all__ = [
    "Config",
    "Done",
    "Failure",
    "FileEntry",
    "GroupChange",
    "Inspection",
    "Manifest",
    "Need",
    "Pulled",
    "Pushed",
    "Rewrapped",
    "SealedModel",
    "Usage",
    "Verification",
    "__version__",
    "harden",
    "inspect",
    "load_config",
    "load_settings",
    "mount",
    "needs",
    "open",
    "private_folder",
    "pull",
    "push",
    "reseal",
    "reseal_tree",
    "rewrap",
    "rewrap_tree",
    "seal",
    "sign",
    "sign_tree",
    "unencrypted_swap",
    "unseal",
    "usage",
    "verify",
    "verify_tree",
]

# The module of each name. A module is imported when one of its names is first used. So the command
# line shows its help and completes words without importing cryptography, and Ctrl-C in the first
# moments, before its `main` can handle that, does not print a traceback of slow imports.
_HOMES: Final = {
    "_config.config": ("Config", "load_config", "load_settings"),
    "_mount.mount": ("mount",),
    "_mount.private": ("private_folder",),
    "_system.harden": ("harden",),
    "_system.swap": ("unencrypted_swap",),
    "_verbs.find_models": ("Failure",),
    "_verbs.inspect": ("Inspection", "inspect"),
    "_verbs.open": ("SealedModel", "open"),
    "_verbs.pull": ("Pulled", "pull"),
    "_verbs.push": ("Pushed", "push"),
    "_verbs.reseal": ("reseal",),
    "_verbs.retire": ("Need", "needs"),
    "_verbs.rewrap": ("Rewrapped", "rewrap"),
    "_verbs.rewrap_groups": ("GroupChange",),
    "_verbs.rewrap_tree": ("rewrap_tree",),
    "_verbs.seal": ("seal",),
    "_verbs.sign": ("sign",),
    "_verbs.tree_verbs": ("Done", "reseal_tree", "sign_tree", "verify_tree"),
    "_verbs.unseal": ("unseal",),
    "_verbs.usage": ("Usage", "usage"),
    "_verbs.verify": ("Verification", "verify"),
    "sealed.manifest": ("FileEntry", "Manifest"),
}


if not TYPE_CHECKING:  # with __getattr__, a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name == "__version__":  # read only when asked for, since that takes time too
            from importlib.metadata import version

            globals()[name] = version(__name__)
            return globals()[name]
        if name == "errors":
            return import_module("keymgmt.errors")
        for module, names in _HOMES.items():
            if name in names:
                home = import_module(f"keymgmt.{module}")
                globals()[name] = getattr(home, "open_model" if name == "open" else name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
