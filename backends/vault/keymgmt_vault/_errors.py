"""What Vault's refusals mean, in the words of ``keymgmt.errors``.

Vault answers most mistakes with status 400 and a sentence; the sentences here were seen from
OpenBao 2.7, whose Transit comes from HashiCorp Vault's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hvac import exceptions

from keymgmt.backend import (
    AccessDenied,
    KeyNotFound,
    KeyRetired,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["denied", "expired", "reason_of", "soft_deleted", "translate"]

_CAPABILITY: Final = {
    "encrypt": "update",
    "decrypt": "update",
    "sign": "update",
    "rotate": "update",
    "read": "read",
    "create": "create",
    "retire": "update",
    "list": "list",
}


def soft_deleted(place: str) -> KeyRetired:
    """The key is there, and marked so that the server refuses to use it."""
    return KeyRetired(
        f"the Transit key {place} is soft-deleted",
        hint=f"bao write -f {place.replace('/', '/keys/', 1)}/soft-delete-restore",
    )


def reason_of(error: exceptions.VaultError) -> str:
    """The server's words, short and printable."""
    text = "; ".join(error.errors or []) or str(error.args[0] or "no reason given")
    return "".join(char if char.isprintable() else " " for char in text)[:300]


def path_of(verb: str, native: str, mount: str) -> str:
    """The API path that a policy names for ``verb``."""
    if verb in ("encrypt", "decrypt", "sign"):
        return f"{mount}/{verb}/{native}"
    if verb == "rotate":
        return f"{mount}/keys/{native}/rotate"
    if verb == "retire":
        return f"{mount}/keys/{native}/config"
    return f"{mount}/keys/{native}" if native else f"{mount}/keys"


def denied(verb: str, native: str, settings: VaultSettings) -> AccessDenied:
    """The token lives, and its policies do not allow ``verb``."""
    path = path_of(verb, native, settings.mount)
    return AccessDenied(
        f"the policy does not allow {_CAPABILITY[verb]} on {path}",
        hint=f'if it should, grant it: path "{path}" '
        f'{{ capabilities = ["{_CAPABILITY[verb]}"] }}; also look at the mount, the key name '
        "and the namespace: Vault refuses what is not there with the same words",
    )


def expired() -> AccessDenied:
    """The token itself is refused, and no new one can be had."""
    return AccessDenied(
        "the token has expired, was revoked, or is of another server or namespace",
        hint="replace it where the config takes it from, or use an auth method that logs in itself",
    )


def translate(
    error: exceptions.VaultError, verb: str, native: str, settings: VaultSettings
) -> ProviderError:
    """Name a refusal of ``verb`` (as in ``path_of``) on the key ``native``."""
    text = reason_of(error)
    low = text.lower()
    place = f"{settings.mount}/{native}" if native else settings.mount
    if isinstance(error, (exceptions.Forbidden, exceptions.Unauthorized)):
        return denied(verb, native, settings)
    missing = isinstance(error, exceptions.InvalidPath)
    if missing and ("no handler for route" in low or verb != "read"):
        return KeyNotFound(
            f"no Transit engine is mounted at {settings.mount}",
            hint=f"bao secrets enable -path={settings.mount} transit; or set mount and namespace",
        )
    if missing or "key not found" in low:
        kind = WrongKey if verb == "decrypt" else KeyNotFound
        return kind(
            f"there is no Transit key {place}",
            hint=None if verb == "decrypt" else "make it with: keymgmt keys create",
        )
    if "version is too new" in low:
        return WrongKey(f"the Transit key {place} has no such version", hint=None)
    if "too old" in low or "disallowed by policy" in low:
        return KeyRetired(
            f"that version of the Transit key {place} is retired",
            hint="rewrap the model elsewhere, or lower min_decryption_version for a while",
        )
    if "soft-deleted" in low:
        return soft_deleted(place)
    if verb == "decrypt":
        if "non-aead" in low or "not supported for key type" in low or "does not support" in low:
            return WrongKey(f"the Transit key {place} is of another type than this blob's")
        if "authentication failed" in low or "ciphertext" in low or "decryption error" in low:
            return UnwrapFailed(
                "the wrapped key does not authenticate: another context, a damaged blob, "
                f"or another key called {place}"
            )
    if "not support" in low or "missing 'context'" in low or "context" in low:
        return UnsupportedOperation(f"the Transit key {place} cannot {verb}: {text}")
    if isinstance(error, (exceptions.InternalServerError, exceptions.VaultDown)):
        return ProviderUnavailable(f"the server failed to {verb} with {place}: {text}")
    return ProviderError(f"the server refused to {verb} with {place}: {text}")
