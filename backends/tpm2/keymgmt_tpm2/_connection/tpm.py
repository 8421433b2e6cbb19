"""The commands of a TPM that keymgmt uses. A ``Tpm`` object serves one operation.

Rules: every transient object and session is flushed on every path; every command that carries a
secret runs in a session that is salted to the storage root key and encrypts parameters; the root
key's name is first compared with the pinned name, so that an attacker on the bus cannot substitute
a root key. Nothing of libtss2 leaves this module except handles.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

from tpm2_pytss import constants as c
from tpm2_pytss import types as t
from tpm2_pytss._libtpm2_pytss import ffi

from keymgmt.backend import KeyNotFound, ProviderUnavailable, wipe
from keymgmt_tpm2._connection.journal import Journal
from keymgmt_tpm2._connection.tcti import ESAPI, TCTILdr, TSS2_Exception
from keymgmt_tpm2._errors import HANDLE, HIERARCHY, TpmError
from keymgmt_tpm2._lockout import Lockout
from keymgmt_tpm2._structures import Public, sized
from keymgmt_tpm2.policy._policy import BANKS, PcrState

__all__ = ["Tpm"]

_TRANSIENT: Final = 0x80000000
_LOADED_SESSIONS: Final = 0x02000000
_SAVED_SESSIONS: Final = 0x03000000
_HASHES: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_STARTUP_CLEAR: Final = 0x201
_OWNER_ENABLED: Final = 0x2
_SETUP_HINT: Final = "see it, or with --create make it: keymgmt tpm setup PROVIDER"


def _aes() -> Any:
    return t.TPMT_SYM_DEF(
        algorithm=c.TPM2_ALG.AES,
        keyBits=t.TPMU_SYM_KEY_BITS(aes=128),
        mode=t.TPMU_SYM_MODE(aes=c.TPM2_ALG.CFB),
    )


class Tpm:
    """A connection and the objects that were loaded over it; the end of ``with`` frees and closes.

    Args:
        tcti: the path to the TPM.
        srk_handle: persistent handle of the storage root key.
        srk_name: its pinned name, or None to accept any (set-up and doctor only).
        given_up: set when the caller no longer waits for this operation. Then only commands that
            free loaded objects are sent.
        use_last_try: whether a PIN may be sent although a wrong PIN would lock the TPM.
        journal: notes the loaded objects.

    Raises:
        TpmError: the TPM was not reached.
    """

    def __init__(
        self,
        tcti: str,
        srk_handle: int,
        srk_name: bytes | None,
        given_up: threading.Event,
        *,
        use_last_try: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self._srk_handle, self._srk_name = srk_handle, srk_name
        self._given_up, self._use_last_try = given_up, use_last_try
        self._open: list[Any] = []
        self._journal = journal or Journal(None)
        self._srk: Any = None
        self._auth_set = False
        with contextlib.ExitStack() as stack:
            try:
                line = TCTILdr.parse(tcti)
                stack.callback(line.close)
                self._esapi = ESAPI(line)
                stack.callback(self._esapi.close)
            except TSS2_Exception as error:
                raise TpmError(int(error.rc)) from error
            self._closing = stack.pop_all()

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
        with self._closing:
            self.flush_all()

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a function of ESAPI by its name.

        The caller must keep the result in a variable while it reads parts of it: a chained read
        such as ``call(...)[0].buffer`` returns freed memory (tpm2-pytss).

        Raises:
            TpmError: a response code that is not success, or a connection that broke.
            ProviderUnavailable: the caller does not wait for the answer any more.
        """
        if self._given_up.is_set():
            raise ProviderUnavailable("the operation was given up")
        try:
            return getattr(self._esapi, name)(*args, **options)
        except TSS2_Exception as error:
            raise TpmError(int(error.rc), name, (*args, *options.values())) from error

    # Handles

    def opened(self, handle: Any) -> Any:
        """Register a transient object or session, which is flushed at the end."""
        self._open.append(handle)
        if self._journal.kept:
            self._journal.add(int(self._esapi.tr_get_tpm_handle(handle)))
        return handle

    def flush(self, handle: Any) -> None:
        """Free a transient object or session, also after the operation was given up.

        An object in the journal of a given-up operation is left alone: the next operation frees it,
        and may already have loaded another object under the same handle.
        """
        self._open.remove(handle)
        if self._journal.kept and self._given_up.is_set():
            return
        # If the connection broke, the error is ignored: a TPM that was reset has freed everything.
        with contextlib.suppress(TSS2_Exception):
            self._esapi.flush_context(handle)

    def flush_all(self) -> None:
        """Free everything that this object loaded."""
        while self._open:
            self.flush(self._open[-1])
        if not self._given_up.is_set():
            self._journal.end()

    def load(self, public: Public, private: bytes) -> Any:
        """Load a key under the storage root key; the TPM checks that its parts belong together."""
        return self.opened(
            self.call(
                "load",
                self.srk(),
                t.TPM2B_PRIVATE.unmarshal(sized(private))[0],
                t.TPM2B_PUBLIC.unmarshal(sized(public.raw))[0],
            )
        )

    def load_verifier(self, public: Public) -> Any:
        """Load a public key that verifies signatures for PolicyAuthorize."""
        # PolicyAuthorize needs the ticket of the verification, which is empty in the NULL
        # hierarchy, the default.
        blob = t.TPM2B_PUBLIC.unmarshal(sized(public.raw))[0]
        handle = self.call("load_external", blob, hierarchy=c.ESYS_TR.OWNER)
        return self.opened(handle)

    def srk(self) -> Any:
        """The storage root key.

        Raises:
            KeyNotFound: nothing is at its handle.
            ProviderUnavailable: its name is not the pinned one.
        """
        if self._srk is None:
            handle = self.persistent(self._srk_handle)
            if handle is None:
                self.check_owner_enabled()
                raise KeyNotFound(
                    f"the TPM has no storage root key at {self._srk_handle:#010x}",
                    hint=_SETUP_HINT,
                )
            name = self.name_of(handle)
            if self._srk_name is not None and name != self._srk_name:
                raise ProviderUnavailable(
                    f"the storage root key at {self._srk_handle:#010x} is {name.hex()}, "
                    f"and the config pins {self._srk_name.hex()}",
                    hint="this is another TPM, it was cleared, or a device on the bus replaces it",
                )
            self._srk = handle
        return self._srk

    def persistent(self, handle: int) -> Any:
        """A persistent object or NV index, or None where nothing is at this handle."""
        try:
            return self.call("tr_from_tpmpublic", handle)
        except TpmError as error:
            if error.code == HANDLE:
                return None
            raise

    def check_owner_enabled(self) -> None:
        """TpmError if the owner hierarchy is disabled, and with it every persistent key."""
        if not self.properties(0x200).get(_STARTUP_CLEAR, 0) & _OWNER_ENABLED:
            raise TpmError(HIERARCHY, arguments=(c.ESYS_TR.OWNER,))

    def name_of(self, handle: Any) -> bytes:
        """The name of an object or NV index."""
        name = self.call("tr_get_name", handle)
        return bytes(name)

    def public_of(self, handle: Any) -> Public:
        """The public area of a loaded object."""
        answer = self.call("read_public", handle)
        public = answer[0]
        return Public.parse(bytes(public.publicArea.marshal()))

    # Sessions

    def session(self, *, policy: bool = False, salted: bool = True, once: bool = False) -> Any:
        """A session salted to the storage root key that encrypts the first parameter both ways.

        Without salt, for use before there is a root key, it only keeps an auth value off the bus.
        With ``once`` the TPM ends the session after the first successful command: see ``use_once``.
        """
        kind = c.TPM2_SE.POLICY if policy else c.TPM2_SE.HMAC
        session = self.opened(
            self.call(
                "start_auth_session",
                tpm_key=self.srk() if salted else c.ESYS_TR.NONE,
                bind=c.ESYS_TR.NONE,
                session_type=kind,
                symmetric=_aes(),
                auth_hash=c.TPM2_ALG.SHA256,
            )
        )
        attributes = c.TPMA_SESSION(0) if once else c.TPMA_SESSION.CONTINUESESSION
        if salted:
            attributes |= c.TPMA_SESSION.ENCRYPT | c.TPMA_SESSION.DECRYPT
        self.call("trsess_set_attributes", session, attributes)
        return session

    def use_once(self, session: Any, name: str, *args: Any, **options: Any) -> Any:
        """``call`` with a session that ends with the call, which saves the command to flush it."""
        answer = self.call(name, *args, session1=session, **options)
        self._open.remove(session)
        return answer

    def set_auth(self, handle: Any, auth: bytearray) -> None:
        """Give ESAPI the auth value of an object, for HMACs; it never goes over the bus."""
        self._auth_set = True
        value = t.TPM2B_AUTH(bytes(auth))
        try:
            self.call("tr_set_auth", handle, value)
        finally:
            _wipe(value)

    def set_pin(self, handle: Any, pin: bytearray) -> None:
        """Give ESAPI the PIN of the key that is used next.

        Raises:
            LockedOut: a wrong PIN would lock the TPM, or the TPM is locked.
        """
        self.lockout().check(use_last=self._use_last_try)
        self.set_auth(handle, pin)

    def set_owner_auth(self, auth: bytearray | None) -> None:
        """Give ESAPI the owner hierarchy's password, unless it is None."""
        if auth is not None:
            self.set_auth(c.ESYS_TR.OWNER, auth)

    def set_endorsement_auth(self, auth: bytearray | None) -> None:
        """Give ESAPI the endorsement hierarchy's password, unless it is None."""
        if auth is not None:
            self.set_auth(c.ESYS_TR.ENDORSEMENT, auth)

    # Keys

    def create(self, template: bytes, auth: bytearray) -> tuple[bytes, Public]:
        """Create a key under the storage root key; returns its private part and public area."""
        sensitive = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(userAuth=bytes(auth)))
        try:
            answer = self.call(
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
        ecc_point = t.TPM2B_ECC_POINT(t.TPMS_ECC_POINT(x=x, y=y))
        answer = self.use_once(session, "ecdh_zgen", key, ecc_point)
        coordinate = _take(answer.point.x)
        _wipe(answer.point.y)
        # A TPM may leave out leading zeros of a coordinate.
        z = bytearray(half - len(coordinate)) + coordinate
        wipe(coordinate)
        return z

    def rsa_decrypt(self, key: Any, ciphertext: bytes, session: Any) -> bytearray:
        """Decrypt with the key's own scheme, RSA-OAEP with SHA-256; the caller wipes the result."""
        scheme = t.TPMT_RSA_DECRYPT(scheme=c.TPM2_ALG.NULL)
        answer = self.use_once(session, "rsa_decrypt", key, ciphertext, scheme, b"")
        return _take(answer)

    def sign(self, key: Any, digest: bytes, session: Any) -> tuple[int, int]:
        """An ECDSA signature (r, s) over a SHA-256 digest, with the key's own scheme."""
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        ticket = t.TPMT_TK_HASHCHECK(tag=c.TPM2_ST.HASHCHECK, hierarchy=c.TPM2_RH.NULL)
        return _ecdsa(self.use_once(session, "sign", key, digest, scheme, ticket))

    def activate(self, ak: Any, ek: Any, credential: bytes, seed: bytes, session: Any) -> bytearray:
        """The secret of a credential for this EK and AK; the caller wipes it."""
        return _take(self.call("activate_credential", ak, ek, credential, seed, session2=session))

    def certify(
        self, key: Any, ak: Any, value: bytes, session: Any
    ) -> tuple[bytes, tuple[int, int]]:
        """The TPMS_ATTEST of a key by an attestation key, which holds ``value``; its signature."""
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        answer = self.call("certify", key, ak, value, scheme, session1=session)
        attest, signature = answer[0], answer[1]
        return bytes(attest), _ecdsa(signature)

    def quote(
        self, ak: Any, value: bytes, pcrs: PcrState, session: Any
    ) -> tuple[bytes, tuple[int, int]]:
        """TPMS_ATTEST of what these PCRs hold now, with ``value`` in it, and its signature."""
        selection = t.TPML_PCR_SELECTION.parse(str(pcrs))
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        answer = self.call("quote", ak, selection, value, scheme, session1=session)
        attest, signature = answer[0], answer[1]
        return bytes(attest), _ecdsa(signature)

    # State

    def pcrs(self, bank: str, indices: Iterable[int]) -> PcrState:
        """Present values of PCRs; KeyNotFound where the TPM has no such bank."""
        wanted = sorted(indices)
        values: dict[int, bytes] = {}
        while missing := [index for index in wanted if index not in values]:
            # One PCR_Read answers at most eight values (Part 2, TPML_DIGEST).
            chosen = missing[:8]
            selection = t.TPML_PCR_SELECTION.parse(f"{bank}:{','.join(map(str, chosen))}")
            answer = self.call("pcr_read", selection)
            digests = answer[2]
            if len(digests) != len(chosen):
                raise self._no_bank(bank, wanted)
            for position, index in enumerate(chosen):
                digest = digests[position]
                values[index] = bytes(digest)
        return PcrState(bank, values)

    def _no_bank(self, bank: str, indices: Iterable[int]) -> KeyNotFound:
        banks = self.banks()
        usable = [each for each in banks if each in BANKS]
        listed = ",".join(map(str, indices))
        hint = "turn a bank on in the firmware's setup"
        if usable:
            hint = f"this TPM has {', '.join(banks)}: write {usable[-1]}:{listed}"
        return KeyNotFound(f"the TPM keeps no PCRs in the bank {bank}", hint=hint)

    def banks(self) -> list[str]:
        """The names of the active PCR banks; the number of a hash that has no name here."""
        answer = self.call("get_capability", c.TPM2_CAP.PCRS, 0, 16)
        capability = answer[1]
        data = capability.data
        assigned = data.assignedPCR
        names = []
        for position in range(len(assigned)):
            selection = assigned[position]
            if any(bytes(selection.pcrSelect)):
                number = int(selection.hash)
                names.append(_HASHES.get(number, f"{number:#06x}"))
        return names

    def lockout(self) -> Lockout:
        """The number of wrong tries, and how many of them lock the TPM."""
        return Lockout.of(self.properties(0x200))

    def properties(self, *groups: int) -> dict[int, int]:
        """TPM_PT values by number: the fixed group (0x100), the variable group (0x200), or both."""
        values: dict[int, int] = {}
        for start in groups or (0x100, 0x200):
            answer = self.call("get_capability", c.TPM2_CAP.TPM_PROPERTIES, start, 64)
            capability = answer[1]
            data = capability.data
            listed = data.tpmProperties
            for position in range(len(listed)):
                tagged = listed[position]
                values[int(tagged.property)] = int(tagged.value)
        return values

    def handles(self, first: int) -> list[int]:
        """Handles in use in the range that begins at ``first``."""
        answer = self.call("get_capability", c.TPM2_CAP.HANDLES, first, 254)
        capability = answer[1]
        data = capability.data
        listed = data.handles
        return [int(listed[position]) for position in range(len(listed))]

    def free(self, handles: Iterable[int]) -> int:
        """Flush transient objects and sessions of any process; returns how many were flushed."""
        count = 0
        for number in handles:
            with contextlib.suppress(TpmError):
                self.call("flush_context", self.call("tr_from_tpmpublic", number))
                count += 1
        return count

    def free_all(self) -> int:
        """Flush every transient object and session, loaded and saved, of any process."""
        ranges = (_TRANSIENT, _LOADED_SESSIONS, _SAVED_SESSIONS)
        return sum(self.free(self.handles(first)) for first in ranges)


def _ecdsa(answer: Any) -> tuple[int, int]:
    signature = answer.signature
    pair = signature.ecdsa
    r, s = pair.signatureR, pair.signatureS
    return int.from_bytes(bytes(r), "big"), int.from_bytes(bytes(s), "big")


def _take(value: Any) -> bytearray:
    """Copy the content of a TPM2B into a wipeable buffer and clear the TPM2B."""
    cdata = value._cdata
    content = bytearray(ffi.buffer(cdata.buffer, cdata.size))
    _wipe(value)
    return content


def _wipe(value: Any) -> None:
    cdata = value._cdata
    ffi.memmove(cdata.buffer, bytes(len(cdata.buffer)), len(cdata.buffer))
