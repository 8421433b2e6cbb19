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
from typing import TYPE_CHECKING, Any, Final, Self

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss import constants as c
from tpm2_pytss import types as t
from tpm2_pytss._libtpm2_pytss import ffi

from keymgmt.backend import ConfigError, KeyNotFound, ProviderUnavailable, wipe
from keymgmt_tpm2._connection.journal import Journal
from keymgmt_tpm2._connection.tcti import ESAPI, TCTILdr, TSS2_Exception
from keymgmt_tpm2._errors import HANDLE, HIERARCHY, NV_DEFINED, TpmError
from keymgmt_tpm2._lockout import Lockout
from keymgmt_tpm2._structures import ALG_RSA, Public, ecdsa_pair, sha256, sized
from keymgmt_tpm2.policy._policy import BANKS, PcrState

if TYPE_CHECKING:
    from keymgmt_tpm2._settings import Tpm2Settings
    from keymgmt_tpm2.policy._index import NvIndex

__all__ = ["Tpm"]

_TRANSIENT: Final = 0x80000000
_LOADED_SESSIONS: Final = 0x02000000
_SAVED_SESSIONS: Final = 0x03000000
_HASHES: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_STARTUP_CLEAR: Final = 0x201
_OWNER_ENABLED: Final = 0x2
_NV_CHUNK: Final = 512
_SETUP_HINT: Final = "see it, or with --create make it: keymgmt tpm setup PROVIDER"


