"""Our NV indices in a TPM: define, read and undefine them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keymgmt.backend import ConfigError
from keymgmt_tpm2._errors import NV_DEFINED, TpmError

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2.policy._index import NvIndex

__all__ = ["attributes_of", "define", "undefine"]


def define(tpm: Tpm, place: NvIndex, session: Any, hint: str) -> Any:
    """Define an index as its owner; its handle.

    One that is there and was never written is defined anew: its name does not say that nobody gave
    it an auth value.

    Raises:
        ConfigError: it is in use.
    """
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    public = t.TPM2B_NV_PUBLIC(
        nvPublic=t.TPMS_NV_PUBLIC(
            nvIndex=place.index,
            nameAlg=c.TPM2_ALG.SHA256,
            attributes=c.TPMA_NV(place.attributes),
            authPolicy=place.policy,
            dataSize=place.size,
        )
    )
    there = tpm.persistent(place.index)
    if there is not None and tpm.name_of(there) == place.new_name:
        undefine(tpm, place.index, session)
    try:
        return tpm.call("nv_define_space", b"", public, c.ESYS_TR.OWNER, session1=session)
    except TpmError as error:
        if error.code == NV_DEFINED:
            raise ConfigError(f"the NV index {place} is in use", hint=hint) from error
        raise


def undefine(tpm: Tpm, index: int, session: Any) -> None:
    """Take an index away, as its owner; nothing where there is none."""
    from tpm2_pytss import constants as c

    handle = tpm.persistent(index)
    if handle is not None:
        tpm.call("nv_undefine_space", handle, c.ESYS_TR.OWNER, session1=session)


def attributes_of(tpm: Tpm, handle: Any) -> tuple[int, int]:
    """TPMA_NV and size in bytes of an index."""
    answer = tpm.call("nv_read_public", handle)
    public = answer[0]
    area = public.nvPublic
    return int(area.attributes), int(area.dataSize)
