"""What AWS KMS, AWS STS and botocore say when something goes wrong, as one table.

A code is the service's own (API reference of AWS KMS, "Common errors" and each operation's), or the
name of botocore's exception where there was no answer. An answer that is none of the service's is
never taken for a refusal, whatever its status is.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Fault,
    FaultTable,
    KeyNotFound,
    KeyRetired,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

__all__ = ["CHANGES", "EXPIRED", "FAULTS", "UNSPEAKABLE", "Verb", "code_of", "error_of"]

Verb = Literal[
    "encrypt",
    "decrypt",
    "sign",
    "describe",
    "list",
    "create",
    "rotate",
    "delete",
    "login",
    "identify",
]
CHANGES: Final = ("create", "rotate", "delete")
"""Never repeated where the service may have carried them out."""

EXPIRED: Final = "ExpiredTokenException"

UNSPEAKABLE: Final = ("ResponseParserError", "CredentialRetrievalError")
"""Exceptions of botocore that repeat an answer, or what a program said: it may hold a secret."""

_LOOK: Final = "look at the region, the endpoint, and this machine's network"
_CREDENTIALS: Final = "look at auth: the credentials are wrong, deleted or of another partition"
_POLICY: Final = "grant it in the key's policy or the role's: keymgmt aws policy prints the least"


def _unreached(message: str, hint: str = _LOOK, *, passing: bool = True) -> Fault:
    return Fault(ProviderUnavailable, message, hint, passing)


_THROTTLED: Final = _unreached(
    "AWS limits how often this account may call", "call less often, or ask AWS for a higher quota"
)
_BROKEN: Final = _unreached("the service has trouble of its own", "try again later")
_MISSING: Final = Fault(
    KeyNotFound, "there is no such key or alias", "make it with: keymgmt keys create PROVIDER:KEY"
)
_PENDING: Final = Fault(
    KeyRetired,
    "the key is pending deletion",
    "cancel its deletion in AWS KMS while there is time, or rewrap where another group opens",
)
_OTHER_KEY: Final = Fault(WrongKey, "it was wrapped by another key of AWS KMS")
_REFUSED: Final = Fault(AccessDenied, "the credentials are refused", _CREDENTIALS)
_DENIED: Final = Fault(AccessDenied, "denied", _POLICY)
_UNSUITED: Final = Fault(UnsupportedOperation, "the key is not for that")

FAULTS: Final = FaultTable[str](
    {
        "DisabledException": Fault(
            KeyRetired, "the key is disabled", "enable it in AWS KMS, if it should be used again"
        ),
        "pending deletion": _PENDING,
        "KMSInvalidStateException": _unreached(
            "the key cannot be used now", "look at its state in AWS KMS", passing=False
        ),
        "KeyUnavailableException": _unreached(
            "the key is not available for a while", "look at its key store"
        ),
        "NotFoundException": _MISSING,
        "wrong region": Fault(
            KeyNotFound,
            "the endpoint is of another region than the key",
            "write the region of the endpoint, and for a multi-Region key its replica's ARN there",
        ),
        "IncorrectKeyException": _OTHER_KEY,
        "InvalidKeyUsageException": _UNSUITED,
        "UnsupportedOperationException": _UNSUITED,
        "LimitExceededException": Fault(
            UnsupportedOperation, "a limit of AWS is reached", "see AWS KMS quotas"
        ),
        "AccessDeniedException": _DENIED,
        "AccessDenied": _DENIED,
        EXPIRED: Fault(
            AccessDenied, "the session has expired", "replace the credentials at their source"
        ),
        "clock": Fault(
            AccessDenied,
            "this machine's clock and AWS's differ by more than five minutes",
            "set this machine's clock",
        ),
        "UnrecognizedClientException": _REFUSED,
        "InvalidSignatureException": _REFUSED,
        "MissingAuthenticationTokenException": _REFUSED,
        "IncompleteSignatureException": _REFUSED,
        "OptInRequired": Fault(AccessDenied, "the account may not use this region or service"),
        "ThrottlingException": _THROTTLED,
        "KMSInternalException": _BROKEN,
        "DependencyTimeoutException": _BROKEN,
        "InternalFailure": _BROKEN,
        "ServiceUnavailableException": _BROKEN,
        "status 5xx": _BROKEN,
        "ConflictException": _unreached("something else is changing the key", "try again later"),
        "stranger": _unreached(
            "what answered is no service of AWS",
            "a proxy, gateway or redirect is there, and none is followed: look at the endpoint",
            passing=False,
        ),
        "EndpointConnectionError": _unreached("no connection"),
        "ConnectTimeoutError": _unreached("no connection in time"),
        "ReadTimeoutError": _unreached("no answer in time"),
        "ConnectionClosedError": _unreached("the connection broke"),
        "HTTPClientError": _unreached("the connection broke"),
        "SSLError": _unreached(
            "no TLS, or a certificate that is not vouched for",
            "name in ca_file who issued the endpoint's certificate; look at this machine's clock",
            passing=False,
        ),
        "no credentials": _unreached("there are no credentials", "look at auth", passing=False),
    },
    unknown=Fault(ProviderError, "AWS refused, or gave an answer that is not known here"),
    operations={
        ("decrypt", "NotFoundException"): Fault(WrongKey, "there is no such key or alias"),
        ("decrypt", "InvalidCiphertextException"): Fault(
            UnwrapFailed,
            "the wrapped key does not authenticate: another context, a damaged blob, or other "
            "pairs in the settings",
        ),
        ("create", "ValidationException"): Fault(
            UnsupportedOperation, "this region has no keys of that kind"
        ),
        ("create", "TagException"): _UNSUITED,
        ("delete", "AccessDeniedException"): Fault(
            AccessDenied, "denied", "grant kms:ScheduleKeyDeletion on it to who may delete keys"
        ),
        ("login", "ValidationError"): Fault(
            AccessDenied, "the login is refused", "look at role_arn, external_id and session_name"
        ),
        ("login", "AccessDenied"): Fault(
            AccessDenied,
            "the role may not be assumed",
            "look at the role's trust policy, and at external_id",
        ),
    },
)

_SAME: Final = {
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "RequestExpired": "clock",
    "RequestTimeTooSkewed": "clock",
    "InvalidClientTokenId": "UnrecognizedClientException",
    "InvalidIdentityToken": "UnrecognizedClientException",
    "IDPRejectedClaim": "UnrecognizedClientException",
    "SignatureDoesNotMatch": "InvalidSignatureException",
    "NotAuthorized": "AccessDeniedException",
    "KMSThrottlingException": "ThrottlingException",
    "Throttling": "ThrottlingException",
    "RequestLimitExceeded": "ThrottlingException",
    "TooManyRequestsException": "ThrottlingException",
    "IDPCommunicationError": "ServiceUnavailableException",
    "ServiceUnavailable": "ServiceUnavailableException",
    "InternalServerError": "InternalFailure",
    "IncompleteSignature": "IncompleteSignatureException",
    "MissingAuthenticationToken": "MissingAuthenticationTokenException",
    "ProxyConnectionError": "EndpointConnectionError",
    "ResponseParserError": "stranger",
    "NoCredentialsError": "no credentials",
    "PartialCredentialsError": "no credentials",
    "ProfileNotFound": "no credentials",
    "CredentialRetrievalError": "no credentials",
    "MetadataRetrievalError": "no credentials",
}
# A code that means two things, told apart by the service's words, in lower case.
_WORDS: Final = (
    ("InvalidSignatureException", "signature expired", "clock"),
    ("InvalidSignatureException", "signature not yet current", "clock"),
    ("InvalidSignatureException", "scoped to a valid region", "wrong region"),
    ("KMSInvalidStateException", "pending deletion", "pending deletion"),
    ("NotFoundException", "invalid arn", "wrong region"),
)


def code_of(error: Exception) -> tuple[str, str]:
    """The code of an answer, or of why there was none, and the service's words."""
    answer: Any = getattr(error, "response", None)
    if not isinstance(answer, dict):
        name = type(error).__name__
        code = _SAME.get(name, name)
        return code, str(error) if code in FAULTS and name not in UNSPEAKABLE else ""
    said = answer.get("Error", {})
    code, words = str(said.get("Code", "")), str(said.get("Message") or said.get("message") or "")
    if code.isdigit() or not code:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return ("status 5xx" if status in range(500, 600) else "stranger"), words
    code = _SAME.get(code, code)
    for known, text, meaning in _WORDS:
        if code == known and text in words.lower():
            return meaning, words
    return code, words


def error_of(code: str, words: str, doing: str, verb: Verb) -> ProviderError | ConfigError:
    """Our error for an answer; the service's own words stand in it."""
    if code == "AlreadyExistsException":
        return ConfigError(f"{doing}: there is one already", hint="choose another name")
    return FAULTS.error(code, doing, verb, shown=f"{code}: {words[:400]}" if words else code)
