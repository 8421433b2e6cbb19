"""Getting a TPM ready: the storage root key at its persistent handle, and the line that pins it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt.backend import KeyNotFound, UnsupportedOperation, wipe
from keymgmt_tpm2._errors import TpmError
from keymgmt_tpm2._structures import sized
from keymgmt_tpm2._templates import srk_template

if TYPE_CHECKING:
    from keymgmt_tpm2._provider import Tpm2Provider
    from keymgmt_tpm2._tpm import Tpm

__all__ = ["RootKey", "give_owner_auth", "set_up"]

SECONDS: Final = 120.0


@dataclass(frozen=True)
class RootKey:
    """The storage root key: handle, name in hex, algorithm, and whether it was made just now."""

    handle: str
    name: str
    algorithm: str
    made: bool


def set_up(provider: Tpm2Provider, *, create: bool = False, kind: str = "ecc") -> RootKey:
    """Look at the storage root key; with ``create``, make it where there is none.

    Args:
        provider: its settings say handle and, for ``create``, the owner's password.
        create: make it from the template of the TCG's provisioning guidance.
        kind: ``ecc``, or ``rsa`` for chips without ECC.

    Raises:
        KeyNotFound: there is none, and ``create`` was not given.
        UnsupportedOperation: what is there is no storage key.
        AccessDenied: the owner hierarchy has a password, and it was not or wrongly given.
    """

    def operation(tpm: Tpm) -> RootKey:
        handle, made = tpm.persistent(provider.settings.srk_handle), False
        if handle is None:
            if not create:
                raise KeyNotFound(
                    f"the TPM has no storage root key at {provider.settings.srk}",
                    hint=f"make it with: keymgmt tpm setup {provider.name} --create",
                )
            _make(tpm, provider, kind)
            handle, made = tpm.persistent(provider.settings.srk_handle), True
        public = tpm.public_of(handle)
        # fixedTPM, fixedParent, sensitiveDataOrigin, restricted and decrypt, and not sign.
        if public.attributes & 0x70032 != 0x30032:
            raise UnsupportedOperation(
                f"what is at {provider.settings.srk} is no storage root key",
                hint='name another handle in the config, such as srk = "0x81000010"',
            )
        name = tpm.name_of(handle).hex()
        algorithm = "RSA" if public.curve is None else "ECC"
        return RootKey(provider.settings.srk, name, algorithm, made)

    return provider.service.run("setting up the TPM", operation, seconds=SECONDS, pinned=False)


def give_owner_auth(tpm: Tpm, provider: Tpm2Provider) -> None:
    """Give ESAPI the owner hierarchy's password, if the config names a source of it."""
    from tpm2_pytss import constants as c

    source = provider.settings.owner_auth
    if source is None:
        return
    auth = source.read()
    try:
        tpm.set_auth(c.ESYS_TR.OWNER, auth)
    finally:
        wipe(auth)


def _make(tpm: Tpm, provider: Tpm2Provider, kind: str) -> None:
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    give_owner_auth(tpm, provider)
    template = t.TPM2B_PUBLIC.unmarshal(sized(srk_template(kind)))[0]
    empty = t.TPM2B_SENSITIVE_CREATE()
    session = tpm.session(salted=False)
    answer = tpm.call("create_primary", empty, template, c.ESYS_TR.OWNER, session1=session)
    primary, persistent = answer[0], provider.settings.srk_handle
    try:
        tpm.call("evict_control", c.ESYS_TR.OWNER, primary, persistent, session1=session)
    finally:
        # Where the connection is gone, its error is on its way already.
        with contextlib.suppress(TpmError):
            tpm.call("flush_context", primary)