class Tpm:
    """A connection and the objects that were loaded over it; the end of ``with`` frees and closes.

    Args:
        settings: the path to the TPM, its storage root key, and whether a PIN may be its last try.
        given_up: set when the caller no longer waits for this operation. Then only commands that
            free loaded objects are sent.
        journal: notes the loaded objects.
        pinned: whether the root key must have the pinned name (not in set-up and doctor).
        pin: of the key that is used, where it has one.

    Raises:
        TpmError: the TPM was not reached.
    """

    def __init__(
        self,
        settings: Tpm2Settings,
        given_up: threading.Event,
        journal: Journal,
        *,
        pinned: bool,
        pin: bytearray | None,
    ) -> None:
        self._settings, self._pinned, self._pin = settings, pinned, pin
        self._given_up, self._journal = given_up, journal
        self._open: list[Any] = []
        self._srk: Any = None
        self._auth_set = False
        with contextlib.ExitStack() as stack:
            try:
                line = TCTILdr.parse(settings.tcti)
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
        part = t.TPM2B_PRIVATE.unmarshal(sized(private))[0]
        return self.opened(self.call("load", self.srk(), part, _public(public.raw)))

    def srk(self) -> Any:
        """The storage root key.

        Raises:
            KeyNotFound: nothing is at its handle.
            ProviderUnavailable: its name is not the pinned one.
        """
        if self._srk is None:
            where = self._settings.srk
            handle = self.persistent(self._settings.srk_handle)
            if handle is None:
                self.check_owner_enabled()
                raise KeyNotFound(f"the TPM has no storage root key at {where}", hint=_SETUP_HINT)
            if self._pinned:
                self.check_srk_name(handle)
            self._srk = handle
        return self._srk

    def check_srk_name(self, srk: Any) -> None:
        """ProviderUnavailable unless the storage root key has the pinned name."""
        name, settings = self.name_of(srk).hex(), self._settings
        if name != settings.srk_name:
            raise ProviderUnavailable(
                f"the storage root key at {settings.srk} is {name}, "
                f"and the config pins {settings.srk_name}",
                hint="this is another TPM, it was cleared, or a device on the bus replaces it",
            )

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

    def public_bytes(self, handle: Any) -> bytes:
        """The TPMT_PUBLIC of a loaded object."""
        answer = self.call("read_public", handle)
        public = answer[0]
        return bytes(public.publicArea.marshal())

    def public_of(self, handle: Any) -> Public:
        """The public area of a loaded object."""
        return Public.parse(self.public_bytes(handle))

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
                symmetric="aes128cfb",
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

    def set_pin(self, handle: Any) -> None:
        """Give ESAPI the PIN, if there is one, of the key that is used next.

        Raises:
            LockedOut: a wrong PIN would lock the TPM, or the TPM is locked.
        """
        if self._pin is not None:
            self.lockout().check(use_last=self._settings.use_last_try)
            self.set_auth(handle, self._pin)

    def set_password(self, hierarchy: str, password: bytearray) -> None:
        """Give ESAPI the password of the ``owner``, ``endorsement`` or ``lockout`` hierarchy."""
        self.set_auth(c.ESYS_TR.parse(hierarchy), password)

    # Keys

    def create(self, template: bytes) -> tuple[bytes, Public]:
        """Create a key, with the PIN, under the root key; its private part and public area."""
        auth = bytes(self._pin or b"")
        sensitive = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(userAuth=auth))
        try:
            answer = self.call(
                "create", self.srk(), sensitive, _public(template), session1=self.session()
            )
        finally:
            _wipe(sensitive.sensitive.userAuth)
        private, public = answer[0], answer[1]
        return bytes(private), Public.parse(bytes(public.publicArea.marshal()))

    def try_srk(self, template: bytes) -> None:
        """Create a small object under the root key, which fails if the root key has a password."""
        content = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(data=b"a trial"))
        self.call("create", self.srk(), content, _public(template))

    def create_primary(self, hierarchy: str, template: bytes, session: Any) -> Any:
        """The loaded primary key of a template, in the ``owner`` or ``endorsement`` hierarchy."""
        empty, parent = t.TPM2B_SENSITIVE_CREATE(), c.ESYS_TR.parse(hierarchy)
        answer = self.call("create_primary", empty, _public(template), parent, session1=session)
        return self.opened(answer[0])

    def make_persistent(self, primary: Any, handle: int, session: Any) -> None:
        """Keep a primary key of the owner at a persistent handle."""
        self.call("evict_control", c.ESYS_TR.OWNER, primary, handle, session1=session)

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

    def sign(self, key: Any, digest: bytes, session: Any) -> bytes:
        """An ECDSA signature, in DER, over a SHA-256 digest, with the key's own scheme."""
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        ticket = t.TPMT_TK_HASHCHECK(tag=c.TPM2_ST.HASHCHECK, hierarchy=c.TPM2_RH.NULL)
        return _ecdsa(self.use_once(session, "sign", key, digest, scheme, ticket))

    def verify(self, signer: Public, message: bytes, signature: bytes) -> Any:
        """The ticket for PolicyAuthorize that a key signed a message: ECDSA in DER, or RSASSA."""
        # In the NULL hierarchy, the default, the ticket is empty.
        key = self.call("load_external", _public(signer.raw), hierarchy=c.ESYS_TR.OWNER)
        self.opened(key)
        try:
            return self.call(
                "verify_signature", key, sha256(message), _signature(signer, signature)
            )
        finally:
            self.flush(key)

    def endorsement_session(self) -> Any:
        """A policy session in which the password of the endorsement hierarchy was proved."""
        session, hmac = self.session(policy=True), self.session()
        endorsement = c.ESYS_TR.ENDORSEMENT
        self.call("policy_secret", endorsement, session, b"", b"", b"", 0, session1=hmac)
        self.flush(hmac)
        return session

    def activate(self, ak: Any, ek: Any, credential: bytes, seed: bytes, session: Any) -> bytearray:
        """The secret of a credential for this EK and AK; the caller wipes it."""
        return _take(self.call("activate_credential", ak, ek, credential, seed, session2=session))

    def certify(self, key: Any, ak: Any, value: bytes, session: Any) -> tuple[bytes, bytes]:
        """The TPMS_ATTEST of a key by an attestation key, which holds ``value``; its signature."""
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        answer = self.call("certify", key, ak, value, scheme, session1=session)
        attest, signature = answer[0], answer[1]
        return bytes(attest), _ecdsa(signature)

    def quote(self, ak: Any, value: bytes, pcrs: PcrState, session: Any) -> tuple[bytes, bytes]:
        """TPMS_ATTEST of what these PCRs hold now, with ``value`` in it, and its signature."""
        selection = t.TPML_PCR_SELECTION.parse(str(pcrs))
        scheme = t.TPMT_SIG_SCHEME(scheme=c.TPM2_ALG.NULL)
        answer = self.call("quote", ak, selection, value, scheme, session1=session)
        attest, signature = answer[0], answer[1]
        return bytes(attest), _ecdsa(signature)

    # NV indices

    def nv_define(self, index: NvIndex, session: Any, hint: str) -> Any:
        """Define an index as its owner; its handle.

        One that is there and was never written is defined anew: its name does not say that nobody
        gave it an auth value.

        Raises:
            ConfigError: it is in use; with this hint.
        """
        there = self.persistent(index.number)
        if there is not None and self.name_of(there) == index.new_name:
            self.nv_undefine(index.number, session)
        area = t.TPMS_NV_PUBLIC(
            nvIndex=index.number,
            nameAlg=c.TPM2_ALG.SHA256,
            attributes=c.TPMA_NV(index.attributes),
            authPolicy=index.policy,
            dataSize=index.size,
        )
        public = t.TPM2B_NV_PUBLIC(nvPublic=area)
        try:
            return self.call("nv_define_space", b"", public, c.ESYS_TR.OWNER, session1=session)
        except TpmError as error:
            if error.code == NV_DEFINED:
                raise ConfigError(f"the NV index {index} is in use", hint=hint) from error
            raise

    def nv_undefine(self, index: int, session: Any) -> None:
        """Take an index away, as its owner; nothing where there is none."""
        handle = self.persistent(index)
        if handle is not None:
            self.call("nv_undefine_space", handle, c.ESYS_TR.OWNER, session1=session)

    def nv_attributes(self, handle: Any) -> tuple[int, int]:
        """TPMA_NV and size in bytes of an index."""
        answer = self.call("nv_read_public", handle)
        public = answer[0]
        area = public.nvPublic
        return int(area.attributes), int(area.dataSize)

    def nv_read(self, handle: Any) -> bytes:
        """The content of an index that is read with its own, empty auth value."""
        _, size = self.nv_attributes(handle)
        content = b""
        while len(content) < size:
            length = min(_NV_CHUNK, size - len(content))
            part = self.call("nv_read", handle, length, len(content), auth_handle=handle)
            if not bytes(part):
                break  # a TPM that returns no bytes would be asked for ever
            content += bytes(part)
        return content

    def policy_nv(self, session: Any, handle: Any, operand: bytes) -> None:
        """PolicyNV in a session: the content of an index is at most ``operand``, both unsigned."""
        self.call("policy_nv", handle, handle, session, operand, c.TPM2_EO.UNSIGNED_LE, 0)

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

    def clear_lockout(self, session: Any) -> None:
        """Forget the counted wrong tries, and unlock."""
        self.call("dictionary_attack_lock_reset", c.ESYS_TR.LOCKOUT, session1=session)

    def set_lockout(self, limit: int, interval: int, recovery: int, session: Any) -> None:
        """Set what ``Lockout`` has under these names."""
        change, times = "dictionary_attack_parameters", (limit, interval, recovery)
        self.call(change, *times, lock_handle=c.ESYS_TR.LOCKOUT, session1=session)

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
        """Flush transient objects and sessions of any process; returns how many were flushed.

        Raises:
            TpmError: the connection broke; one that is gone already is passed over.
        """
        count = 0
        for number in handles:
            try:
                self.call("flush_context", self.call("tr_from_tpmpublic", number))
                count += 1
            except TpmError as error:
                if error.of_library:
                    raise
        return count

    def free_all(self) -> int:
        """Flush every transient object and session, loaded and saved, of any process."""
        ranges = (_TRANSIENT, _LOADED_SESSIONS, _SAVED_SESSIONS)
        return sum(self.free(self.handles(first)) for first in ranges)


