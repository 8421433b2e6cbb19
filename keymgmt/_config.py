"""keymgmt.toml: the providers, what is trusted, and how to seal.

Where it is looked for: the path given, else ``$KEYMGMT_CONFIG``, else the user's config directory,
else ``/etc/keymgmt/keymgmt.toml``. Never the working directory (the command line does that itself,
and says so). Nothing else is read from the environment.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, Union, get_args, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from keymgmt._cache import DekCache
from keymgmt._fork import ForkSafe
from keymgmt._names import KeyRef, is_key, is_name
from keymgmt._provider import KeyProvider, Settings
from keymgmt._registry import load_backend
from keymgmt._secret import ConfigPath, expand_home
from keymgmt._verify import PublicKey
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "Config",
    "Policy",
    "SealDefaults",
    "find_config",
    "load_config",
    "parse_settings",
    "use_config",
    "user_directory",
]

FILE_NAME: Final = "keymgmt.toml"
MAX_CONFIG: Final = 1 << 20


class Policy(Settings):
    """``[policy]``: what a sealed model must prove before it opens.

    Attributes:
        publishers: public key file (PEM) -> model names that it may publish, or ``["*"]``.
        require_signature: whether a model must be signed by one of them; on unless it is turned
            off here in so many words.
        names: the only model names that open; empty for any.
        minimum_release: model name -> lowest release that opens; with it, other names are refused.
        remember_releases: file that remembers the highest verified release of each name.
        recipient_signers: public key files (PEM) of those who vouch for recipient files.
        require_attested: seal to a recipient file only if one of them vouches that its key was
            attested by hardware, as ``keymgmt tpm enroll accept`` does; no fingerprint replaces it.
        prefer: providers to ask first, in this order.
    """

    publishers: dict[str, list[str]] = Field(default_factory=dict)
    require_signature: bool = True
    names: list[str] = Field(default_factory=list)
    minimum_release: dict[str, Annotated[int, Field(ge=0, lt=1 << 53)]] = Field(
        default_factory=dict
    )
    remember_releases: ConfigPath | None = None
    recipient_signers: list[str] = Field(default_factory=list)
    require_attested: bool = False
    prefer: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _attesting_needs_signers(self) -> Policy:
        if self.require_attested and not self.recipient_signers:
            raise ValueError("who vouches for attested devices? name them in recipient_signers")
        return self

    @model_validator(mode="after")
    def _floors_need_signatures(self) -> Policy:
        if (self.minimum_release or self.remember_releases) and not self.require_signature:
            raise ValueError("a release counts for nothing unsigned: leave require_signature on")
        if self.publishers and not self.require_signature:
            raise ValueError("publishers are named, so signatures are required")
        return self


class SealDefaults(Settings):
    """``[seal]``: what ``keymgmt seal`` does when it is not told.

    Attributes:
        sign: key that signs new models, as ``provider:key``.
        to: recipient groups, each as ``--to`` takes it; recipient files are relative to this file.
        profile: ``default`` or ``fips``.
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
        backend = self.backend_of(name)
        with self._lock:
            if name not in self._made:
                table = dict(self._tables[name])
                del table["backend"]
                distribution = table.pop("distribution", None)
                kind = load_backend(backend, distribution)
                settings = parse_settings(
                    kind.Settings,
                    table,
                    self._base,
                    str(self.path or "config"),
                    f"providers.{name}",
                )
                self._made[name] = kind(name, settings)
            return self._made[name]

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
        try:
            content = _read_trusted(file, "public key")
        except OSError as error:
            raise ConfigError(
                f"cannot read the public key {file}: {error.strerror}",
                hint="export it with: keymgmt keys export PROVIDER:KEY --format pem",
            ) from error
        try:
            return PublicKey.from_pem(content).der
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


def find_config() -> Path:
    """The config file that is used when none is named; ConfigError if there is none."""
    named = os.environ.get("KEYMGMT_CONFIG")
    if named:
        return Path(named)
    user = user_directory()
    candidates = [user / FILE_NAME] if user else []
    candidates.append(Path("/etc/keymgmt") / FILE_NAME)
    closed = []
    for path in candidates:
        try:
            if path.is_file():
                return path
        except PermissionError:
            closed.append(path)
    if closed:
        # Whoever opens it says why it cannot be read.
        return closed[0]
    raise ConfigError(
        "no config file: looked at $KEYMGMT_CONFIG, " + ", ".join(map(str, candidates)),
        hint="make one with: keymgmt init",
    )


