"""What ``keymgmt doctor`` says of a token, from the module file up to each key.

The first part needs no login, so that a wrong PIN is explained with the token's flags beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from pkcs11 import TokenFlag
from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import Finding, Health, KeymgmtError, UnwrapFailed, within
from keymgmt_pkcs11._create import KINDS, destroy, extraction, session_key
from keymgmt_pkcs11._cryptoki import CkError
from keymgmt_pkcs11._errors import LOST, reason, translate
from keymgmt_pkcs11._keys import NO_ID, KeyObject, Versions, all_keys
from keymgmt_pkcs11._mechanisms import MECHANISMS
from keymgmt_pkcs11._module import open_module
from keymgmt_pkcs11._quirks import quirks_of
from keymgmt_pkcs11._signing import can_sign, sign
from keymgmt_pkcs11._token import describe, find_token, tokens
from keymgmt_pkcs11._use import allowed, round_trip

if TYPE_CHECKING:
    from keymgmt_pkcs11._provider import Pkcs11Provider
    from keymgmt_pkcs11._sessions import Channel
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["examine", "trials"]

_MESSAGE: Final = b"keymgmt check"
_FLAGS: Final = {
    TokenFlag.USER_PIN_LOCKED: ("failed", "the user PIN is locked"),
    TokenFlag.USER_PIN_FINAL_TRY: ("failed", "the next wrong PIN locks the token"),
    TokenFlag.USER_PIN_COUNT_LOW: ("warning", "a wrong PIN was given since the last login"),
    TokenFlag.USER_PIN_TO_BE_CHANGED: ("warning", "the user PIN is to be changed"),
    TokenFlag.ERROR_STATE: ("failed", "the token says that it failed its self-test"),
}


def examine(provider: Pkcs11Provider, key: str | None) -> Health:
    """Look at everything; with ``key``, at that key instead of all, with a round trip."""
    findings: list[Finding] = []
    settings = provider.settings
    try:
        findings += within(
            settings.timeout, f"the module of {provider.name!r}", lambda: _outside(settings)
        )
        findings += provider.run("checking", lambda channel: list(_session(provider, channel)))
        if key is None:
            findings += provider.run("trying the mechanisms", lambda c: list(trials(c, settings)))
            findings += provider.run("reading the keys", lambda c: list(_keys(provider, c)))
        else:
            findings += provider.run("checking", lambda c: list(_named(provider, c, key)))
    except KeymgmtError as error:
        name = f"key {key}" if key is not None and len(findings) > 3 else "token"
        findings.append(Finding(name, "failed", str(error), error.hint))
    return Health(tuple(findings))


def _outside(settings: Pkcs11Settings) -> list[Finding]:
    module = open_module(settings.library, settings.init_args)
    with module.call():
        library = module.library
        major, minor = library.library_version
        speaks = ".".join(str(part) for part in library.cryptoki_version)
        text = f"{library.library_description} {major}.{minor} of {library.manufacturer_id}"
        found = [
            Finding("module", "ok", f"{module.path}: {_clean(text)}, PKCS#11 {speaks}"),
            Finding("threads", "ok", "initialised with locking")
            if module.locking
            else Finding(
                "threads",
                "warning",
                "calls are made one at a time: the module cannot lock, or others initialised it",
                "let keymgmt be the first to use the module in this process",
            ),
        ]
        found += [Finding("module", "warning", note) for note in quirks_of(module).notes]
        try:
            present = tokens(module)
        except PKCS11Error as error:
            raise translate(error, "listing the tokens") from error
        listed = "; ".join(describe(token) for token in present)
        found.append(Finding("tokens", "ok" if present else "failed", listed or "none"))
        token = find_token(module, settings)
        found.append(Finding("token", "ok", f"{describe(token)}, {_clean(str(token.model))}"))
        flags = [Finding("PIN", *_FLAGS[flag]) for flag in _FLAGS if token.flags & flag]  # type: ignore[arg-type]
        # The gravest comes first, and the lesser ones follow from it.
        return [*found, *(flags or [Finding("PIN", "ok", "no flag is raised")])[:1]]


def _session(provider: Pkcs11Provider, channel: Channel) -> Iterator[Finding]:
    logged_in = channel.ck.logged_in(channel.handle)
    wanted = provider.settings.login
    yield Finding(
        "login",
        "ok" if logged_in or wanted == "none" else "failed",
        f"logged in as user ({wanted})" if logged_in else "no login",
    )
    counts = channel.ck.token_counts(channel.token.slot.slot_id)
    most = "no limit told" if counts.max_sessions is None else f"at most {counts.max_sessions}"
    used = "unknown" if counts.sessions is None else str(counts.sessions)
    ours, limit = provider.sessions
    full = counts.max_sessions is not None and (counts.sessions or 0) >= counts.max_sessions
    yield Finding(
        "sessions",
        "warning" if full else "ok",
        f"{ours} of {limit} here; of this process with the token {used}, {most}",
        "set sessions lower" if full else None,
    )


def trials(channel: Channel, settings: Pkcs11Settings) -> Iterator[Finding]:
    """Try what each kind of key would do, with keys that live in this session only."""
    for kind in KINDS.values():
        try:
            start = time.perf_counter()
            key, handles = session_key(channel, kind)
        except (PKCS11Error, CkError) as error:
            _raise_if_lost(error)
            yield Finding(f"kind {kind.name}", "skipped", f"not made: {reason(error)}")
            continue
        made = f"made in {_micro(start)}"
        try:
            results = (
                [_timed("sign", lambda k=key: _use(sign(channel, k, _MESSAGE)))]  # type: ignore[misc]
                if kind.purpose == "sign"
                else _tried(channel, key, settings, "")
            )
        finally:
            destroy(channel, handles)
        works = any(good for good, _ in results)
        yield Finding(
            f"kind {kind.name}",
            "ok" if works else "skipped",
            "; ".join([made, *(text for _, text in results)]),
        )


def _keys(provider: Pkcs11Provider, channel: Channel) -> Iterator[Finding]:
    found: dict[str, list[KeyObject]] = {}
    strange = []
    for item in all_keys(channel):
        name = provider.settings.name_of(item.label, item.id)
        if name is None or item.type not in ("AES", "RSA", "EC"):
            strange.append(str(item))
        else:
            found.setdefault(name, []).append(item)
    for name in provider.settings.keys:
        if name not in found:
            yield Finding(f"key {name}", "warning", "the config names it; the token has it not")
    for name, items in found.items():
        yield from _described(channel, Versions(name, tuple(items)))
    if strange:
        yield Finding(
            "other keys",
            "skipped",
            f"{len(strange)} without a name here: {'; '.join(strange[:8])}",
            "to use one, name it in the table keys of the config",
        )
    if not found:
        yield Finding("keys", "warning", "none yet", f"keymgmt keys create {provider.name}:KEY")


def _named(provider: Pkcs11Provider, channel: Channel, key: str) -> Iterator[Finding]:
    versions = provider.versions(channel, key)
    yield from _described(channel, versions)
    newest = versions.newest
    results = []
    if newest.can("decrypt", "unwrap", "derive"):
        results += _tried(channel, newest, provider.settings, key)
    if can_sign(newest):
        results.append(_timed("sign", lambda: _use(sign(channel, newest, _MESSAGE))))
    yield Finding(
        f"key {key} in use",
        "ok" if any(good for good, _ in results) else "failed",
        "; ".join(text for _, text in results) or "no mechanism fits its type and attributes",
    )


def _described(channel: Channel, versions: Versions) -> Iterator[Finding]:
    try:
        newest = versions.newest
        for item in versions.objects:
            versions.get(item.version)
    except KeymgmtError as error:
        yield Finding(f"key {versions.key}", "warning", str(error), error.hint)
        return
    for item in versions.objects:
        wrong = _wrong(channel, item)
        state = "retired" if item.retired else "newest" if item is newest else "old"
        flags = " ".join(sorted(item.flags))
        yield Finding(
            f"key {versions.key}",
            "warning" if wrong else "ok",
            f"{item.version} {state}, {item.type} {item.bits or ''}: "
            + (f"WRONG: {', '.join(wrong)}; " if wrong else "")
            + flags,
            "make another key, with one purpose and not extractable, and rewrap to it"
            if wrong
            else None,
        )


def _wrong(channel: Channel, key: KeyObject) -> list[str]:
    wrong = []
    if key.can("extractable"):
        wrong.append("extractable")
    if not key.can("sensitive"):
        wrong.append("not sensitive")
    if not key.can("extractable") and "never_extractable" not in key.unknown | key.flags:
        wrong.append("was extractable once, or was imported")
    if key.can("wrap", "unwrap") and key.can("encrypt", "decrypt"):
        wrong.append("wraps and also decrypts, so other keys can be taken out with it")
    if key.can("sign") and key.can("decrypt", "unwrap", "derive"):
        wrong.append("signs and also decrypts or derives")
    if key.can("always_authenticate"):
        wrong.append("wants the PIN for every use, which is not done here")
    if key.version == NO_ID:
        wrong.append("has no id, so it cannot be rotated well")
    if not wrong and (how := extraction(channel, key)) is not None:
        wrong.append(f"its secret came out: {how}")
    return wrong


def _tried(
    channel: Channel, key: KeyObject, settings: Pkcs11Settings, name: str
) -> list[tuple[bool, str]]:
    quirks = quirks_of(channel.module)
    fits = allowed(channel, key, settings, name)
    results = []
    for each, mechanism in MECHANISMS.items():
        if each in fits and mechanism.wraps(key):
            code = fits[each][1]
            results.append(
                _timed(each, lambda m=mechanism, c=code: round_trip(channel, key, m, c))  # type: ignore[misc]
            )
        elif mechanism.fits(key) and each in quirks.broken:
            results.append((False, f"{each} not used: {quirks.broken[each]}"))
    return results


def _timed(name: str, call: Callable[[], None]) -> tuple[bool, str]:
    start = time.perf_counter()
    try:
        call()
    except (PKCS11Error, CkError, UnwrapFailed) as error:
        _raise_if_lost(error)
        return False, f"{name} fails: {reason(error) or error}"
    return True, f"{name} {_micro(start)}"


def _raise_if_lost(error: BaseException) -> None:
    if reason(error) in LOST:
        raise error


def _use(_: object) -> None:
    return None


def _micro(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1e6:.0f} µs"


def _clean(text: str) -> str:
    return " ".join(text.replace("\0", " ").split())
