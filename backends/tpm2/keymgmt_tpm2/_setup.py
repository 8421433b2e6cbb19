"""Setting up a TPM: the storage root key at its handle, and when wrong PINs lock the TPM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt.backend import AccessDenied, ConfigError, UnsupportedOperation
from keymgmt_tpm2._lockout import Lockout
from keymgmt_tpm2._structures import root_key_kind
from keymgmt_tpm2._templates import srk_template, trial_template

if TYPE_CHECKING:
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
    settings = provider.settings

    def operation(tpm: Tpm) -> RootKey:
        if change:
            _change_lockout(tpm, change, given=settings.lockout_auth is not None)
        created = create and tpm.persistent(settings.srk_handle) is None
        if created:
            tpm.check_owner_enabled()
            session = tpm.session(salted=False)
            primary = tpm.create_primary("owner", srk_template(kind), session)
            tpm.make_persistent(primary, settings.srk_handle, session)
        srk = tpm.srk()
        actual = root_key_kind(tpm.public_bytes(srk))
        if actual is None:
            raise UnsupportedOperation(
                f"the object at {settings.srk} is not a storage root key",
                hint='name another handle in the config, such as srk = "0x81000010"',
            )
        algorithm, counts_tries = actual
        if counts_tries:
            tpm.lockout().check(use_last=False)
        tpm.try_srk(trial_template())
        return RootKey(settings.srk, tpm.name_of(srk).hex(), algorithm, created, tpm.lockout())

    return provider.service.run(
        "setting up the TPM",
        operation,
        seconds=SECONDS,
        pinned=False,
        alone=True,
        passwords={
            "owner": settings.owner_auth if create else None,
            "lockout": settings.lockout_auth if change else None,
        },
    )


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


def _change_lockout(tpm: Tpm, change: LockoutChange, *, given: bool) -> None:
    _check_change(tpm.lockout(), change, given=given)
    session = tpm.session(salted=False)
    if change.clear:
        tpm.clear_lockout(session)
    now = tpm.lockout()
    wanted = (
        now.limit if change.tries is None else change.tries,
        now.interval if change.recovery is None else change.recovery,
        now.recovery if change.lockout_recovery is None else change.lockout_recovery,
    )
    if wanted != (now.limit, now.interval, now.recovery):
        tpm.set_lockout(*wanted, session)
