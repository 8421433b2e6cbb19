"""Setting up a TPM: the storage root key at its handle, and when wrong PINs lock the TPM."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt.backend import AccessDenied, ConfigError, KeyNotFound, UnsupportedOperation
from keymgmt_tpm2._lockout import Lockout
from keymgmt_tpm2._structures import root_key_kind, sized
from keymgmt_tpm2._templates import srk_template, trial_template

if TYPE_CHECKING:
    from typing import Any

    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._provider import Tpm2Provider

__all__ = ["LockoutChange", "RootKey", "set_up"]

SECONDS: Final = 120.0


@dataclass(frozen=True)
class RootKey:
    """The storage root key: handle, name in hex, algorithm, and whether it was created just now.

    ``lockout`` says when wrong PINs lock its TPM.
    """

    handle: str
    name: str
    algorithm: str
    made: bool
    lockout: Lockout


@dataclass(frozen=True)
class LockoutChange:
    """Changes of the dictionary-attack protection; None leaves a value as it is.

    ``tries``: wrong tries that lock the TPM; ``recovery``: seconds after which one of them is
    forgotten; ``lockout_recovery``: seconds until another lockout password is accepted after a
    wrong one; ``clear`` forgets the counted tries and unlocks.
    """

    tries: int | None = None
    recovery: int | None = None
    lockout_recovery: int | None = None
    clear: bool = False

    def __bool__(self) -> bool:
        return self != LockoutChange()


def set_up(
    provider: Tpm2Provider,
    *,
    create: bool = False,
    kind: str = "ecc",
    change: LockoutChange | None = None,
) -> RootKey:
    """Examine the storage root key; with ``create``, create it if it is missing.

    An existing root key is tried, so that a root key with a password is reported here.

    Args:
        provider: its settings have the handle and, for ``create``, the owner's password.
        create: create it from the template of the TCG's provisioning guidance.
        kind: ``ecc``, or ``rsa`` for chips without ECC.
        change: change of the dictionary-attack protection, with the lockout password of the
            settings.

    Raises:
        KeyNotFound: there is no root key, and ``create`` was not given.
        UnsupportedOperation: another object than a storage root key is at the handle.
        AccessDenied: a hierarchy or the root key has a password, which is missing or wrong.
        ConfigError: a lockout password is given, but the TPM has none; or the new number of tries
            is so small that the TPM would lock at once.
        LockedOut: the root key counts wrong passwords, and one more might lock the TPM; or a
            lockout password was wrong, and none is accepted for a while.
    """
    settings, service = provider.settings, provider.service

    def operation(tpm: Tpm, owner: bytearray | None, lockout: bytearray | None) -> RootKey:
        if change:
            _change_lockout(tpm, change, lockout)
        handle, created = tpm.persistent(settings.srk_handle), False
        if handle is None:
            tpm.check_owner_enabled()
            if not create:
                raise KeyNotFound(
                    f"the TPM has no storage root key at {settings.srk}",
                    hint=f"make it with: keymgmt tpm setup {provider.name} --create",
                )
            _make(tpm, settings.srk_handle, kind, owner)
            handle, created = tpm.persistent(settings.srk_handle), True
        answer = tpm.call("read_public", handle)
        public = answer[0]
        actual = root_key_kind(bytes(public.publicArea.marshal()))
        if actual is None:
            raise UnsupportedOperation(
                f"the object at {settings.srk} is not a storage root key",
                hint='name another handle in the config, such as srk = "0x81000010"',
            )
        algorithm, counts_tries = actual
        _try(tpm, counts_tries=counts_tries)
        name = tpm.name_of(handle).hex()
        return RootKey(settings.srk, name, algorithm, created, tpm.lockout())

    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(service.secret(settings.owner_auth if create else None))
        lockout = stack.enter_context(service.secret(settings.lockout_auth if change else None))
        return service.run(
            "setting up the TPM",
            lambda tpm: operation(tpm, owner, lockout),
            seconds=SECONDS,
            pinned=False,
            alone=True,
        )


def _make(tpm: Tpm, persistent: int, kind: str, auth: bytearray | None) -> None:
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    tpm.set_owner_auth(auth)
    template = t.TPM2B_PUBLIC.unmarshal(sized(srk_template(kind)))[0]
    empty = t.TPM2B_SENSITIVE_CREATE()
    session = tpm.session(salted=False)
    answer = tpm.call("create_primary", empty, template, c.ESYS_TR.OWNER, session1=session)
    primary = tpm.opened(answer[0])
    tpm.call("evict_control", c.ESYS_TR.OWNER, primary, persistent, session1=session)


def _try(tpm: Tpm, *, counts_tries: bool) -> None:
    """Create a small object under the root key, which fails if the root key has a password."""
    from tpm2_pytss import types as t

    if counts_tries:
        tpm.lockout().check(use_last=False)
    template = t.TPM2B_PUBLIC.unmarshal(sized(trial_template()))[0]
    content = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(data=b"a trial"))
    tpm.call("create", tpm.srk(), content, template)


def _check_change(now: Lockout, change: LockoutChange, *, given: bool) -> None:
    """Check a change before anything is sent: one wrong or empty password bars the hierarchy."""
    if now.password and not given:
        raise AccessDenied(
            "the lockout hierarchy has a password, so nothing was sent without it",
            hint="name the source of its password in the provider's table: lockout_auth",
        )
    if given and not now.password:
        raise ConfigError(
            "the lockout hierarchy has no password, so that of lockout_auth was not sent",
            hint="take lockout_auth out of the provider's table, or give the hierarchy that "
            "password first",
        )
    if change.tries is not None and change.tries <= now.counted and not change.clear:
        raise ConfigError(
            f"{now.counted} wrong tries are counted, so a limit of {change.tries} would lock the "
            "TPM at once",
            hint="give a larger number, or --clear-lockout as well, which forgets counted tries",
        )


def _change_lockout(tpm: Tpm, change: LockoutChange, auth: bytearray | None) -> None:
    from tpm2_pytss import constants as c

    lockout: Any = c.ESYS_TR.LOCKOUT
    _check_change(tpm.lockout(), change, given=auth is not None)
    if auth is not None:
        tpm.set_auth(lockout, auth)
    session = tpm.session(salted=False)
    if change.clear:
        tpm.call("dictionary_attack_lock_reset", lockout, session1=session)
    now = tpm.lockout()
    wanted = (
        now.limit if change.tries is None else change.tries,
        now.interval if change.recovery is None else change.recovery,
        now.recovery if change.lockout_recovery is None else change.lockout_recovery,
    )
    if wanted != (now.limit, now.interval, now.recovery):
        tpm.call("dictionary_attack_parameters", *wanted, lock_handle=lockout, session1=session)
