"""Checks of a TCTI (the path to a TPM) before it is used, and the import of libtss2."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from keymgmt.backend import AccessDenied, ProviderUnavailable

# libtss2 prints every refusal of the TPM on stderr, also those that keymgmt expects.
os.environ.setdefault("TSS2_LOG", "all+NONE")
try:
    from tpm2_pytss import ESAPI, TSS2_Exception
    from tpm2_pytss.TCTILdr import TCTILdr
except ImportError as error:
    raise ProviderUnavailable(
        f"the TPM libraries are not usable: {error}",
        hint="Debian: apt-get install libtss2-esys-3.0.2-0 libtss2-tctildr0 libtss2-fapi1; "
        'then pip install --force-reinstall tpm2-pytss, or "keymgmt[tpm2]" where it is missing',
    ) from error

__all__ = ["ESAPI", "TCTILdr", "TSS2_Exception", "look_for_device"]


def look_for_device(tcti: str) -> None:
    """Raise if the device of a TCTI cannot be used; libtss2 would not give the reason.

    Raises:
        ProviderUnavailable: the path does not exist, or is not a device.
        AccessDenied: this user may not use the device.
    """
    kind, _, conf = tcti.partition(":")
    if kind != "device":
        return
    path = Path(conf)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ProviderUnavailable(
            f"no TPM: {path} does not exist",
            hint="turn the TPM on in the firmware's setup, or name another tcti",
        ) from error
    except OSError as error:
        raise AccessDenied(f"no permission to look at {path}") from error
    if not stat.S_ISCHR(mode):
        raise ProviderUnavailable(f"no TPM: {path} is not a device", hint="name another tcti")
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        raise AccessDenied(
            f"no permission to use {path}",
            hint="add this user to the device's group, tss on most systems",
        )
