"""keymgmt.toml: the providers, what is trusted, and how to seal.

Where it is looked for: the path given, else ``$KEYMGMT_CONFIG``, else the user's config directory,
else ``/etc/keymgmt/keymgmt.toml``. Never the working directory, for the command line neither: a
config in a delivered folder would choose whom to trust and which module to load. Nothing else is
read from the environment.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from keymgmt._config.locate import MAX_CONFIG, find_config, read_config
from keymgmt._config.messages import parse_settings
from keymgmt._config.remote import Remote
from keymgmt._crypto.dek_cache import DekCache
from keymgmt._crypto.signatures import PublicKey
from keymgmt._providers.contract import KeyProvider, Settings
from keymgmt._providers.names import is_name
from keymgmt._providers.recipient_file import plain_fingerprint
from keymgmt._providers.registry import backends, load_backend
from keymgmt._providers.secret_source import CREDENTIALS, ConfigPath
from keymgmt._system.closing import Closing
from keymgmt._system.fork import ForkSafe
from keymgmt._system.home import expand_home
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError

__all__ = ["Config", "Policy", "SealDefaults", "load_config", "load_settings", "use_config"]

log = logging.getLogger("keymgmt")
M = TypeVar("M", bound=Settings)
Fingerprints = Annotated[list[str], Field(min_length=1)]


class AttestedKeys(Settings):
    """Conditions for an attested key, beyond being attested.

    Each is a list of SHA-256 digests in hex, as ``keymgmt tpm enroll accept`` prints them. A key
    must satisfy every list that is given.

    Attributes:
        policies: the digest of the key's policy must be one of these.
        approvers: the fingerprint of the approver of the key's boot states must be one of these.
        makers: the fingerprint of the maker's certificate, as the office trusts it, must be one of
            these.
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
                raise ValueError(f"{text[:80]!r} is not a SHA-256 digest: write 64 hex digits")
        return plain or None


class RememberedReleases(Settings):
    """The release memory, and an anchor that does not go back when a disk is restored.

    Attributes:
        file: the file of the release memory.
        anchor: the provider that keeps the anchor, such as a provider of the backend ``tpm2``.
    """

    file: ConfigPath
    anchor: str | None = None


class Policy(Settings):
    """``[policy]``: the conditions under which a sealed model opens.

    Attributes:
        publishers: public key file (PEM) -> model names that it may publish, or ``["*"]``.
        require_signature: whether a model must be signed by one of the publishers; on unless it is
            set to ``false`` here.
        names: the only model names that open; empty for any name.
        minimum_release: model name -> lowest release that opens. Where this is set, a model of any
            other name is refused.
        remember_releases: the file that remembers the highest verified release of each name, and
            the highest time seen, by which a clock that was put back is noticed. Either its path,
            or a table of its path and an anchor, by which a file that was put back is noticed too.
        signatures: model name -> how many of its publishers must have signed it, each with another
            key; 1 for a name that is not listed.
        expired: what happens to a model whose signatures have expired: ``refuse``, or ``warn``.
        require_expiry: names of models whose signatures must state an expiry.
        recipient_signers: public key files (PEM) of those who vouch for recipient files.
        attestation_signers: public key files (PEM) of those who state that the key of a recipient
            file was attested by hardware, as ``keymgmt tpm enroll accept`` does. No key may be both
            here and in ``recipient_signers``.
        require_attested: with ``true``, sealing to a recipient file needs the signature of one of
            ``attestation_signers``; no fingerprint and none of ``recipient_signers`` replaces it. A
            table adds conditions for the attested key.
        prefer: providers to ask first, in this order.
        fallback: where a provider does not work and another group opens the model, ``"use"`` opens
            the model with a warning, and ``"refuse"`` refuses it.
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
            raise ValueError("require_attested needs attestation_signers: name who attests devices")
        if set(self.attestation_signers) & set(self.recipient_signers):
            raise ValueError(
                "a key is in both attestation_signers and recipient_signers: use two keys"
            )
        return self

    @model_validator(mode="after")
    def _floors_need_signatures(self) -> Policy:
        if (self.minimum_release or self.remember_releases) and not self.require_signature:
            raise ValueError(
                "minimum_release and remember_releases need signatures, since anybody can write a "
                "release: leave require_signature on"
            )
        if self.publishers and not self.require_signature:
            raise ValueError("publishers are named, so signatures are required")
        if (self.signatures or self.require_expiry) and not self.require_signature:
            raise ValueError(
                "signatures and require_expiry need signatures: leave require_signature on"
            )
        for name, count in self.signatures.items():
            trusted = sum("*" in names or name in names for names in self.publishers.values())
            if trusted < count:
                raise ValueError(
                    f"{count} publishers must sign {name}, and only {trusted} are trusted for it"
                )
        return self


class SealDefaults(Settings):
    """``[seal]``: the defaults of ``keymgmt seal``.

    Attributes:
        sign: key that signs new models, as ``provider:key``.
        to: recipient groups, each as for ``--to``; recipient files are relative to this file.
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
    """``[cache]``: keep data keys for a while, where the key service is slow.

    Without this table no data key is kept. The manual of the Vault backend, "Opening often", says
    what a cache costs in safety.

    Attributes:
        seconds: how long a data key is kept, more than 0 and at most a day.
        uses: how often a kept data key opens its model before the key service is asked again.
    """

    seconds: Annotated[float, Field(gt=0, le=86400, strict=False)]
    uses: Annotated[int, Field(ge=1, le=1_000_000)]


