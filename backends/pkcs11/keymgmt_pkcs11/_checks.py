"""What ``keymgmt doctor`` says of a token, from the module file up to each key.

The first part needs no login, so that a wrong PIN is explained with the token's flags beside it.
Nothing is made in the token and nothing is tried out of it: that is ``keymgmt pkcs11 mechanisms``.
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


def examine(name: str, settings: Pkcs11Settings, connection: Connection, key: str | None) -> Health:
    """Look at everything; with ``key``, at that key instead of all, with a round trip.

    Args:
        name: the operator's word for the provider.
        settings: of the provider.
        connection: its sessions.
        key: one key, or None for all.
    """
    findings: list[Finding] = []
    about = "token"
    try:
        findings += within(settings.timeout, f"the module of {name!r}", lambda: _outside(settings))
        findings += connection.run("checking", lambda s: list(_session(connection, s)))
        if key is None:
            findings += connection.run("reading the keys", lambda s: list(_keys(name, s)))
        else:
            about = f"key {key}"
            findings += connection.run("checking", lambda s: list(_named(s, key)))
    except KeymgmtError as error:
        # Who reads this has called doctor, so that is no way out.
        hint = None if error.hint and "keymgmt doctor" in error.hint else error.hint
        findings.append(Finding(about, "failed", str(error), hint))
    return Health(tuple(findings))


def _outside(settings: Pkcs11Settings) -> list[Finding]:
    module = open_module(settings.library, settings.init_args)
    with module.call():
        info = module.info
        text = "{} {}.{} of {}".format(info.description, *info.version, info.manufacturer)
        speaks = "{}.{}".format(*info.speaks)
        found = [
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
                    else "the module cannot lock, or others initialised it"
                ),
            ),
        ]
        if not module.ours:
            found.append(
                Finding(
                    "recovery",
                    "warning",
                    "the application initialised the module, so a lost HSM is found again only "
                    "where the module does that by itself",
                )
            )
        found += [Finding("module", "warning", note) for note in module.quirks.notes]
        try:
            present, others = look_for_tokens(module)
            listed = "; ".join([*map(str, present), *others]) or "none"
            found.append(Finding("tokens", "ok" if present else "failed", listed))
            token = find_token(module, settings)
        except CkError as error:
            raise translate(error, "listing the tokens") from error
        found.append(Finding("token", "ok", f"{token}, {token.model}"))
        flags = [Finding("PIN", *_FLAGS[flag]) for flag in _FLAGS if token.flags & flag]  # type: ignore[arg-type]
        # The gravest comes first, and the lesser ones follow from it.
        return [*found, *(flags or [Finding("PIN", "ok", "no flag is raised")])[:1]]


def _session(connection: Connection, session: Session) -> Iterator[Finding]:
    logged_in = session.ck.logged_in(session.handle)
    wanted = session.settings.login
    yield Finding(
        "login",
        "ok" if logged_in or wanted == "none" else "failed",
        f"logged in ({wanted})" if logged_in else "no login",
    )
    token = session.ck.token_info(session.token.slot)
    most = "no limit told" if token.max_sessions is None else f"at most {token.max_sessions}"
    used = "a number that the token does not tell" if token.sessions is None else token.sessions
    ours, limit = connection.sessions
    full = token.max_sessions is not None and (token.sessions or 0) >= token.max_sessions
    yield Finding(
        "sessions",
        "warning" if full else "ok",
        f"{ours} of {limit} here; of this process with the token {used}, {most}",
        "set sessions lower" if full else None,
    )
    listed = set(session.ck.mechanisms(token.slot))
    may = [kind.name for kind in KINDS.values() if not listed.isdisjoint(kind.mechanisms)]
    yield Finding(
        "mechanisms",
        "ok" if may else "failed",
        f"listed for {', '.join(may)}" if may else "none that is of use here is listed",
        None if may else "this token is not for keymgmt",
    )


def try_kind(session: Session, kind: Kind) -> tuple[bool, str]:
    """Try what a kind of key would do, with a key that lives in this session only.

    Returns:
        Whether it works, and what was tried.

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
    made = f"made in {_micro(start)}"
    try:
        results = (
            [_timed("sign", lambda: sign(session, key, _MESSAGE))]
            if kind.purpose == "sign"
            else _tried(session, key, "")
        )
    finally:
        destroy(session, handles)
    return any(good for good, _ in results), "; ".join([made, *(text for _, text in results)])


def _keys(provider: str, session: Session) -> Iterator[Finding]:
    settings = session.settings
    keys, odd = all_keys(session)
    found, strange = by_name(keys, settings)
    for name in settings.keys:
        if name not in found:
            yield Finding(f"key {name}", "warning", "the config names it; the token has it not")
    for versions in found.values():
        yield from _described(versions, settings)
    if odd:
        yield Finding("unreadable objects", "warning", "; ".join(odd[:8]))
    if strange:
        yield Finding(
            "other keys",
            "skipped",
            f"{len(strange)} without a name here: {'; '.join(map(str, strange[:8]))}",
            "to use one, name it in the table keys of the config",
        )
    if not found:
        yield Finding("keys", "warning", "none yet", f"keymgmt keys create {provider}:KEY")


def _named(session: Session, key: str) -> Iterator[Finding]:
    versions = find_versions(session, key, session.settings.entry(key))
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
        for item in versions.objects:
            versions.get(item.version)
    except KeymgmtError as error:
        yield Finding(f"key {key}", "warning", str(error), error.hint)
        return
    for item in versions.objects:
        state = "retired" if item.retired else "newest" if item is newest else "old"
        wrong = {} if item.retired else shortcomings(item, settings, key)
        notes = list(_notes(item, settings))
        said = [f"WRONG: {', '.join(wrong.values())}"] if wrong else []
        words = ", ".join(f'"{word}"' for word in wrong)
        yield Finding(
            f"key {key}",
            "failed" if wrong else "warning" if notes else "ok",
            f"{item.version} {state}, {item.type} {item.bits or ''}: "
            + "; ".join([*said, *notes, " ".join(sorted(item.flags))]),
            "make another key and rewrap to it; where only usages are too many: keymgmt pkcs11 "
            f"restrict PROVIDER:{key}; to use it as it is: {key} = {{ allow = [{words}] }}"
            if wrong
            else None,
        )


def _notes(key: KeyObject, settings: Pkcs11Settings) -> Iterator[str]:
    if settings.create.modifiable and not key.can("modifiable") and not key.retired:
        yield "not CKA_MODIFIABLE, so it can be destroyed but not retired"
    if key.wants_approval and key.can("derive", "unwrap"):
        yield "wants the PIN for every use, which only decrypting and signing can give"
    if key.version == NO_ID:
        yield "has no id, so it cannot be rotated well"


def _tried(session: Session, key: KeyObject, name: str) -> list[tuple[bool, str]]:
    quirks = session.module.quirks
    fits = allowed(session, key, session.settings, name)
    results = []
    for each, mechanism in MECHANISMS.items():
        if each in fits and mechanism.wraps(key):
            code = fits[each][1]
            good, text = _timed(each, lambda m=mechanism, c=code: round_trip(session, key, m, c))  # type: ignore[misc]
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
