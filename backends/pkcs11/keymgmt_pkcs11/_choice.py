"""Choosing the mechanism of a key: one that its attributes allow, and that really works.

Modules list mechanisms that they then refuse, so before a key wraps for the first time it makes a
round trip with a random secret; the chosen mechanism is remembered for the connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keymgmt.backend import ConfigError, Dek, KeyRetired, UnsupportedOperation, UnwrapFailed
from keymgmt_pkcs11._errors import CkError
from keymgmt_pkcs11._kinds import shortcomings
from keymgmt_pkcs11._wrapping import MECHANISMS, KeyInUse, Wrapping

if TYPE_CHECKING:
    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._keys import KeyObject

__all__ = ["allowed", "choose", "require_promises", "round_trip"]

_CONTEXT = b"keymgmt round trip"


def require_promises(session: Session, key: KeyObject, name: str) -> None:
    """Refuse to wrap with a key that lacks the properties of a safe key.

    Raises:
        UnsupportedOperation: the key lacks a property that the config does not waive for it.
    """
    wrong = shortcomings(key, session.settings, name)
    if wrong:
        words = ", ".join(f'"{word}"' for word in wrong)
        raise UnsupportedOperation(
            f"the key {name!r} ({key}) is not used to wrap: {'; '.join(wrong.values())}",
            hint="make another key, or if it only has too many usages: keymgmt pkcs11 restrict "
            f"PROVIDER:{name}; or say in the config: {name} = {{ allow = [{words}] }}",
        )


def allowed(session: Session, key: KeyObject, name: str) -> dict[str, Wrapping]:
    """Every mechanism that ``key``, called ``name``, may be used with, by its name."""
    settings = session.settings
    only = settings.entry(name).mechanism
    if only is not None and only not in MECHANISMS:
        raise ConfigError(
            f"the mechanism {only!r} of the key {name!r} is not known",
            hint=f"known: {', '.join(MECHANISMS)}",
        )
    broken = session.module.quirks.broken
    return {
        each: mechanism
        for each, mechanism in MECHANISMS.items()
        if mechanism.fits(key)
        and each not in broken
        and (settings.allow_oaep_sha1 or each != "RSA-OAEP")
        and only in (None, each)
    }


def choose(session: Session, key: KeyObject, name: str) -> Wrapping:
    """The mechanism to wrap with: the first that fits and survives a round trip.

    Raises:
        UnsupportedOperation: none does; the message gives the reason for each.
        KeyRetired: every usage of the key is switched off.
    """
    remembered = session.cache.get(("choose", key.handle, name))
    if remembered is not None:
        return remembered  # type: ignore[no-any-return]
    if key.retired:
        raise KeyRetired(f"the newest version of the key {name!r} was switched off: {key}")
    require_promises(session, key, name)
    why: list[str] = []
    for mechanism in allowed(session, key, name).values():
        if not mechanism.wraps(key):
            why.append(f"{mechanism.name}: it may unwrap only")
            continue
        try:
            round_trip(session, key, mechanism)
        except CkError as error:
            if error.passing:
                raise
            why.append(f"{mechanism.name}: {error.name}")
            session.renew()
        except UnsupportedOperation as error:
            why.append(f"{mechanism.name}: {error}")
        except UnwrapFailed:
            why.append(f"{mechanism.name}: it does not unwrap what it wrapped")
        else:
            session.cache["choose", key.handle, name] = mechanism
            return mechanism
    broken, sha1 = session.module.quirks.broken, session.settings.allow_oaep_sha1
    why += [f"{each}: {text}" for each, text in broken.items() if MECHANISMS[each].fits(key)]
    raise UnsupportedOperation(
        f"the key {name!r} ({key}) does not wrap: {'; '.join(why) or 'its attributes forbid it'}",
        hint="set allow_oaep_sha1 = true, or make a key of another kind"
        if key.type == "RSA" and not sha1 and key.can("decrypt", "unwrap")
        else "make one: keymgmt keys create PROVIDER:KEY --kind aes256",
    )


def round_trip(session: Session, key: KeyObject, mechanism: Wrapping) -> None:
    """Wrap a random secret and unwrap it.

    Raises:
        UnwrapFailed: another secret came back, or another context opened it.
        CkError: the module refused.
    """
    with Dek.generate() as dek:
        use = KeyInUse(session, key)
        blob = mechanism.wrap(use, dek, _CONTEXT)
        with mechanism.unwrap(use, blob, _CONTEXT) as again:
            if again != dek:
                raise UnwrapFailed(f"{mechanism.name} with {key} gave another secret back")
