"""What ``keymgmt doctor`` says of AWS KMS: who we are, the key, what we may, the context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from keymgmt.backend import (
    AccessDenied,
    Dek,
    Finding,
    Health,
    KeymgmtError,
    KeyNotFound,
    UnwrapFailed,
    check_key,
)
from keymgmt_aws._connection import Connection, Service
from keymgmt_aws._settings import CONTEXT

if TYPE_CHECKING:
    from keymgmt_aws._keys import Keys
    from keymgmt_aws._wrapping import Wrapping

__all__ = ["check"]

# It decrypts with nobody's key: AWS looks whether we may before it looks at this.
_SENSELESS: Final = bytes(64)
_NO_ALIAS: Final = "alias/keymgmt-doctor-asks"


def check(connection: Connection, keys: Keys, wrapping: Wrapping, key: str | None) -> Health:
    """Look at everything once; what fails becomes a finding, and what hangs on it is left out."""
    return Health(tuple(_findings(connection, keys, wrapping, key)))


def _failed(name: str, error: KeymgmtError) -> Finding:
    return Finding(name, "failed", str(error), error.hint)


def _findings(
    connection: Connection, keys: Keys, wrapping: Wrapping, key: str | None
) -> Iterator[Finding]:
    method, known = connection.settings.auth.method, True
    try:
        who = connection.run(lambda kms: kms.identify())
    except AccessDenied as error:
        yield _failed("login", error)
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
        described = connection.run(lambda kms: keys.describe(kms, check_key(key)))
    except AccessDenied:
        yield Finding("key", "skipped", f"we may not look at {key}; wrapping needs it")
        yield from _decrypts(connection, key)
        return
    except KeymgmtError as error:
        yield _failed("key", error)
        return
    try:
        described.usable(described.purpose)
    except KeymgmtError as error:
        yield _failed("key", error)
        return
    yield Finding("key", "ok", f"{key}: {described.kind}, {described.arn}")
    if described.purpose == "sign":
        yield _signs(connection, keys, key)
        return
    if described.kind == "symmetric":
        yield from _decrypts(connection, key)
    yield from _round_trip(wrapping, key)


def _reached(connection: Connection, known: bool) -> Finding:
    """Whether AWS KMS answers; an alias that nobody has is asked for, which changes nothing."""
    settings = connection.settings
    place = settings.endpoint or f"AWS KMS in {settings.region}"
    try:
        connection.run(lambda kms: kms("describe", _NO_ALIAS, "describe_key", KeyId=_NO_ALIAS))
    except KeyNotFound:
        pass
    except AccessDenied as error:
        # Those whom AWS STS knows may lack that right; of others it is not known.
        if not known:
            return _failed("service", error)
    except KeymgmtError as error:
        return _failed("service", error)
    return Finding("service", "ok", f"{place} answers")


def _decrypts(connection: Connection, key: str) -> Iterator[Finding]:
    """Whether we may unwrap, and whether a policy asks for what should stand in the context."""
    settings = connection.settings
    native, hashed = settings.native(key), {CONTEXT: "0" * 64}

    def asked(pairs: dict[str, str]) -> KeymgmtError | None:
        """Why nothing can be decrypted with these pairs, or None where only the blob is wrong."""

        def ask(kms: Service) -> None:
            blob = {"KeyId": native, "CiphertextBlob": _SENSELESS}
            kms("decrypt", native, "decrypt", EncryptionContext=pairs, **blob)

        try:
            connection.run(ask)
        except UnwrapFailed:
            return None
        except KeymgmtError as error:
            return error
        return UnwrapFailed("the service opened what nobody wrapped")

    refused = asked({**settings.context, **hashed})
    if isinstance(refused, AccessDenied):
        yield Finding("unwrap", "skipped", f"we may not unwrap: {refused}", refused.hint)
        return
    if refused is not None:
        yield _failed("unwrap", refused)
        return
    yield Finding("unwrap", "ok", "kms:Decrypt is granted")
    lacking = {CONTEXT: settings.context} | {
        name: {**settings.context, **hashed} for name in settings.context
    }
    for name, pairs in lacking.items():
        refused = asked({each: value for each, value in pairs.items() if each != name})
        if isinstance(refused, AccessDenied):
            yield Finding("policy", "ok", f"it asks for {name} in the encryption context")
        elif refused is not None:
            yield _failed("policy", refused)
        else:
            yield Finding(
                "policy",
                "warning",
                f"no policy asks for {name} in the encryption context, so this login may decrypt "
                "whatever else the key encrypted",
                "add the condition that keymgmt aws policy prints",
            )


def _signs(connection: Connection, keys: Keys, key: str) -> Finding:
    try:
        connection.run(lambda kms: keys.sign(kms, key, b"keymgmt doctor"))
    except AccessDenied as error:
        return Finding("signature", "skipped", f"we may not sign: {error}", error.hint)
    except KeymgmtError as error:
        return _failed("signature", error)
    return Finding("signature", "ok", "signed")


def _round_trip(wrapping: Wrapping, key: str) -> Iterator[Finding]:
    context, doing = os.urandom(32), "wrap"
    try:
        with Dek.generate() as dek:
            wrapped = wrapping.wrap(key, dek, context)
            doing = "unwrap"
            with wrapping.unwrap(wrapped, context) as again:
                same = again == dek
    except AccessDenied as error:
        yield Finding("round trip", "skipped", f"we may not {doing}: {error}", error.hint)
        return
    except KeymgmtError as error:
        yield _failed("round trip", error)
        return
    text = "wrapped and unwrapped" if same else "another data key came back"
    yield Finding("round trip", "ok" if same else "failed", text)
    try:
        wrapping.unwrap(wrapped, os.urandom(32)).wipe()
    except UnwrapFailed:
        yield Finding("context", "ok", "another one is refused")
    except KeymgmtError as error:
        yield _failed("context", error)
    else:
        yield Finding("context", "failed", "the service opens with another one")
