"""The anchor of the release memory: an NV index that can only be extended.

Of type extend, it holds a hash chain, as ``SupportsAnchor`` wants it. Where the machine's state
does not satisfy the policy of the key that it was made with, nobody moves it. Its owner can take it
away and make another one, and that one's name is the same with the same policy; but it is empty
until somebody who satisfies the policy sets it up, and an empty one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import (
    ANCHOR_FIRST,
    ANCHOR_START,
    AccessDenied,
    ConfigError,
    KeyNotFound,
    ProviderError,
    anchor_after,
)
from keymgmt_tpm2.policy._authorize import authorize, check_satisfied
from keymgmt_tpm2.policy._index import NV_ANCHOR, NV_ANCHOR_OPEN, NV_WRITTEN, NvIndex
from keymgmt_tpm2.policy._policy import Policy

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["Anchor", "check_anchor", "create_anchor", "find_anchor", "move_anchor", "read_anchor"]

SIZE: Final = 32


@dataclass(frozen=True)
class Anchor:
    """An anchor, and the policy that moves it.

    Attributes:
        index: its NV index.
        policy: of a key, its PIN left out.
        key: the name of that key, or None without one.
    """

    index: NvIndex
    policy: Policy
    key: str | None = None

    @classmethod
    def of(cls, service: Service, policy: Policy, key: str | None = None) -> Anchor:
        """The one that a policy makes at the index of the provider's table."""
        policy = replace(policy, pin=False)
        attributes = NV_ANCHOR if policy.digest else NV_ANCHOR_OPEN
        index = NvIndex(service.settings.anchor_number, attributes, SIZE, policy.digest)
        return cls(index, policy, key)

    @property
    def name(self) -> bytes:
        """The name that the config pins."""
        return self.index.name

    @property
    def moved_by(self) -> str:
        """The condition for moving it, in words."""
        return str(self.policy) if self.index.policy else "whoever may use this TPM"


def create_anchor(service: Service, key: str | None, *, again: bool = False) -> Anchor:
    """Define an anchor as its owner, and set it up; one that was just set up is left alone.

    Args:
        service: its settings say the index, and where the owner's password is.
        key: whose policy, of its newest version, who moves the anchor must satisfy; its PIN is left
            out. None for no policy.
        again: whether to take away the anchor that is at the index. What was bound to it counts no
            more.

    Raises:
        ConfigError: the index is in use, or the key's policy lets everybody move the anchor.
        KeyNotFound: there is no such key.
        AccessDenied: the policy does not hold now, or the owner hierarchy has another password.
    """
    policy = Policy() if key is None else service.keys.read(key).newest.policy
    anchor = Anchor.of(service, policy, key)
    if key is not None and not anchor.index.policy:
        asks = "nothing but its PIN" if policy.pin else "nothing"
        raise ConfigError(
            f"the key {key!r} asks for {asks}, so whoever may use this TPM would move the anchor",
            hint="name a key with an approver or PCRs, or none, where that is enough",
        )

    def operation(tpm: Tpm) -> None:
        if _is_made(tpm, service, anchor, again=again):
            return
        session = _session(tpm, service, anchor)  # before anything is taken away
        owner = tpm.session()
        tpm.nv_undefine(anchor.index.number, owner)
        hint = "another program made it meanwhile: find out which"
        handle = tpm.nv_define(anchor.index, owner, hint)
        tpm.use_once(session, "nv_extend", handle, ANCHOR_FIRST, auth_handle=handle)

    passwords = {"owner": service.settings.owner_auth}
    service.run(f"making the anchor {anchor.index}", operation, passwords=passwords)
    return anchor


def _is_made(tpm: Tpm, service: Service, anchor: Anchor, *, again: bool) -> bool:
    """Whether it is there and new, as where an answer was lost; else its index may be taken."""
    handle = tpm.persistent(anchor.index.number)
    if handle is None:
        return False
    attributes, size = tpm.nv_attributes(handle)
    if attributes & ~NV_WRITTEN not in (NV_ANCHOR, NV_ANCHOR_OPEN) or size != SIZE:
        raise ConfigError(
            f"the NV index {anchor.index} is in use, and is no anchor",
            hint='name another one in the provider\'s table: anchor_index = "0x018001.."',
        )
    if attributes & NV_WRITTEN and not again:
        if tpm.name_of(handle) == anchor.name and _value(tpm, handle) == ANCHOR_START:
            return True
        bound = attributes & ~NV_WRITTEN == NV_ANCHOR
        raise ConfigError(
            f"the NV index {anchor.index} is in use: it is an anchor already",
            hint="if its release memory is to count no more, "
            + _again(service, anchor.key or ("KEY" if bound else None)),
        )
    return False


