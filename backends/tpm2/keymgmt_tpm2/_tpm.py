"""What is asked of a TPM: load, ECDH, decrypt, sign, read. One object serves one operation.

Rules: every transient object and session is flushed on every path; every command that carries a
secret runs in a session that is salted to the storage root key and encrypts parameters; the root
key's name is compared with the pinned one first, so that whoever sits on the bus cannot offer its
own. Nothing of libtss2 leaves this module except handles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self

from tpm2_pytss import constants as c
from tpm2_pytss import types as t
from tpm2_pytss._libtpm2_pytss import ffi

from keymgmt.backend import KeyNotFound, WrongKey, wipe
from keymgmt_tpm2._connection import Connection, TimeLimit
from keymgmt_tpm2._errors import HANDLE, TpmError
from keymgmt_tpm2._policy import PcrState
from keymgmt_tpm2._structures import Public, sized

__all__ = ["Tpm"]

_TRANSIENT: Final = 0x80000000
_LOADED_SESSIONS: Final = 0x02000000
_SETUP_HINT: Final = "keymgmt tpm setup PROVIDER shows it, and makes it where that is allowed"


def _aes() -> Any:
    return t.TPMT_SYM_DEF(
        algorithm=c.TPM2_ALG.AES,
        keyBits=t.TPMU_SYM_KEY_BITS(aes=128),
        mode=t.TPMU_SYM_MODE(aes=c.TPM2_ALG.CFB),
    )


class Tpm:
    """A connection and what was loaded over it. A context manager that flushes and closes.

    Args:
        connection: fresh; closed here.
        srk_handle: persistent handle of the storage root key.
        srk_name: its pinned name, or None to take whatever is there (set-up and doctor only).
        left_behind: gets the names of objects that could not be flushed.
    """

    encrypt: bool = True
    """Parameter encryption. A test turns it off to show that its search finds the secrets."""

    def __init__(
        self,
        connection: Connection,
        srk_handle: int,
        srk_name: bytes | None,
        left_behind: Callable[[bytes], None] = lambda _name: None,
    ) -> None:
        self._connection = connection
        self._call = connection.call
        self._srk_handle, self._srk_name = srk_handle, srk_name
        self._left_behind = left_behind
        self._open: list[tuple[Any, bytes | None]] = []
        self._srk: Any = None
        self._auth_set = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, TpmError):
            error.auth_sent = self._auth_set
        try:
            self.flush_all()
        finally:
            for _, name in self._open:
                if name is not None:
                    self._left_behind(name)
            self._connection.close()

    # Handles

    def opened(self, handle: Any, name: bytes | None = None) -> Any:
        """Take over a transient object or session, to be flushed at the end."""
        self._open.append((handle, name))
        return handle

    def flush(self, handle: Any) -> None:
        """Free a transient object or session; what cannot be freed is reported as left behind."""
        name = next(n for h, n in self._open if h == handle)
        self._open = [(h, n) for h, n in self._open if h != handle]
        done = False
        try:
            self._call("flush_context", handle)
            done = True
        except (TpmError, TimeLimit):
            pass  # whoever comes next frees it
        finally:
            if not done and name is not None:
                self._left_behind(name)

    def flush_all(self) -> None:
        """Free everything that this object loaded."""
        while self._open:
            self.flush(self._open[-1][0])

    def load(self, public: Public, private: bytes) -> Any:
        """Load a key under the storage root key; the TPM checks that the two parts belong."""
        parent = self.srk()
        handle = None
        try:
            handle = self._call(
                "load",
                parent,
                t.TPM2B_PRIVATE.unmarshal(sized(private))[0],
                t.TPM2B_PUBLIC.unmarshal(sized(public.raw))[0],
            )
        finally:
            # Without an answer it may be loaded all the same, under a handle that we do not know.
            if handle is None and not self._connection.alive:
                self._left_behind(public.name)
        return self.opened(handle, public.name)

    def load_verifier(self, public: Public) -> Any:
        """Load a public key to verify with, where its tickets count for PolicyAuthorize."""
        # In the NULL hierarchy, the default, the ticket would be empty.
        blob = t.TPM2B_PUBLIC.unmarshal(sized(public.raw))[0]
        handle = self._call("load_external", blob, hierarchy=c.ESYS_TR.OWNER)
        return self.opened(handle, public.name)

    def srk(self) -> Any:
        """The storage root key.

        Raises:
            KeyNotFound: nothing is at its handle.
            WrongKey: its name is not the pinned one.
        """
        if self._srk is None:
            handle = self.persistent(self._srk_handle)
            if handle is None:
                raise KeyNotFound(
                    f"the TPM has no storage root key at {self._srk_handle:#010x}",
                    hint=_SETUP_HINT,
                )
            name = self._call("tr_get_name", handle)
            found = bytes(name)
            if self._srk_name is not None and found != self._srk_name:
                raise WrongKey(
                    f"the storage root key at {self._srk_handle:#010x} is {found.hex()}, "
                    f"and the config pins {self._srk_name.hex()}",
                    hint="this is another TPM, it was cleared, or something stands between",
                )
            self._srk = handle
        return self._srk

    def persistent(self, handle: int) -> Any:
        """A persistent object or NV index, or None where nothing is there."""
        try:
            return self._call("tr_from_tpmpublic", handle)
        except TpmError as error:
            if error.code == HANDLE:
                return None
            raise

    def name_of(self, handle: Any) -> bytes:
        """The name of an object or NV index."""
        name = self._call("tr_get_name", handle)
        return bytes(name)

    def public_of(self, handle: Any) -> Public:
        """The public area of a loaded object."""
        answer = self._call("read_public", handle)
        public = answer[0]
        return Public.parse(bytes(public.publicArea.marshal()))

    # Sessions

    def session(self, *, policy: bool = False, salted: bool = True) -> Any:
        """A session salted to the storage root key that encrypts the first parameter both ways.

        Unsalted, before there is a root key, it only keeps an auth value off the wire.
        """
        kind = c.TPM2_SE.POLICY if policy else c.TPM2_SE.HMAC
        session = self.opened(
            self._call(
                "start_auth_session",
                tpm_key=self.srk() if salted else c.ESYS_TR.NONE,
                bind=c.ESYS_TR.NONE,
                session_type=kind,
                symmetric=_aes(),
                auth_hash=c.TPM2_ALG.SHA256,
            )
        )
        attributes = c.TPMA_SESSION.CONTINUESESSION
        if self.encrypt and salted:
            attributes |= c.TPMA_SESSION.ENCRYPT | c.TPMA_SESSION.DECRYPT
        self._call("trsess_set_attributes", session, attributes)
        return session

    def set_auth(self, handle: Any, auth: bytearray) -> None:
        """Give ESAPI the auth value of an object; it goes into HMACs and never onto the wire."""
        self._auth_set = True
        value = t.TPM2B_AUTH(bytes(auth))
        try:
            self._call("tr_set_auth", handle, value)
        finally:
            _wipe(value)

    # Keys

    def create(self, template: bytes, auth: bytearray) -> tuple[bytes, Public]:
        """Make a key under the storage root key; returns its private part and public area."""
        sensitive = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(userAuth=bytes(auth)))
        try:
            answer = self._call(
                "create",
                self.srk(),
                sensitive,
                t.TPM2B_PUBLIC.unmarshal(sized(template))[0],
                session1=self.session(),
            )
        finally:
            _wipe(sensitive.sensitive.userAuth)
        private, public = answer[0], answer[1]
        return bytes(private), Public.parse(bytes(public.publicArea.marshal()))

    def ecdh(self, key: Any, point: bytes, session: Any) -> bytearray:
        """The x coordinate of private key times point, 32 bytes; the caller wipes it."""
        half = len(point) // 2
        x, y = point[1 : half + 1], point[half + 1 :]
        given = t.TPM2B_ECC_POINT(t.TPMS_ECC_POINT(x=x, y=y))
        answer = self._call("ecdh_zgen", key, given, session1=session)
        taken = _take(answer.point.x)
        _wipe(answer.point.y)
        z = bytearray(half - len(taken)) + taken
        wipe(taken)
        return z

    def rsa_decrypt(self, key: Any, ciphertext: bytes, session: Any) -> bytearray:
        """Decrypt with the key's own scheme, RSA-OAEP with SHA-256; the caller wipes the result."""
        scheme = t.TPMT_RSA_DECRYPT(scheme=c.TPM2_ALG.NULL)
        answer = self._call("rsa_decrypt", key, ciphertext, scheme, b"", session1=session)
        return _take(answer)

    def sign(self, key: Any, digest: bytes, session: Any) -> tuple[int, int]:
        """An ECDSA signature (r, s) over a SHA-256 digest, with the key's own scheme."""
        answer = self._call(
            "sign",
            key,
            digest,
            t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL),
            t.TPMT_TK_HASHCHECK(tag=c.TPM2_ST.HASHCHECK, hierarchy=c.TPM2_RH.NULL),
            session1=session,
        )
        return _ecdsa(answer)

    def certify(
        self, key: Any, ak: Any, value: bytes, session: Any
    ) -> tuple[bytes, tuple[int, int]]:
        """TPMS_ATTEST of a key by an attestation key, with ``value`` in it, and its signature."""
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        answer = self._call("certify", key, ak, value, scheme, session1=session)
        attest, signature = answer[0], answer[1]
        return bytes(attest), _ecdsa(signature)

    @staticmethod
    def take(value: Any) -> bytearray:
        """Copy a secret out of a TPM2B and clear it there; the caller wipes the copy."""
        return _take(value)

    # State

    def pcrs(self, bank: str, indices: Iterable[int]) -> PcrState:
        """Present values; KeyNotFound where the TPM has no such bank."""
        wanted = sorted(indices)
        values: dict[int, bytes] = {}
        while missing := [index for index in wanted if index not in values]:
            # A TPM answers at most eight values at once.
            chosen = missing[:8]
            selection = t.TPML_PCR_SELECTION.parse(f"{bank}:{','.join(map(str, chosen))}")
            answer = self._call("pcr_read", selection)
            digests = answer[2]
            if len(digests) != len(chosen):
                raise KeyNotFound(f"the TPM keeps no PCRs in the bank {bank}")
            for position, index in enumerate(chosen):
                digest = digests[position]
                values[index] = bytes(digest)
        return PcrState(bank, values)

    def properties(self) -> dict[int, int]:
        """TPM_PT values by number: the fixed ones (0x1..) and the variable ones (0x2..)."""
        found: dict[int, int] = {}
        for start in (0x100, 0x200):
            answer = self._call("get_capability", c.TPM2_CAP.TPM_PROPERTIES, start, 64)
            capability = answer[1]
            data = capability.data
            listed = data.tpmProperties
            for position in range(len(listed)):
                item = listed[position]
                found[int(item.property)] = int(item.value)
        return found

    def handles(self, first: int) -> list[int]:
        """Handles in use in the range that begins at ``first``."""
        answer = self._call("get_capability", c.TPM2_CAP.HANDLES, first, 254)
        capability = answer[1]
        data = capability.data
        listed = data.handles
        return [int(listed[position]) for position in range(len(listed))]

    def free_left_behind(self, names: Iterable[bytes]) -> int:
        """Flush the transient objects that have one of these names; returns how many."""
        wanted, count = set(names), 0
        for number in self.handles(_TRANSIENT):
            handle = self.persistent(number)
            if handle is not None and self.name_of(handle) in wanted:
                self._call("flush_context", handle)
                count += 1
        return count

    def free_all(self) -> int:
        """Flush every transient object and session, whoever uses them; returns how many."""
        count = 0
        for number in [*self.handles(_TRANSIENT), *self.handles(_LOADED_SESSIONS)]:
            with contextlib.suppress(TpmError):
                self._call("flush_context", self._call("tr_from_tpmpublic", number))
                count += 1
        return count

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Any other function of ESAPI; see ``Connection.call``."""
        return self._call(name, *args, **options)


def _ecdsa(answer: Any) -> tuple[int, int]:
    signature = answer.signature
    pair = signature.ecdsa
    r, s = pair.signatureR, pair.signatureS
    return int.from_bytes(bytes(r), "big"), int.from_bytes(bytes(s), "big")


def _take(value: Any) -> bytearray:
    """Copy the content of a TPM2B into a wipeable buffer and clear the TPM2B."""
    cdata = value._cdata
    taken = bytearray(ffi.buffer(cdata.buffer, cdata.size))
    _wipe(value)
    return taken


def _wipe(value: Any) -> None:
    cdata = value._cdata
    ffi.memmove(cdata.buffer, bytes(len(cdata.buffer)), len(cdata.buffer))
