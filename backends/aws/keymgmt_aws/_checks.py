"""What ``keymgmt doctor`` says of AWS KMS: who we are, the key, what we may, the context."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import (
    AccessDenied,
    Dek,
    Finding,
    KeymgmtError,
    KeyNotFound,
    KeyProvider,
    UnwrapFailed,
)
from keymgmt_aws._connection import Connection
from keymgmt_aws._keys import usable
from keymgmt_aws._settings import CONTEXT

if TYPE_CHECKING:
    from keymgmt.backend import KeyInfo

__all__ = ["findings"]

# It decrypts with nobody's key: AWS looks whether we may before it looks at this.
_SENSELESS: Final = bytes(64)
_NO_ALIAS: Final = "alias/keymgmt-doctor-asks"


def _refused(name: str, error: KeymgmtError, *, may_lack: bool = False) -> Finding:
    """A finding of a failure; a right that a machine ``may_lack`` is no fault of it."""
    skipped = may_lack and isinstance(error, AccessDenied)
    return Finding(name, "skipped" if skipped else "failed", str(error), error.hint)


def _failure(call: Callable[[], object]) -> KeymgmtError | None:
    try:
        call()
    except KeymgmtError as error:
        return error
    return None


def findings(
    provider: KeyProvider[Any],
    describe: Callable[[str], KeyInfo],
    sign: Callable[[str, bytes], object],
    connection: Connection,
    key: str | None,
) -> Iterator[Finding]:
    """Look at everything once; what fails becomes a finding, and what hangs on it is left out."""
    method, known = connection.settings.auth.method, True
    try:
        who = connection.run(lambda kms: kms.identify())
    except AccessDenied as error:
        yield _refused("login", error)
        return
    except KeymgmtError as error:
        # A private network may have a way to AWS KMS, and none to AWS STS.
        known = False
        yield Finding("login", "warning", f"by {method}; who we are is not known: {error}")
    else:
        yield Finding("login", "ok", f"by {method}: {who}")
    if key is None:
        yield _reached(connection, known)
        return
    try:
        info = describe(key)
        usable(info, info.purpose)
    except AccessDenied:
        yield Finding("key", "skipped", f"we may not look at {key}; wrapping needs it")
        yield from _decrypts(connection, key)
        return
    except KeymgmtError as error:
        yield _refused("key", error)
        return
    yield Finding("key", "ok", f"{key}: {info.kind}, {info.detail['arn']}")
    if info.purpose == "sign":
        why = _failure(lambda: sign(key, b"keymgmt doctor"))
        signed = Finding("signature", "ok", "signed")
        yield _refused("signature", why, may_lack=True) if why else signed
        return
    if info.kind == "symmetric":
        yield from _decrypts(connection, key)
    yield from _round_trip(provider, key)


def _reached(connection: Connection, known: bool) -> Finding:
    """Whether AWS KMS answers; an alias that nobody has is asked for, which changes nothing."""
    settings = connection.settings
    why = _failure(
        lambda: connection.run(
            lambda kms: kms("describe", _NO_ALIAS, "describe_key", KeyId=_NO_ALIAS)
        )
    )
    # Those whom AWS STS knows may lack that right; of others it is not known.
    if why is None or isinstance(why, KeyNotFound) or (known and isinstance(why, AccessDenied)):
        place = settings.endpoint or f"AWS KMS in {settings.region}"
        return Finding("service", "ok", f"{place} answers")
    return _refused("service", why)


def _decrypts(connection: Connection, key: str) -> Iterator[Finding]:
    """Whether we may unwrap, and whether a policy asks for what should stand in the context."""
    settings = connection.settings
    whole = {**settings.context, CONTEXT: "0" * 64}
    native = settings.native(key)

    def asked(pairs: dict[str, str]) -> KeymgmtError | None:
        """Why nothing can be decrypted with these pairs; UnwrapFailed: only the blob is wrong."""
        request = {"KeyId": native, "CiphertextBlob": _SENSELESS, "EncryptionContext": pairs}
        return _failure(
            lambda: connection.run(lambda kms: kms("decrypt", native, "decrypt", **request))
        )

    why = asked(whole)
    if not isinstance(why, UnwrapFailed):
        odd = UnwrapFailed("the service opened what nobody wrapped")
        yield _refused("unwrap", why or odd, may_lack=True)
        return
    yield Finding("unwrap", "ok", "kms:Decrypt is granted")
    for name in (CONTEXT, *settings.context):
        why = asked({each: value for each, value in whole.items() if each != name})
        if isinstance(why, AccessDenied):
            yield Finding("policy", "ok", f"it asks for {name} in the encryption context")
        elif why is not None and not isinstance(why, UnwrapFailed):
            yield _refused("policy", why)
        else:
            yield Finding(
                "policy",
                "warning",
                f"no policy asks for {name} in the encryption context, so this login may decrypt "
                "whatever else the key encrypted",
                "add the condition that keymgmt aws policy prints",
            )


def _round_trip(provider: KeyProvider[Any], key: str) -> Iterator[Finding]:
    context = os.urandom(32)
    try:
        with Dek.generate() as dek:
            wrapped = provider.wrap(key, dek, context)
            with provider.unwrap(wrapped, context) as again:
                same = again == dek
    except KeymgmtError as error:
        yield _refused("round trip", error, may_lack=True)
        return
    text = "wrapped and unwrapped" if same else "another data key came back"
    yield Finding("round trip", "ok" if same else "failed", text)
    why = _failure(lambda: provider.unwrap(wrapped, os.urandom(32)).wipe())
    if isinstance(why, UnwrapFailed):
        yield Finding("context", "ok", "another one is refused")
    else:
        opened = Finding("context", "failed", "the service opens with another one")
        yield _refused("context", why) if why else opened