def user_directory() -> Path | None:
    """Where this user's config is; None for a user without a home."""
    named = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    if named.is_absolute():  # the XDG specification has relative ones ignored
        return named / "keymgmt"
    try:
        return Path.home() / ".config" / "keymgmt"
    except RuntimeError:
        return None


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read a config file; with no path, the one that ``find_config`` finds.

    Raises:
        ConfigError: missing, unreadable, writable by others, not TOML, or wrong in a member.
    """
    file = Path(path) if path is not None else find_config()
    try:
        content = _read_trusted(file, "config")
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {file}: {error.strerror}", hint="make one with: keymgmt init"
        ) from error
    try:
        data = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    return Config(data, path=file)


@contextlib.contextmanager
def use_config(keys: Config | str | os.PathLike[str] | None) -> Iterator[Config]:
    """The config that a verb works with: the caller's own, or one loaded here and closed after."""
    if isinstance(keys, Config):
        yield keys
    else:
        with load_config(keys) as config:
            yield config


def _read_trusted(file: Path, what: str) -> bytes:
    """Read a file that says whom to trust; ConfigError where others can write it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor
        _refuse_writable(f"the {what} {file}", file, os.fstat(stream.fileno()))
        content = stream.read(MAX_CONFIG + 1)
    if len(content) > MAX_CONFIG:
        raise ConfigError(f"the {what} {file} is larger than {MAX_CONFIG} bytes")
    return content


def _refuse_writable(what: str, file: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what} is not a regular file")
    if info.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{what} is refused: it belongs to user {info.st_uid}",
            hint="whoever writes it chooses whom to trust; own it yourself",
        )
    if info.st_mode & 0o022:
        raise ConfigError(f"{what} is refused: others can write it", hint=f"chmod go-w {file}")


def parse_settings(
    model: type[Any], data: Mapping[str, Any], base: Path, file: str, table: str
) -> Any:
    """Check ``data`` against a Settings model; a ConfigError names file, table and key."""
    try:
        return model.model_validate(data, context={"base": base})
    except ValidationError as error:
        raise _explain(error, model, file, table) from None


def _explain(error: ValidationError, model: type[BaseModel], file: str, table: str) -> ConfigError:
    found = error.errors(include_input=False, include_url=False)
    # A misspelt key is also a missing one; to say that it is missing would not help.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    path, members = _walk(model, first["loc"])
    where = ".".join(part for part in [table, *path[:-1]] if part)
    key = path[-1] if path else ""
    place = f"{file}: " + (f"[{where}] " if where else "") + (f"{key}: " if key else "")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, members, n=1)
        known = ", ".join(sorted(members))
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {known}"
        return ConfigError(f"{place}unknown key", hint=hint)
    if first["type"].startswith("union_tag_"):
        member, tags = first["ctx"]["discriminator"], first["ctx"].get("expected_tags")
        tag = f"unknown {member} {first['ctx']['tag']!r}" if tags else f"{member} is missing"
        return ConfigError(f"{place}{tag}", hint=tags and f"known: {tags}")
    message = first["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    return ConfigError(
        f"{place}{message[:1].lower()}{message[1:]}",
        hint=f"{more} more in this table" if more else None,
    )


def _walk(model: type[BaseModel], location: Iterable[object]) -> tuple[list[str], list[str]]:
    """The path of an error as the file has it, and the members known in its table.

    pydantic puts names of its own into the path: the tag of a tagged union, the kind that a member
    of a plain union was tried as.
    """
    path: list[str] = []
    tables: list[type[BaseModel]] = [model]
    plain_union = False
    for part in map(str, location):
        tagged = [each for each in tables if _has_tag(each, part)] if len(tables) > 1 else []
        found = next((each for each in tables if part in each.model_fields), None)
        if tagged:
            tables = tagged
        elif found is not None:
            annotation = found.model_fields[part].annotation
            tables = _tables(annotation)
            plain_union = not tables and get_origin(annotation) in (Union, UnionType)
            path.append(part)
        elif not plain_union:
            path.append(part)
    return path, list(tables[0].model_fields) if tables else []


def _tables(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _tables(argument)]


def _has_tag(table: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in table.model_fields.values())


def check_model_name(name: str) -> str:
    """Return ``name`` if a model may be called so (the grammar of key names), else ConfigError."""
    if not is_key(name):
        raise ConfigError(
            f"not a model name: {name[:80]!r}",
            hint="lower-case letters, digits, '.', '_' and '-', at most 64",
        )
    return name


def parse_group(text: str) -> tuple[str, ...]:
    """Split one ``--to`` group, ``a:x+b:y+@file``, into its members; ConfigError if malformed."""
    members = tuple(text.split("+"))
    for member in members:
        if not member.startswith("@"):
            KeyRef.parse(member)
        elif member == "@":
            raise ConfigError(f"{text!r} names no recipient file after '@'")
    if len(set(members)) != len(members):
        raise ConfigError(
            f"{text!r} names the same key twice",
            hint="the shares of a group go to different keys; name each once",
        )
    return members
