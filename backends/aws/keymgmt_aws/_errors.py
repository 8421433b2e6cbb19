"""The errors of AWS KMS, AWS STS and botocore, in one table.

A code is that of the service (API reference of AWS KMS, "Common errors" and each operation's), or
the name of botocore's exception if there was no answer; codes with hyphens are made here. An answer
that does not come from AWS is never taken for a refusal, whatever its status is.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, get_args

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

__all__ = ["EXPIRED", "Verb", "failure_of"]

_Change = Literal["create", "rotate", "delete"]
Verb = Literal["encrypt", "decrypt", "sign", "describe", "list", "login", "identify", _Change]

_LOGINS: Final = ("AssumeRole", "AssumeRoleWithWebIdentity")
_UNSPEAKABLE: Final = (
    "ResponseParserError",
    "UnicodeDecodeError",
    "CredentialRetrievalError",
    "JSONDecodeError",
    "TimeoutExpired",
)
"""Exceptions whose text repeats an answer or the output of a program, which may hold a secret."""


def _unreached(message: str, hint: str | None = None, *, passing: bool = True) -> Fault:
    look = "look at the region, the endpoint, and this machine's network"
    return Fault(ProviderUnavailable, message, hint or look, passing)


_THROTTLED: Final = _unreached(
    "AWS limits how often this account may call", "call less often, or ask AWS for a higher quota"
)
_UNCONNECTED: Final = _unreached("no connection")
EXPIRED: Final = Fault(
    AccessDenied, "the session has expired", "replace the credentials at their source"
)
_CODES: Final = {
    Fault(
        KeyRetired, "the key is disabled", "enable it in AWS KMS, if it should be used again"
    ): "DisabledException",
    Fault(
        KeyRetired,
        "the key is pending deletion",
        "cancel its deletion in AWS KMS before it is deleted, or rewrap where another group opens",
    ): "pending-deletion",
    _unreached(
        "the key cannot be used now", "look at its state in AWS KMS", passing=False
    ): "KMSInvalidStateException",
    _unreached(
        "the key is not available for a while", "look at its key store"
    ): "KeyUnavailableException",
    Fault(
        KeyNotFound,
        "there is no such key or alias",
        "make it with: keymgmt keys create PROVIDER:KEY",
    ): "NotFoundException",
    Fault(
        KeyNotFound,
        "the endpoint is of another region than the key",
        "write the region of the endpoint, and for a multi-Region key the ARN of its replica there",
    ): "wrong-region",
    Fault(WrongKey, "it was wrapped by another key of AWS KMS"): "IncorrectKeyException",
    Fault(UnsupportedOperation, "the key has another purpose"): "InvalidKeyUsageException "
    "UnsupportedOperationException",
    Fault(
        UnsupportedOperation, "a limit of AWS is reached", "see AWS KMS quotas"
    ): "LimitExceededException",
    Fault(
        AccessDenied,
        "denied",
        "grant it in the key's policy or the role's; the least is printed by: "
        "keymgmt aws policy ROLE PROVIDER:KEY",
    ): "AccessDeniedException AccessDenied NotAuthorized",
    EXPIRED: "ExpiredTokenException ExpiredToken",
    Fault(
        AccessDenied,
        "this machine's clock and AWS's differ by more than five minutes",
        "set this machine's clock",
    ): "clock-skew RequestExpired RequestTimeTooSkewed",
    Fault(
        AccessDenied,
        "the credentials are refused",
        "look at auth: the credentials are wrong, deleted or of another partition",
    ): "UnrecognizedClientException InvalidClientTokenId InvalidIdentityToken IDPRejectedClaim "
    "InvalidSignatureException SignatureDoesNotMatch MissingAuthenticationTokenException "
    "MissingAuthenticationToken IncompleteSignatureException IncompleteSignature",
    Fault(
        AccessDenied,
        "the session of SSO has expired, or there is none",
        "log in to the profile again with the AWS command line",
    ): "UnauthorizedSSOTokenError SSOTokenLoadError TokenRetrievalError",
    Fault(AccessDenied, "the account may not use this region or service"): "OptInRequired",
    _THROTTLED: "ThrottlingException KMSThrottlingException Throttling RequestLimitExceeded "
    "TooManyRequestsException",
    _unreached("AWS reports an internal fault", "try again later"): "KMSInternalException "
    "DependencyTimeoutException InternalFailure InternalServerError ServiceUnavailable "
    "ServiceUnavailableException IDPCommunicationError status-5xx",
    _unreached("something else is changing the key", "try again later"): "ConflictException",
    _unreached(
        "another service than AWS answered",
        "a proxy, gateway or redirect is at the endpoint, and no redirect is followed: look at it",
        passing=False,
    ): "no-answer-of-AWS ResponseParserError UnicodeDecodeError",
    _UNCONNECTED: "EndpointConnectionError ConnectTimeoutError ProxyConnectionError",
    _unreached("no answer in time"): "ReadTimeoutError",
    _unreached("the connection broke"): "ConnectionClosedError HTTPClientError ProtocolError",
    _unreached(
        "no TLS, or a certificate of an unknown authority",
        "name in ca_file the authority that issued the endpoint's certificate; look at this "
        "machine's clock",
        passing=False,
    ): "SSLError",
    _unreached("there are no credentials", "look at auth", passing=False): "NoCredentialsError "
    "PartialCredentialsError ProfileNotFound CredentialRetrievalError JSONDecodeError "
    "FileNotFoundError PermissionError TimeoutExpired",
}
_FAULTS: Final = FaultTable[str](
    {code: fault for fault, codes in _CODES.items() for code in codes.split()},
    unknown=Fault(ProviderError, "AWS answered with an unknown error"),
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
        ("delete", "AccessDeniedException"): Fault(
            AccessDenied, "denied", "grant kms:ScheduleKeyDeletion to whoever may delete the key"
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
_SIGNATURE: Final = "InvalidSignatureException|SignatureDoesNotMatch"
# Codes with two meanings, which the service's message tells apart.
_WORDS: Final = (
    (_SIGNATURE, "signature expired|signature not yet current", "clock-skew"),
    (_SIGNATURE, "scoped to a valid region", "wrong-region"),
    ("KMSInvalidStateException", "pending (replica )?deletion", "pending-deletion"),
    ("NotFoundException", "invalid arn", "wrong-region"),
)


def failure_of(
    error: Exception, verb: Verb, subject: str
) -> tuple[ProviderError | ConfigError, Fault, bool]:
    """Our error for an error of botocore, its fault, and whether the request may be repeated.

    The message shows the service's words; of an unknown exception only its name.
    """
    login = getattr(error, "operation_name", "") in _LOGINS
    operation: Verb = "login" if login else verb
    code, words = _code_of(error)
    fault = _FAULTS.find(code, operation)
    shown = f"{code}: {words[:400]}" if words else code
    failure: ProviderError | ConfigError
    if code == "AlreadyExistsException":
        failure = ConfigError(f"{subject} exists already", hint="choose another name")
    else:
        failure = _FAULTS.error(code, f"cannot {operation} with {subject}", operation, shown=shown)
    if words or hasattr(error, "response"):
        failure.__cause__ = error
    # A change is not repeated if the service may have carried it out.
    certain = operation not in get_args(_Change) or fault in (_THROTTLED, _UNCONNECTED)
    return failure, fault, fault.passing and certain


def _code_of(error: Exception) -> tuple[str, str]:
    """The code of an answer, or the name of the exception; and the service's words."""
    answer: Any = getattr(error, "response", None)
    if not isinstance(answer, dict):
        name = type(error).__name__
        return name, str(error) if name in _FAULTS and name not in _UNSPEAKABLE else ""
    stated = answer.get("Error", {})
    code = str(stated.get("Code", ""))
    words = str(stated.get("Message") or stated.get("message") or "")
    if code.isdigit() or not code:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return ("status-5xx" if status in range(500, 600) else "no-answer-of-AWS"), words
    for codes, text, meaning in _WORDS:
        if re.fullmatch(codes, code) and re.search(text, words, re.IGNORECASE):
            return meaning, words
    return code, words
