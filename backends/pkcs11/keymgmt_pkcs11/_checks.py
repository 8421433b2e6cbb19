"""The findings of ``keymgmt doctor`` about a token, from the module file up to each key.

The first part needs no login, so a wrong PIN is reported together with the token's flags. No key is
created in the token: ``keymgmt pkcs11 mechanisms`` does that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from pkcs11 import TokenFlag

from keymgmt.backend import Finding, Health, KeymgmtError, within
from keymgmt_pkcs11._choice import allowed, round_trip
from keymgmt_pkcs11._create import destroy, session_key
from keymgmt_pkcs11._errors import CkError, translate
from keymgmt_pkcs11._keys import NO_ID, KeyObject, Versions, all_keys, by_name, find_versions
from keymgmt_pkcs11._kinds import KINDS, Kind, shortcomings
from keymgmt_pkcs11._module import open_module
from keymgmt_pkcs11._signing import can_sign, sign
from keymgmt_pkcs11._token import find_token, look_for_tokens
from keymgmt_pkcs11._wrapping import MECHANISMS

if TYPE_CHECKING:
    from keymgmt_pkcs11._connection import Connection, Session
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["examine", "try_kind"]

_MESSAGE: Final = b"keymgmt check"
_FLAGS: Final = {
    TokenFlag.USER_PIN_LOCKED: ("failed", "the user PIN is locked"),
    TokenFlag.USER_PIN_FINAL_TRY: ("failed", "the next wrong PIN locks the token"),
    TokenFlag.USER_PIN_COUNT_LOW: ("warning", "a wrong PIN was given since the last login"),
    TokenFlag.USER_PIN_TO_BE_CHANGED: ("warning", "the user PIN is to be changed"),
    TokenFlag.ERROR_STATE: ("failed", "the token says that it failed its self-test"),
}


def examine(name: str, connection: Connection, key: str | None) -> Health:
    """Examine module, token and keys; with ``key``, that key only, with a round trip.

    Args:
        name: the name of the provider.
        connection: its sessions.
        key: a key name, or None for all keys.
    """
    findings: list[Finding] = []
    settings, about = connection.settings, "token"
    try:
        findings += within(settings.timeout, f"the module of {name!r}", lambda: _module(settings))
        findings += connection.run("checking", lambda s: list(_session(connection, s)))
        if key is None:
            findings += connection.run("reading the keys", lambda s: list(_keys(name, s)))
        else:
            about = f"key {key}"
            findings += connection.run("checking", lambda s: list(_named(s, key)))
    except KeymgmtError as error:
        # The reader has just run doctor, so a hint to run it is left out.
        hint = None if error.hint and "keymgmt doctor" in error.hint else error.hint
        findings.append(Finding(about, "failed", str(error), hint))
    return Health(tuple(findings))


def _module(settings: Pkcs11Settings) -> list[Finding]:
    """The findings that need no login."""
    module = open_module(settings.library, settings.init_args)
    with module.call():
        info = module.info
        text = "{} {}.{} of {}".format(info.description, *info.version, info.manufacturer)
        speaks = "{}.{}".format(*info.speaks)
        findings = [
            Finding("module", "ok", f"{module.path}: {text}, PKCS#11 {speaks}"),
            Finding("threads", "ok", "initialised with locking")
            if module.locking
            else Finding(
                "threads",
                "warning",
                "calls are made one at a time: "
                + (
                    "two threads crash this module"
                    if module.quirks.one_at_a_time
                    else "the module cannot lock, or the application initialised it"
                ),
            ),
        ]
        if not module.ours:
            findings.append(
                Finding(
                    "recovery",
                    "warning",
                    "the application initialised the module, so a lost HSM is found again only "
                    "if the module reconnects by itself",
                )
            )
        findings += [Finding("module", "warning", note) for note in module.quirks.notes]
        try:
            present, others = look_for_tokens(module)
            listed = "; ".join([*map(str, present), *others]) or "none"
            findings.append(Finding("tokens", "ok" if present else "failed", listed))
            token = find_token(module, settings)
        except CkError as error:
            raise translate(error, "listing the tokens") from error
        findings.append(Finding("token", "ok", f"{token}, {token.model}"))
        flags = [Finding("PIN", *_FLAGS[flag]) for flag in _FLAGS if token.flags & flag]  # type: ignore[arg-type]
        # Only the first is shown: _FLAGS has the gravest first, and the others follow from it.
        return [*findings, *(flags or [Finding("PIN", "ok", "no flag is raised")])[:1]]


def _session(connection: Connection, session: Session) -> Iterator[Finding]:
    logged_in = session.ck.logged_in(session.handle)
    setting = session.settings.login
    yield Finding(
        "login",
        "ok" if logged_in or setting == "none" else "failed",
        f"logged in ({setting})" if logged_in else "no login",
    )
    token = session.ck.token_info(session.token.slot)
    most = "no limit known" if token.max_sessions is None else f"at most {token.max_sessions}"
    used = "unknown" if token.sessions is None else token.sessions
    ours, limit = connection.sessions
    full = token.max_sessions is not None and (token.sessions or 0) >= token.max_sessions
    yield Finding(
        "sessions",
        "warning" if full else "ok",
        f"{ours} of {limit} in this provider; the token counts {used} of this process, {most}",
        "set sessions lower" if full else None,
    )
    listed = set(session.ck.mechanisms(token.slot))
    may = [kind.name for kind in KINDS.values() if not listed.isdisjoint(kind.mechanisms)]
    yield Finding(
        "mechanisms",
        "ok" if may else "failed",
        f"listed for {', '.join(may)}" if may else "the token lists no mechanism of any key kind",
        None if may else "this token cannot be used with keymgmt",
    )


def try_kind(session: Session, kind: Kind) -> tuple[bool, str]:
    """Try a kind of key with a key that ends with this session.

    Returns:
        Whether the kind works, and a description of each try.

    Raises:
        CkError: the token was lost.
    """
    try:
        start = time.perf_counter()
        key, handles = session_key(session, kind)
    except CkError as error:
        if error.passing:
            raise
        return False, f"not made: {error.name}"
    created = f"made in {_micro(start)}"
    try:
        results = (
            [_timed("sign", lambda: sign(session, key, _MESSAGE))]
            if kind.purpose == "sign"
            else _tried(session, key, "")
        )
    finally:
        destroy(session, handles)
    return any(good for good, _ in results), "; ".join([created, *(text for _, text in results)])


def _keys(provider: str, session: Session) -> Iterator[Finding]:
    settings = session.settings
    keys, unreadable = all_keys(session)
    named, others = by_name(keys, settings)
    for name in settings.keys:
        if name not in named:
            yield Finding(f"key {name}", "warning", "the config names it, and the token lacks it")
    for versions in named.values():
        yield from _described(versions, settings)
    if unreadable:
        yield Finding("unreadable objects", "warning", "; ".join(unreadable[:8]))
    if others:
        yield Finding(
            "other keys",
            "skipped",
            f"{len(others)} without a key name: {'; '.join(map(str, others[:8]))}",
            "to use such a key, name it in the table keys of the config",
        )
    if not named:
        yield Finding("keys", "warning", "none yet", f"keymgmt keys create {provider}:KEY")


def _named(session: Session, key: str) -> Iterator[Finding]:
    versions = find_versions(session, key)
    yield from _described(versions, session.settings)
    newest = versions.newest
    results = []
    if newest.can("decrypt", "unwrap", "derive"):
        results += _tried(session, newest, key)
    if can_sign(newest):
        results.append(_timed("sign", lambda: sign(session, newest, _MESSAGE)))
    yield Finding(
        f"key {key} in use",
        "ok" if any(good for good, _ in results) else "failed",
        "; ".join(text for _, text in results) or "no mechanism fits its type and attributes",
    )


def _described(versions: Versions, settings: Pkcs11Settings) -> Iterator[Finding]:
    key = versions.key
    try:
        newest = versions.newest
        for key_object in versions.objects:
            versions.get(key_object.version)
    except KeymgmtError as error:
        yield Finding(f"key {key}", "warning", str(error), error.hint)
        return
    for key_object in versions.objects:
        state = "retired" if key_object.retired else "newest" if key_object is newest else "old"
        wrong = {} if key_object.retired else shortcomings(key_object, settings, key)
        notes = list(_notes(key_object, settings))
        faults = [f"WRONG: {', '.join(wrong.values())}"] if wrong else []
        words = ", ".join(f'"{word}"' for word in wrong)
        yield Finding(
            f"key {key}",
            "failed" if wrong else "warning" if notes else "ok",
            f"{key_object.version} {state}, {key_object.type} {key_object.bits or ''}: "
            + "; ".join([*faults, *notes, " ".join(sorted(key_object.flags))]),
            "make another key and rewrap to it; if it only has too many usages: keymgmt pkcs11 "
            f"restrict PROVIDER:{key}; to use it as it is: {key} = {{ allow = [{words}] }}"
            if wrong
            else None,
        )


def _notes(key: KeyObject, settings: Pkcs11Settings) -> Iterator[str]:
    if settings.create.modifiable and not key.can("modifiable") and not key.retired:
        yield "not CKA_MODIFIABLE, so it can be destroyed but not retired"
    if key.wants_approval and key.can("derive", "unwrap"):
        yield "requires the PIN for every use, which is possible for decrypting and signing only"
    if key.version == NO_ID:
        yield "has no id, so its versions cannot be told apart after a rotation"


def _tried(session: Session, key: KeyObject, name: str) -> list[tuple[bool, str]]:
    quirks = session.module.quirks
    fits = allowed(session, key, name)
    results = []
    for each, mechanism in MECHANISMS.items():
        if each in fits and mechanism.wraps(key):
            good, text = _timed(each, lambda m=mechanism: round_trip(session, key, m))  # type: ignore[misc]
            results.append((good, text))
            if not good:
                session.renew()
        elif mechanism.fits(key) and each in quirks.broken:
            results.append((False, f"{each} not used: {quirks.broken[each]}"))
    return results


def _timed(name: str, call: Callable[[], object]) -> tuple[bool, str]:
    start = time.perf_counter()
    try:
        call()
    except CkError as error:
        if error.passing:
            raise
        return False, f"{name} fails: {error.name}"
    except KeymgmtError as error:
        return False, f"{name} fails: {error}"
    return True, f"{name} {_micro(start)}"


def _micro(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1e6:.0f} µs"
