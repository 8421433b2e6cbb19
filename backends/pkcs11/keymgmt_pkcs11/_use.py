"""Which mechanism a key is used with: what its attributes allow, then what really works.

A module lists mechanisms that it then refuses, so the first use of a key to wrap makes a round trip
with a random secret, and the answer is remembered for this connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import ConfigError, Dek, KeyRetired, UnsupportedOperation, UnwrapFailed
from keymgmt_pkcs11._cryptoki import CkError
from keymgmt_pkcs11._errors import GONE, LOST, reason
from keymgmt_pkcs11._mechanisms import MECHANISMS, Use, Wrapping, fitting
from keymgmt_pkcs11._quirks import quirks_of

if TYPE_CHECKING:
    from keymgmt_pkcs11._keys import KeyObject
    from keymgmt_pkcs11._sessions import Channel
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["allowed", "choose", "purpose_of", "round_trip"]

_CONTEXT = b"keymgmt round trip"


def purpose_of(key: KeyObject) -> Literal["wrap", "sign"]:
    """What a key is for by its attributes; one that may do both is for wrapping."""
    if key.can("decrypt", "unwrap", "derive"):
        return "wrap"
    return "sign" if key.can("sign") or key.type == "EC" else "wrap"


def allowed(
    channel: Channel, key: KeyObject, settings: Pkcs11Settings, name: str
) -> dict[str, tuple[Wrapping, int]]:
    """Every mechanism that ``key`` may be used with here: name -> mechanism and code."""
    only = settings.entry(name).mechanism
    if only is not None and only not in MECHANISMS:
        raise ConfigError(
            f"the mechanism {only!r} of the key {name!r} is not known",
            hint=f"known: {', '.join(MECHANISMS)}",
        )
    quirks = quirks_of(channel.module)
    return fitting(key, quirks, sha1=settings.allow_oaep_sha1, only=only)


def choose(
    channel: Channel, key: KeyObject, settings: Pkcs11Settings, name: str
) -> tuple[Wrapping, int]:
    """The mechanism to wrap with: the first that fits and survives a round trip.

    Raises:
        UnsupportedOperation: none does; the message says why, one by one.
        KeyRetired: the key may be used for nothing.
    """
    remembered = channel.cache.get(("choose", key.handle, name))
    if remembered is not None:
        return remembered  # type: ignore[no-any-return]
    if key.retired:
        raise KeyRetired(f"the newest version of the key {name!r} was switched off: {key}")
    why: list[str] = []
    for mechanism, code in allowed(channel, key, settings, name).values():
        if not mechanism.wraps(key):
            why.append(f"{mechanism.name}: it may unwrap only")
            continue
        try:
            round_trip(channel, key, mechanism, code)
        except (PKCS11Error, CkError) as error:
            if reason(error) in LOST | GONE:
                raise
            why.append(f"{mechanism.name}: {reason(error)}")
        except UnwrapFailed:
            why.append(f"{mechanism.name}: it does not give back what it took")
        else:
            channel.cache["choose", key.handle, name] = (mechanism, code)
            return mechanism, code
    broken = quirks_of(channel.module).broken
    why += [f"{each}: {text}" for each, text in broken.items() if MECHANISMS[each].fits(key)]
    raise UnsupportedOperation(
        f"the key {name!r} ({key}) does not wrap: {'; '.join(why) or 'its attributes forbid it'}",
        hint="set allow_oaep_sha1 = true, or make a key of another kind"
        if key.type == "RSA" and not settings.allow_oaep_sha1 and key.can("decrypt", "unwrap")
        else "make one: keymgmt keys create --kind aes256",
    )


def round_trip(channel: Channel, key: KeyObject, mechanism: Wrapping, code: int) -> None:
    """Wrap a random secret and unwrap it.

    Raises:
        UnwrapFailed: another secret came back, or another context opened it.
        PKCS11Error, CkError: as the module says.
    """
    with Dek.generate() as dek:
        use = Use(channel, key, code)
        blob = mechanism.wrap(use, dek, _CONTEXT)
        with mechanism.unwrap(use, blob, _CONTEXT) as again:
            if again != dek:
                raise UnwrapFailed(f"{mechanism.name} with {key} gave another secret back")