def _public(raw: bytes) -> Any:
    return t.TPM2B_PUBLIC.unmarshal(sized(raw))[0]


def _signature(signer: Public, signature: bytes) -> Any:
    if signer.kind == ALG_RSA:
        made = t.TPMT_SIGNATURE(sigAlg=c.TPM2_ALG.RSASSA)
        made.signature.rsassa.hash = c.TPM2_ALG.SHA256
        made.signature.rsassa.sig = signature
        return made
    made = t.TPMT_SIGNATURE(sigAlg=c.TPM2_ALG.ECDSA)
    made.signature.ecdsa.hash = c.TPM2_ALG.SHA256
    r, s = ecdsa_pair(signature)
    made.signature.ecdsa.signatureR = r
    made.signature.ecdsa.signatureS = s
    return made


def _ecdsa(answer: Any) -> bytes:
    """An ECDSA signature of the TPM, in DER."""
    signature = answer.signature
    pair = signature.ecdsa
    r, s = pair.signatureR, pair.signatureS
    return encode_dss_signature(int.from_bytes(bytes(r), "big"), int.from_bytes(bytes(s), "big"))


def _take(value: Any) -> bytearray:
    """Copy the content of a TPM2B into a wipeable buffer and clear the TPM2B."""
    cdata = value._cdata
    content = bytearray(ffi.buffer(cdata.buffer, cdata.size))
    _wipe(value)
    return content


def _wipe(value: Any) -> None:
    cdata = value._cdata
    ffi.memmove(cdata.buffer, bytes(len(cdata.buffer)), len(cdata.buffer))