def _again(service: Service, key: str | None) -> str:
    reference = f"{service.name}:{key}" if key else service.name
    return f"make it again with: keymgmt tpm anchor create {reference} --again"


def read_anchor(service: Service) -> bytes:
    """See SupportsAnchor; the answer is the TPM's own, whatever lies between."""
    name = _pinned_name(service)
    return service.run(
        "reading the anchor", lambda tpm: _value(tpm, find_anchor(service, tpm, name))
    )


def check_anchor(service: Service) -> bytes:
    """Its value, once it was seen that it can be moved now; nothing is moved.

    Raises:
        ProviderError: as ``read_anchor`` and ``move_anchor`` raise it.
    """
    anchor = _anchor_named(service, _pinned_name(service))

    def operation(tpm: Tpm) -> bytes:
        value = _value(tpm, find_anchor(service, tpm, anchor.name))
        session = _session(tpm, service, anchor)
        if anchor.index.policy:
            check_satisfied(tpm, session, anchor.index.policy)
        return value

    return service.run(f"looking at the anchor {anchor.index}", operation)


def move_anchor(service: Service, value: bytes, step: bytes) -> None:
    """See SupportsAnchor."""
    anchor, after = _anchor_named(service, _pinned_name(service)), anchor_after(value, step)

    def operation(tpm: Tpm) -> None:
        handle = find_anchor(service, tpm, anchor.name)
        now = _value(tpm, handle)
        if now == after:  # an answer was lost
            return
        if now != value:
            raise AccessDenied(
                "the anchor has moved meanwhile: something else is bound to it as well",
                hint="one file that remembers releases is bound to an anchor; another one needs a "
                "provider with another anchor_index",
            )
        session = _session(tpm, service, anchor)
        tpm.use_once(session, "nv_extend", handle, step, auth_handle=handle)

    service.run("moving the anchor", operation)


def find_anchor(service: Service, tpm: Tpm, name: bytes) -> Any:
    """The handle of the pinned anchor; KeyNotFound where it is not there, or is another one."""
    settings = service.settings
    handle = tpm.persistent(settings.anchor_number)
    if handle is not None and tpm.name_of(handle) == name:
        return handle
    tpm.check_owner_enabled()
    if handle is None:
        problem = f"the TPM has no anchor {settings.anchor_index}"
    elif tpm.nv_attributes(handle)[0] & NV_WRITTEN:
        problem = f"the anchor {settings.anchor_index} is not the one that the config pins"
    else:
        problem = f"the anchor {settings.anchor_index} was made anew and never set up"
    try:
        key = _anchor_named(service, name).key
    except ProviderError:
        key = "KEY"
    hint = "if nobody took it away on purpose, find out who did; " + _again(service, key)
    raise KeyNotFound(problem, hint=hint)


def _pinned_name(service: Service) -> bytes:
    if service.settings.anchor is None:
        raise ConfigError(
            f"[providers.{service.name}] has no anchor",
            hint="make one with a KEY that has an approver, and see the line to add: "
            f"keymgmt tpm anchor create {service.name}:KEY",
        )
    return bytes.fromhex(service.settings.anchor)


def _anchor_named(service: Service, name: bytes) -> Anchor:
    """The anchor of a name, whose policy a key has.

    Raises:
        ProviderError: the key directory or a file in it cannot be read, and no other one has it.
        AccessDenied: no key has it.
    """
    if (open_anchor := Anchor.of(service, Policy())).name == name:
        return open_anchor
    service.keys.check_there()
    problem: ProviderError | None = None
    for key in service.keys.names():
        try:
            versions = service.keys.read(key).versions
        except ProviderError as error:
            problem = problem or error
            continue
        for version in versions:
            if (anchor := Anchor.of(service, version.policy, key)).name == name:
                return anchor
    if problem is not None:
        raise problem
    raise AccessDenied(
        f"no key in {service.keys.path} has the policy that the anchor was made with",
        hint="restore the file of that key, or, with another one, " + _again(service, "KEY"),
    )


def _session(tpm: Tpm, service: Service, anchor: Anchor) -> Any:
    """A session in which the anchor may be moved once."""
    session = tpm.session(policy=bool(anchor.index.policy), once=True)
    if anchor.index.policy:
        reference = f"{service.name}:{anchor.key}"
        closed = (
            "boot into the state it was made in; after an update bind its key to the state of now: "
            f"keymgmt keys rotate {reference}; then make the anchor with it and pin its new name: "
            f"keymgmt tpm anchor create {reference} --again; with an approver neither is needed"
        )
        authorize(tpm, session, service, anchor.policy, f"the anchor {anchor.index}", closed)
    return session


def _value(tpm: Tpm, handle: Any) -> bytes:
    answer = tpm.use_once(tpm.session(once=True), "nv_read", handle, SIZE, 0, auth_handle=handle)
    return bytes(answer)
