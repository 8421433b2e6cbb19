"""The findings of ``keymgmt doctor`` about AWS KMS: identity, key, rights and context."""

from __future__ import annotations

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
    try_key,
)
from keymgmt_aws._connection import Connection
from keymgmt_aws._keys import usable
from keymgmt_aws._settings import CONTEXT

if TYPE_CHECKING:
    from keymgmt.backend import KeyInfo

__all__ = ["findings"]

# No key decrypts this. AWS checks the permission before it looks at the ciphertext.
_SENSELESS: Final = bytes(64)
_NO_ALIAS: Final = "alias/keymgmt-doctor-asks"


def _failure(call: Callable[[], object]) -> KeymgmtError | None:
    try:
        call()
    except KeymgmtError as error:
        return error
    return None


def findings(
    provider: KeyProvider[Any],
    describe: Callable[[str], KeyInfo],
    connection: Connection,
    key: str | None,
) -> Iterator[Finding]:
    """Check everything once; after a failure the checks that depend on it are skipped."""
    method, known = connection.settings.auth.method, True
    try:
        who = connection.run(lambda kms: kms.identify())
    except AccessDenied as error:
        yield Finding.failure("login", error)
        return
    except KeymgmtError as error:
        # A private network may have a route to AWS KMS, and none to AWS STS.
        known = False
        yield Finding("login", "warning", f"by {method}; the identity is not known: {error}")
    else:
        yield Finding("login", "ok", f"by {method}: {who}")
    if key is None:
        yield _reached(connection, known)
        return
    try:
        info = describe(key)
        usable(info, info.purpose)
    except AccessDenied:
        yield Finding("key", "skipped", f"this login may not describe {key}; wrapping needs it")
        yield from _decrypts(connection, key)
        return
    except KeymgmtError as error:
        yield Finding.failure("key", error)
        return
    yield Finding("key", "ok", f"{key}: {info.kind}, {info.detail['arn']}")
    if info.purpose == "sign":
        why = _failure(lambda: try_key(provider, key, "sign"))
        signed = Finding("signature", "ok", "signed")
        yield Finding.failure("signature", why, may_lack=True) if why else signed
        return
    if info.kind == "symmetric":
        yield from _decrypts(connection, key)
    yield from _round_trip(provider, key)


def _reached(connection: Connection, known: bool) -> Finding:
    """Whether AWS KMS answers to a request for an alias that does not exist."""
    settings = connection.settings
    why = _failure(
        lambda: connection.run(
            lambda kms: kms("describe", _NO_ALIAS, "describe_key", KeyId=_NO_ALIAS)
        )
    )
    # A login that AWS STS knows may lack the right to describe keys; an unknown login may be wrong.
    if why is None or isinstance(why, KeyNotFound) or (known and isinstance(why, AccessDenied)):
        service = settings.endpoint or f"AWS KMS in {settings.region}"
        return Finding("service", "ok", f"{service} answers")
    return Finding.failure("service", why)


def _decrypts(connection: Connection, key: str) -> Iterator[Finding]:
    """Whether this login may unwrap, and whether a policy requires keymgmt's encryption context."""
    settings = connection.settings
    whole = {**settings.context, CONTEXT: "0" * 64}
    native = settings.native(key)

    def asked(pairs: dict[str, str]) -> KeymgmtError | None:
        """The error of Decrypt with these pairs; UnwrapFailed means that only the blob is wrong."""
        request = {"KeyId": native, "CiphertextBlob": _SENSELESS, "EncryptionContext": pairs}
        return _failure(
            lambda: connection.run(lambda kms: kms("decrypt", native, "decrypt", **request))
        )

    why = asked(whole)
    if not isinstance(why, UnwrapFailed):
        odd = UnwrapFailed("the service decrypted random bytes")
        yield Finding.failure("unwrap", why or odd, may_lack=True)
        return
    yield Finding("unwrap", "ok", "kms:Decrypt is granted")
    for name in (CONTEXT, *settings.context):
        why = asked({each: value for each, value in whole.items() if each != name})
        if isinstance(why, AccessDenied):
            yield Finding("policy", "ok", f"it requires {name} in the encryption context")
        elif why is not None and not isinstance(why, UnwrapFailed):
            yield Finding.failure("policy", why)
        else:
            yield Finding(
                "policy",
                "warning",
                f"no policy requires {name} in the encryption context, so this login may decrypt "
                "everything else that the key encrypted",
                "add the condition that keymgmt aws policy prints",
            )


def _round_trip(provider: KeyProvider[Any], key: str) -> Iterator[Finding]:
    try:
        try_key(provider, key)
        with Dek.generate() as dek:
            wrapped = provider.wrap(key, dek, b"keymgmt check")
    except KeymgmtError as error:
        yield Finding.failure("round trip", error, may_lack=True)
        return
    yield Finding("round trip", "ok", "wrapped and unwrapped")
    why = _failure(lambda: provider.unwrap(wrapped, b"another context").wipe())
    if isinstance(why, UnwrapFailed):
        yield Finding("context", "ok", "another context is refused")
    else:
        opened = Finding("context", "failed", "the service opens with another context")
        yield Finding.failure("context", why) if why else opened
