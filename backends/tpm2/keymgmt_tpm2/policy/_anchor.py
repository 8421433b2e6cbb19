"""The anchor of what remembers releases: an NV index that only grows.

Of type extend, it holds a hash chain, as ``SupportsAnchor`` wants it. Where the machine's state
does not satisfy the policy of the key that it was made with, nobody moves it. Its owner can take it
away and make another one, and that one's name is the same with the same policy; but it is empty
until somebody who satisfies the policy sets it up, and an empty one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import (
    ANCHOR_FIRST,
    AccessDenied,
    ConfigError,
    KeyNotFound,
    ProviderError,
    anchor_after,
)
from keymgmt_tpm2._wrapping import statements
from keymgmt_tpm2.policy._index import NV_ANCHOR, NV_ANCHOR_OPEN, NV_WRITTEN, NvIndex
from keymgmt_tpm2.policy._nv import attributes_of, define, undefine
from keymgmt_tpm2.policy._policy import Policy

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["create_anchor", "find_anchor", "move_anchor", "read_anchor"]

SIZE: Final = 32
_MAKE: Final = (
    "if nobody took it away on purpose, find out who did; make it again with: keymgmt tpm anchor "
    "create PROVIDER --again"
)


def _place(index: int, policy: Policy) -> NvIndex:
    digest = policy.digest
    return NvIndex(index, NV_ANCHOR if digest else NV_ANCHOR_OPEN, SIZE, digest)


def create_anchor(service: Service, key: str | None, *, again: bool = False) -> NvIndex:
    """Define an anchor as its owner, and set it up.

    Args:
        service: its settings say the index, and where the owner's password is.
        key: whose policy, of its newest version, who moves the anchor must satisfy; its PIN is left
            out. None for no policy.
        again: whether to take away what is at the index first. What was bound to it counts no more.

    Raises:
        ConfigError: the index is in use.
        KeyNotFound: there is no such key.
        AccessDenied: the policy does not hold now, or the owner hierarchy has another password.
    """
    settings = service.settings
    policy = Policy() if key is None else _without_pin(service.keys.read(key).newest.policy)
    place = _place(settings.anchor_number, policy)

    def operation(tpm: Tpm, auth: bytearray | None) -> None:
        session = _session(tpm, service, place, policy)  # before anything is taken away
        tpm.set_owner_auth(auth)
        owner = tpm.session()
        if again:
            undefine(tpm, place.index, owner)
        hint = f"take it away with: keymgmt tpm anchor create {service.name} --again"
        handle = define(tpm, place, owner, hint)
        tpm.use_once(session, "nv_extend", handle, ANCHOR_FIRST, auth_handle=handle)

    with service.secret(settings.owner_auth) as auth:
        service.run(f"making the anchor {place}", lambda tpm: operation(tpm, auth))
    return place


def read_anchor(service: Service) -> bytes:
    """See SupportsAnchor; the answer is the TPM's own, whatever lies between."""
    name = _pinned(service)
    return service.run(
        "reading the anchor", lambda tpm: _value(tpm, find_anchor(service, tpm, name))
    )


def move_anchor(service: Service, value: bytes, step: bytes) -> None:
    """See SupportsAnchor."""
    name = _pinned(service)
    number, after = service.settings.anchor_number, anchor_after(value, step)
    known = (policy for policy in _policies(service) if _place(number, policy).name == name)
    policy = next(known, None)
    if policy is None:
        raise AccessDenied(
            f"no key in {service.keys.path} has the policy that the anchor was made with",
            hint="restore the file of that key, or make the anchor again: keymgmt tpm anchor "
            "create PROVIDER --again",
        )

    def operation(tpm: Tpm) -> None:
        handle = find_anchor(service, tpm, name)
        now = _value(tpm, handle)
        if now == after:  # an answer was lost
            return
        if now != value:
            raise AccessDenied(
                "the anchor has moved meanwhile: something else is bound to it as well",
                hint="one file that remembers releases is bound to an anchor; another one needs a "
                "provider with another anchor_index",
            )
        session = _session(tpm, service, _place(number, policy), policy)
        tpm.use_once(session, "nv_extend", handle, step, auth_handle=handle)

    service.run("moving the anchor", operation)


def find_anchor(service: Service, tpm: Tpm, name: bytes) -> Any:
    """The handle of the pinned anchor; KeyNotFound where it is not there, or is another one."""
    settings = service.settings
    handle = tpm.persistent(settings.anchor_number)
    if handle is None:
        raise KeyNotFound(f"the TPM has no anchor {settings.anchor_index}", hint=_MAKE)
    if tpm.name_of(handle) == name:
        return handle
    attributes, _ = attributes_of(tpm, handle)
    empty = not attributes & NV_WRITTEN
    raise KeyNotFound(
        f"the anchor {settings.anchor_index} "
        + ("was made anew and never set up" if empty else "is not the one that the config pins"),
        hint=_MAKE,
    )


def _pinned(service: Service) -> bytes:
    if service.settings.anchor is None:
        raise ConfigError(
            f"[providers.{service.name}] has no anchor",
            hint=f"see the line to add with: keymgmt tpm anchor create {service.name}",
        )
    return bytes.fromhex(service.settings.anchor)


def _without_pin(policy: Policy) -> Policy:
    return replace(policy, pin=False)


def _policies(service: Service) -> Iterator[Policy]:
    yield Policy()
    for key in service.keys.names():
        with suppress(ProviderError):
            for version in service.keys.read(key).versions:
                yield _without_pin(version.policy)


def _session(tpm: Tpm, service: Service, place: NvIndex, policy: Policy) -> Any:
    """A session in which the anchor may be moved once."""
    session = tpm.session(policy=bool(place.policy), once=True)
    if place.policy:
        from keymgmt_tpm2.policy._authorize import authorize

        said = statements(service, policy)
        authorize(tpm, session, policy, said, f"the anchor {place}")
    return session


def _value(tpm: Tpm, handle: Any) -> bytes:
    answer = tpm.use_once(tpm.session(once=True), "nv_read", handle, SIZE, 0, auth_handle=handle)
    return bytes(answer)
