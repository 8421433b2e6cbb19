"""NV indices that an approval compares with, so that raising one outdates older approvals.

A counter starts where the highest counter that this TPM ever had left off (Part 3, 31.8), so its
value is of this TPM alone, and undefining it brings no old value back. Only the owner counts it up;
whoever uses the key reads it.

Counters differ from TPM to TPM, so a fleet shares an *ordinary* index instead, which enrolment sets
to the same value everywhere. Its owner can also set it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from keymgmt.backend import ConfigError, KeyNotFound
from keymgmt_tpm2._errors import NV_DEFINED, TpmError
from keymgmt_tpm2.policy._policy import NV_COUNTER, NV_ORDINARY, NV_WRITTEN

if TYPE_CHECKING:
    from typing import Any

    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._provider import Tpm2Provider

__all__ = [
    "DEFAULT_INDEX",
    "bump_counter",
    "create_counter",
    "parse_index",
    "read_counter",
    "set_counter",
]

DEFAULT_INDEX: Final = 0x01800100


def parse_index(text: str) -> int:
    """Read ``0x018001xx``; ConfigError where it is no index for the owner's use."""
    try:
        index = int(text, 16)
    except ValueError:
        index = 0
    # Registry of Reserved TPM 2.0 Handles, 2.2: the owner's indices.
    if not 0x01800000 <= index <= 0x01BFFFFF:
        raise ConfigError(
            f"{text[:20]!r} is no NV index of the owner", hint="0x01800000-0x01bfffff"
        )
    return index


def create_counter(
    provider: Tpm2Provider, index: int = DEFAULT_INDEX, *, value: int | None = None
) -> int:
    """Define a counter and count it once, so that it can be read; returns its value.

    With ``value``, define an ordinary index and set it to that.

    Raises:
        ConfigError: the index is in use.
        AccessDenied: the owner hierarchy has a password, and it was not or wrongly given.
    """
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    public = t.TPM2B_NV_PUBLIC(
        nvPublic=t.TPMS_NV_PUBLIC(
            nvIndex=index,
            nameAlg=c.TPM2_ALG.SHA256,
            attributes=c.TPMA_NV(NV_COUNTER if value is None else NV_ORDINARY),
            dataSize=8,
        )
    )

    def operation(tpm: Tpm, auth: bytearray | None) -> int:
        tpm.set_owner_auth(auth)
        session = tpm.session()
        try:
            tpm.call("nv_define_space", b"", public, c.ESYS_TR.OWNER, session1=session)
        except TpmError as error:
            if error.code == NV_DEFINED:
                raise ConfigError(
                    f"the NV index {index:#010x} is in use", hint="name another: --index 0x018001.."
                ) from error
            raise
        return _change(tpm, index, session, value)

    return _as_owner(provider, f"defining the NV index {index:#010x}", operation)


def bump_counter(provider: Tpm2Provider, index: int = DEFAULT_INDEX) -> int:
    """Count up once; every approval for a lower value is outdated. Returns the new value."""
    return _set(provider, index, None)


def set_counter(provider: Tpm2Provider, index: int, value: int) -> int:
    """Set an ordinary index; every approval for a lower value is outdated."""
    return _set(provider, index, value)


def _set(provider: Tpm2Provider, index: int, value: int | None) -> int:
    def operation(tpm: Tpm, auth: bytearray | None) -> int:
        tpm.set_owner_auth(auth)
        return _change(tpm, index, tpm.session(), value)

    return _as_owner(provider, f"changing the NV index {index:#010x}", operation)


def _as_owner(
    provider: Tpm2Provider, doing: str, operation: Callable[[Tpm, bytearray | None], int]
) -> int:
    with provider.service.secret(provider.settings.owner_auth) as auth:
        return provider.service.run(doing, lambda tpm: operation(tpm, auth))


def read_counter(provider: Tpm2Provider, index: int = DEFAULT_INDEX) -> int:
    """The present value; KeyNotFound where there is no counter."""
    return provider.service.run(
        f"reading the counter {index:#010x}", lambda tpm: _read(tpm, _find(tpm, index)[0])
    )


def _find(tpm: Tpm, index: int) -> tuple[Any, bool]:
    """The index, and whether it is an ordinary one."""
    handle = tpm.persistent(index)
    if handle is None:
        raise KeyNotFound(
            f"the TPM has no counter {index:#010x}",
            hint="make it with: keymgmt tpm counter create PROVIDER",
        )
    answer = tpm.call("nv_read_public", handle)
    public = answer[0]
    area = public.nvPublic
    attributes = int(area.attributes)
    plain = attributes & ~NV_WRITTEN
    if plain not in (NV_COUNTER, NV_ORDINARY) or int(area.dataSize) != 8:
        raise ConfigError(
            f"the NV index {index:#010x} is none of ours: attributes {attributes:#010x}"
        )
    return handle, plain == NV_ORDINARY


def _change(tpm: Tpm, index: int, session: Any, value: int | None) -> int:
    from tpm2_pytss import constants as c

    handle, ordinary = _find(tpm, index)
    if ordinary != (value is not None):
        raise ConfigError(
            f"the NV index {index:#010x} is {'an ordinary one' if ordinary else 'a counter'}",
            hint="a counter is raised by `counter bump`, an ordinary index by `counter set`",
        )
    owner = c.ESYS_TR.OWNER
    if value is None:
        tpm.call("nv_increment", handle, auth_handle=owner, session1=session)
    else:
        content = value.to_bytes(8, "big")
        tpm.call("nv_write", handle, content, 0, auth_handle=owner, session1=session)
    return _read(tpm, handle)


def _read(tpm: Tpm, handle: Any) -> int:
    answer = tpm.call("nv_read", handle, 8, 0, auth_handle=handle)
    return int.from_bytes(bytes(answer), "big")
