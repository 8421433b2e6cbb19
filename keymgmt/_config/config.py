"""keymgmt.toml: the providers, what is trusted, and how to seal.

Where it is looked for: the path given, else ``$KEYMGMT_CONFIG``, else the user's config directory,
else ``/etc/keymgmt/keymgmt.toml``. Never the working directory, for the command line neither: a
config in a delivered folder would choose whom to trust and which module to load. Nothing else is
read from the environment.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from keymgmt._config.locate import MAX_CONFIG, find_config, read_config
from keymgmt._config.messages import parse_settings
from keymgmt._crypto.dek_cache import DekCache
from keymgmt._crypto.signatures import PublicKey
from keymgmt._providers.contract import KeyProvider, Settings
from keymgmt._providers.names import is_name
from keymgmt._providers.recipient_file import plain_fingerprint
from keymgmt._providers.registry import backends, load_backend
from keymgmt._providers.secret_source import CREDENTIALS, ConfigPath, expand_home
from keymgmt._system.fork import ForkSafe
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError

__all__ = ["Config", "Policy", "SealDefaults", "load_config", "use_config"]

log = logging.getLogger("keymgmt")
Fingerprints = Annotated[list[str], Field(min_length=1)]


class AttestedKeys(Settings):
    """What an attested key must be, beyond attested.

    Each is a list of SHA-256 in hex, as ``keymgmt tpm enroll accept`` prints them; every list that
    is here must hold the key's.

    Attributes:
        policies: digests of policies of keys.
        approvers: fingerprints of who approves the boot states of a key.
        makers: fingerprints of the certificates that the office trusts as those of makers.
    """

    policies: Fingerprints | None = None
    approvers: Fingerprints | None = None
    makers: Fingerprints | None = None

    @field_validator("policies", "approvers", "makers")
    @classmethod
    def _plain(cls, value: list[str] | None) -> list[str] | None:
        plain = [plain_fingerprint(text) for text in value or ()]
        for text in plain:
            if not re.fullmatch(r"[0-9a-f]{64}", text):
                raise ValueError(f"{text[:80]!r} is no SHA-256: write 64 hex digits")
        return plain or None


class RememberedReleases(Settings):
    """What remembers releases, with an anchor that a restored disk does not bring back.

    Attributes:
        file: the file.
        anchor: the provider that keeps the anchor, such as one of the backend ``tpm2``.
    """

    file: ConfigPath
    anchor: str | None = None


class Policy(Settings):
    """``[policy]``: what a sealed model must prove before it opens.

    Attributes:
        publishers: public key file (PEM) -> model names that it may publish, or ``["*"]``.
        require_signature: whether a model must be signed by one of them; on unless it is turned
            off here in so many words.
        names: the only model names that open; empty for any.
        minimum_release: model name -> lowest release that opens; with it, other names are refused.
        remember_releases: file that remembers the highest verified release of each name, and the
            highest time seen, by which a clock that was put back is noticed: its path, or a table
            with an anchor as well, by which a file that was put back is noticed.
        signatures: model name -> how many of its publishers must have signed it, each with another
            key; 1 where a name is not here.
        expired: what to do with a model whose publishers' time has passed: ``refuse``, or ``warn``.
        require_expiry: model names whose publishers must have said until when they vouch.
        recipient_signers: public key files (PEM) of those who vouch for recipient files.
        attestation_signers: public key files (PEM) of those who state that a recipient file's key
            was attested by hardware, as ``keymgmt tpm enroll accept`` does; other keys than those
            of ``recipient_signers``.
        require_attested: ``true``: seal to a recipient file only if one of ``attestation_signers``
            says so; no fingerprint and no ``recipient_signers`` replaces it. A table says what the
            key must be on top of it.
        prefer: providers to ask first, in this order.
        fallback: ``"use"`` opens with another group where a provider does not work, and says so;
            ``"refuse"`` does not.
    """

    publishers: dict[str, list[str]] = Field(default_factory=dict)
    require_signature: bool = True
    names: list[str] = Field(default_factory=list)
    minimum_release: dict[str, Annotated[int, Field(ge=0, lt=1 << 53)]] = Field(
        default_factory=dict
    )
    remember_releases: RememberedReleases | None = None
    signatures: dict[str, Annotated[int, Field(ge=1, le=16)]] = Field(default_factory=dict)
    expired: Literal["refuse", "warn"] = "refuse"
    require_expiry: list[str] = Field(default_factory=list)
    recipient_signers: list[str] = Field(default_factory=list)
    attestation_signers: list[str] = Field(default_factory=list)
    require_attested: AttestedKeys | None = None
    prefer: list[str] = Field(default_factory=list)
    fallback: Literal["use", "refuse"] = "use"

    @field_validator("require_attested", mode="before")
    @classmethod
    def _yes_or_a_table(cls, value: object) -> object:
        if isinstance(value, bool):
            return {} if value else None
        if isinstance(value, dict):
            return value
        raise ValueError("write true, false, or a table of policies, approvers and makers")

    @field_validator("remember_releases", mode="before")
    @classmethod
    def _file_or_a_table(cls, value: object) -> object:
        if isinstance(value, dict):
            return value
        if isinstance(value, str | Path):
            return {"file": value}
        raise ValueError("write a path in quotes, or a table of file and anchor")

    @model_validator(mode="after")
    def _attesting_needs_signers(self) -> Policy:
        if self.require_attested and not self.attestation_signers:
            raise ValueError("who attests devices? name them in attestation_signers")
        if set(self.attestation_signers) & set(self.recipient_signers):
            raise ValueError("who attests devices and who vouches for files are two keys")
        return self

    @model_validator(mode="after")
    def _floors_need_signatures(self) -> Policy:
        if (self.minimum_release or self.remember_releases) and not self.require_signature:
            raise ValueError("a release counts for nothing unsigned: leave require_signature on")
        if self.publishers and not self.require_signature:
            raise ValueError("publishers are named, so signatures are required")
        if (self.signatures or self.require_expiry) and not self.require_signature:
            raise ValueError("signatures and their expiry are not looked at: require them")
        for name, count in self.signatures.items():
            found = sum("*" in names or name in names for names in self.publishers.values())
            if found < count:
                raise ValueError(f"{count} must sign {name}, and {found} publishers may")
        return self


class SealDefaults(Settings):
    """``[seal]``: what ``keymgmt seal`` does when it is not told.

    Attributes:
        sign: key that signs new models, as ``provider:key``.
        to: recipient groups, each as ``--to`` takes it; recipient files are relative to this file.
        profile: ``default``, ``fips`` or ``cnsa2``.
    """

    sign: str | None = None
    to: list[str] = Field(default_factory=list)
    profile: str = "default"

    @field_validator("to")
    @classmethod
    def _beside_the_config(cls, groups: list[str], info: ValidationInfo) -> list[str]:
        base = Path((info.context or {}).get("base") or "")
        return [
            "+".join(
                f"@{base / member[1:]}" if member[:1] == "@" and member != "@" else member
                for member in group.split("+")
            )
            for group in groups
        ]


class CacheSettings(Settings):
    """``[cache]``: keep data keys for a while, where the key service is slow. Off without it.

    What that trades is in the manual of the Vault backend, "Opening often".

    Attributes:
        seconds: how long a data key is kept, more than 0 and at most a day.
        uses: how many opens it serves before the key service is asked again.
    """

    seconds: Annotated[float, Field(gt=0, le=86400, strict=False)]
    uses: Annotated[int, Field(ge=1, le=1_000_000)]


class _File(Settings):
    providers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    policy: Policy = Field(default_factory=Policy)
    seal: SealDefaults = Field(default_factory=SealDefaults)
    cache: CacheSettings | None = None


class Config(ForkSafe):
    """A loaded config and the providers made from it, each once and when first asked for.

    Safe to share between threads, and with forked children. A context manager that closes its
    providers.
    """

    _lock: threading.RLock

    def __init__(self, data: Mapping[str, Any], *, path: Path | None = None) -> None:
        """Check ``data`` as if read from ``path``; relative paths are relative to its directory.

        Raises:
            ConfigError: naming the file, the table and the key, with the nearest known one.
        """
        self.path = path
        self._base = path.parent.absolute() if path else Path.cwd()
        checked = parse_settings(_File, data, self._base, str(path or "config"), "")
        self.policy: Final = checked.policy
        self.seal: Final = checked.seal
        self._cache_settings = checked.cache
        self._cache: DekCache | None = None
        self._tables = checked.providers
        self._made: dict[str, KeyProvider[Any]] = {}
        super().__init__()
        for name, table in self._tables.items():
            self._check_table(name, table)
        for name in self.policy.prefer:
            if name not in self._tables:
                raise self._unknown(name, "[policy] prefer")
        memory = self.policy.remember_releases
        if memory and memory.anchor is not None and memory.anchor not in self._tables:
            raise self._unknown(memory.anchor, "[policy] remember_releases")

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def _check_table(self, name: str, table: Mapping[str, Any]) -> None:
        where = f"{self.path or 'config'}: [providers.{name}]"
        if not is_name(name):
            raise ConfigError(
                f"{where} is no provider name",
                hint="lower-case letters, digits, '-' and '_', at most 32",
            )
        if not isinstance(table.get("backend"), str):
            raise ConfigError(f"{where} has no backend", hint='add a line such as backend = "file"')
        if not isinstance(table.get("distribution", ""), str):
            raise ConfigError(f"{where} distribution: one name of a distribution, as a string")

    @property
    def base(self) -> Path:
        """The directory to which relative paths are relative."""
        return self._base

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The configured providers in the order of the file, preferred ones first."""
        first = [name for name in self.policy.prefer if name in self._tables]
        return (*first, *(name for name in self._tables if name not in first))

    def backend_of(self, name: str) -> str:
        """The backend of a configured provider; ConfigError if there is no such provider."""
        if name not in self._tables:
            raise self._unknown(name, "")
        return str(self._tables[name]["backend"])

    def provider(self, name: str) -> KeyProvider[Any]:
        """The provider called ``name``, made on the first call.

        Raises:
            ConfigError: no such provider, or its table is wrong.
            BackendNotInstalled: its backend is not there.
        """
        with self._lock:
            if name not in self._made:
                kind, settings = self._settings(name)
                self._made[name] = kind(name, settings)
            return self._made[name]

    def _settings(self, name: str) -> tuple[type[KeyProvider[Settings]], Settings]:
        backend = self.backend_of(name)
        table = dict(self._tables[name])
        del table["backend"]
        kind = load_backend(backend, table.pop("distribution", None))
        where = str(self.path or "config")
        return kind, parse_settings(kind.Settings, table, self._base, where, f"providers.{name}")

    @property
    def secret_variables(self) -> set[str]:
        """Environment variables that lead to secrets of any provider.

        Those of ``{ env = "NAME" }``, that of systemd where there is a ``{ credential = "NAME" }``,
        and what backends say of their settings (``Settings.secret_variables``). A backend that is
        not installed says nothing, which is logged as a warning.

        Raises:
            ConfigError: the table of a provider is wrong.
            BackendNotInstalled: a backend is installed, and does not work.
        """

        def named(value: object) -> Iterator[str]:
            if isinstance(value, Settings):
                yield from value.secret_variables
                value = vars(value)
            if isinstance(value, dict):
                if isinstance(value.get("env"), str):
                    yield value["env"]
                if isinstance(value.get("credential"), str):
                    yield CREDENTIALS
                value = tuple(value.values())
            if isinstance(value, list | tuple):
                for inner in value:
                    yield from named(inner)

        found = set(named(self._tables))
        installed = backends()
        for name in self._tables:
            if (backend := self.backend_of(name)) in installed:
                found.update(named(self._settings(name)[1]))
            else:
                log.warning(
                    "[providers.%s]: the backend %r is not installed, so which variables have "
                    "its secrets is not known: they are not taken from the program",
                    name,
                    backend,
                )
        return found

    @property
    def cache(self) -> DekCache | None:
        """The cache of data keys, or None if ``[cache]`` is not in the config.

        Raises:
            ConfigError: its memory cannot be locked.
        """
        with self._lock:
            if self._cache is None and self._cache_settings is not None:
                try:
                    self._cache = DekCache(self._cache_settings.seconds, self._cache_settings.uses)
                except OSError as error:
                    raise ConfigError(
                        f"[cache] needs one page of locked memory: {error.strerror}",
                        hint="raise the limit (ulimit -l, LimitMEMLOCK=), or take [cache] out",
                    ) from error
            return self._cache

    def public_key(self, name: str) -> bytes:
        """A public key file of the config (PEM) as DER; ConfigError where it is none."""
        try:
            file = self._base / expand_home(name)
        except ValueError as error:
            raise ConfigError(f"the public key {name} is refused: {error}") from error
        content = read_file(
            file,
            what="public key",
            limit=MAX_CONFIG,
            access="trusted",
            hint="export it with: keymgmt keys export PROVIDER:KEY --format pem",
        )
        try:
            return PublicKey.from_pem(bytes(content)).der
        except ConfigError as error:
            raise ConfigError(f"the public key {file} is refused: {error}") from error

    def _unknown(self, name: str, where: str) -> ConfigError:
        near = difflib.get_close_matches(name, self._tables, n=1)
        known = ", ".join(self._tables) or "none"
        place = f"{self.path or 'config'}: " + (f"{where}: " if where else "")
        return ConfigError(
            f"{place}no provider named {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"configured: {known}",
        )

    def close(self) -> None:
        """Close every provider that was made; the config may be used again."""
        with self._lock:
            made, self._made = self._made, {}
            if self._cache is not None:
                self._cache.clear()
        for provider in made.values():
            provider.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Config {self.path or ''} providers={list(self._tables)}>"


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read a config file; with no path, the one that ``find_config`` finds.

    Raises:
        ConfigError: missing, unreadable, writable by others, not TOML, or wrong in a member.
    """
    file = Path(path) if path is not None else find_config()
    return Config(read_config(file), path=file)


@contextlib.contextmanager
def use_config(keys: Config | str | os.PathLike[str] | None) -> Iterator[Config]:
    """The config that a verb works with: the caller's own, or one loaded here and closed after."""
    if isinstance(keys, Config):
        yield keys
    else:
        with load_config(keys) as config:
            yield config