class _File(Settings):
    providers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    policy: Policy = Field(default_factory=Policy)
    seal: SealDefaults = Field(default_factory=SealDefaults)
    cache: CacheSettings | None = None
    remote: Remote = Field(default_factory=Remote)


class Config(ForkSafe, Closing):
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
        self.remote: Final = checked.remote
        self._cache_settings = checked.cache
        self._cache: DekCache | None = None
        self._tables = checked.providers
        self._providers: dict[str, KeyProvider[Any]] = {}
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
                f"{where} is not a provider name",
                hint="lower-case letters, digits, '-' and '_', at most 32",
            )
        if not isinstance(table.get("backend"), str):
            raise ConfigError(f"{where} has no backend", hint='add a line such as backend = "file"')
        if not isinstance(table.get("distribution", ""), str):
            raise ConfigError(f"{where} distribution: write the name of a distribution in quotes")

    @property
    def provider_tables(self) -> bytes:
        """SHA-256 of the tables of all providers, and of the directory to which they are relative.

        It changes with whatever they say. No value of a secret is in them.
        """
        said = json.dumps([os.fspath(self._base), self._tables], sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).digest()

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
            BackendNotInstalled: its backend is not installed.
        """
        with self._lock:
            if name not in self._providers:
                kind, settings = self._settings(name)
                self._providers[name] = kind(name, settings)
            return self._providers[name]

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

        These are each ``{ env = "NAME" }``, the variable of systemd where there is a
        ``{ credential = "NAME" }``, and those that backends read by themselves
        (``Settings.secret_variables``). The latter are not known of a backend that is not
        installed, which is logged as a warning.

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

        variables = set(named([self._tables, self.remote]))
        installed = backends()
        for name in self._tables:
            if (backend := self.backend_of(name)) in installed:
                variables.update(named(self._settings(name)[1]))
            else:
                log.warning(
                    "[providers.%s]: the backend %r is not installed, so which variables have "
                    "its secrets is not known: they are not taken from the program",
                    name,
                    backend,
                )
        return variables

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
        """Read a public key file of the config (PEM), as DER; ConfigError where that fails."""
        try:
            file = self._base / expand_home(name)
        except ValueError as error:
            raise ConfigError(f"the public key {name} is refused: {error}") from error
        content = read_file(
            file,
            label="public key",
            limit=MAX_CONFIG,
            access="trusted",
            hint="export it with: keymgmt keys export PROVIDER:KEY --format pem",
        )
        try:
            return PublicKey.from_pem(bytes(content)).der
        except ConfigError as error:
            raise ConfigError(
                f"the public key {file} is refused: {error}", hint=error.hint
            ) from error

    def _unknown(self, name: str, where: str) -> ConfigError:
        near = difflib.get_close_matches(name, self._tables, n=1)
        known = ", ".join(self._tables) or "none"
        prefix = f"{self.path or 'config'}: " + (f"{where}: " if where else "")
        return ConfigError(
            f"{prefix}no provider named {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"configured: {known}",
        )

    def close(self) -> None:
        """Close every provider that was made, and connections; the config may be used again."""
        with self._lock:
            providers, self._providers = self._providers, {}
            if self._cache is not None:
                self._cache.clear()
        self.remote.kept.clear()
        for provider in providers.values():
            provider.close()

    def __repr__(self) -> str:
        return f"<Config {self.path or ''} providers={list(self._tables)}>"


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read a config file; without ``path``, the file that ``find_config`` finds.

    Raises:
        ConfigError: missing, unreadable, writable by others, not TOML, or wrong in a member.
    """
    file = Path(path) if path is not None else find_config()
    return Config(read_config(file), path=file)


def load_settings(path: str | os.PathLike[str], model: type[M], *, absent: str) -> M:
    """Read the settings file (TOML) of a program that is built on keymgmt.

    The file must be trusted as ``keymgmt.toml`` must be, and errors in it have the same form. A
    ``ConfigPath`` in it is relative to the file.

    Args:
        path: the file.
        model: what the file may say.
        absent: the hint where there is no such file.

    Raises:
        ConfigError: missing, unreadable, writable by others, not TOML, or wrong in a member.
    """
    file = Path(path)
    data = read_config(file, absent=absent)
    settings: M = parse_settings(model, data, file.parent.absolute(), str(file), "")
    return settings


@contextlib.contextmanager
def use_config(keys: Config | str | os.PathLike[str] | None) -> Iterator[Config]:
    """The config for a verb: the caller's, which stays open, or one loaded for the block."""
    if isinstance(keys, Config):
        yield keys
    else:
        with load_config(keys) as config:
            yield config
