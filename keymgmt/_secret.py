"""Where a secret comes from: a PIN, a token, a passphrase. Never a literal in the config."""

from __future__ import annotations

import getpass
import io
import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo, model_validator

from keymgmt._provider import Settings
from keymgmt.errors import ConfigError

__all__ = ["ConfigPath", "SecretSource", "expand_home", "private_file_problem"]

MAX_SECRET: Final = 65536


def _resolve(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError("a path is not empty")
    base = (info.context or {}).get("base")
    path = expand_home(value)
    return path if path.is_absolute() or base is None else Path(base) / path


def expand_home(text: str) -> Path:
    """A path with its leading ``~`` or ``~user`` expanded; ValueError where there is no home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home directory for {text!r}") from error


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]
"""A path in the config: ``~`` is expanded, and a relative one is relative to the config file."""


def private_file_problem(info: os.stat_result) -> str | None:
    """Say why a file or directory that holds secrets is not private, or None if it is."""
    if info.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {info.st_uid}"
    if stat.S_IMODE(info.st_mode) & 0o077:
        return f"others can use it (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


class SecretSource(Settings):
    """Exactly one of five places; the secret is read when needed and not kept here.

    ``{ env = "NAME" }`` an environment variable; ``{ file = "PATH" }`` a private file (0600);
    ``{ credential = "NAME" }`` a systemd credential (systemd.exec(5), LoadCredential);
    ``{ keyring = "SERVICE/USER" }`` the desktop's keyring, with the extra ``keyring``;
    ``{ prompt = "TEXT" }`` asked on the terminal.
    """

    env: str | None = None
    file: ConfigPath | None = None
    credential: str | None = None
    keyring: str | None = None
    prompt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_literal(cls, value: Any) -> Any:
        if isinstance(value, str):
            # The message must not repeat the value: it may be the secret.
            raise ValueError('a secret is not written here; name its source: { file = "PATH" }')  # noqa: TRY004
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> SecretSource:
        if sum(value is not None for value in self.__dict__.values()) != 1:
            raise ValueError("name exactly one of env, file, credential, keyring, prompt")
        if self.credential is not None and Path(self.credential).name != self.credential:
            raise ValueError("a credential is a name without slashes")
        return self

    def __str__(self) -> str:
        kind, value = next((k, v) for k, v in self.__dict__.items() if v is not None)
        return f"{kind} {value}"

    def read(self) -> bytearray:
        """Fetch the secret, 1 to 65536 bytes without a final line end; the caller wipes it.

        Raises:
            ConfigError: the place is missing, empty, too large or not private.
        """
        secret = self._fetch()
        if secret.endswith(b"\n"):
            del secret[-1:]
            if secret.endswith(b"\r"):
                del secret[-1:]
        if not secret:
            raise ConfigError(f"the secret from {self} is empty")
        return secret

    def _fetch(self) -> bytearray:
        if self.env is not None:
            value = os.environb.get(self.env.encode())
            if value is None:
                raise ConfigError(f"the environment variable {self.env} is not set")
            return bytearray(value)
        if self.file is not None:
            return _read_file(self.file, private=True)
        if self.credential is not None:
            directory = os.environ.get("CREDENTIALS_DIRECTORY")
            if not directory:
                raise ConfigError(
                    f"no systemd credentials here, so none named {self.credential}",
                    hint="add LoadCredential= to the unit; it sets CREDENTIALS_DIRECTORY",
                )
            # systemd makes these 0400 or 0440 in a directory that only the unit can enter.
            return _read_file(Path(directory) / self.credential, private=False)
        if self.keyring is not None:
            return _ask_keyring(self.keyring)
        if not sys.stdin.isatty():
            raise ConfigError(
                f"cannot ask for {self.prompt!r}: this is not a terminal",
                hint="name a file, a credential or an environment variable instead",
            )
        return bytearray(getpass.getpass(f"{self.prompt}: ").encode())


def _read_file(path: Path, *, private: bool) -> bytearray:
    try:
        with io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_SECRET:
                raise ConfigError(f"{path} is no file of at most {MAX_SECRET} bytes")
            if private and (problem := private_file_problem(info)):
                raise ConfigError(
                    f"the secret file {path} is refused: {problem}", hint=f"chmod 600 {path}"
                )
            secret = bytearray(info.st_size)
            del secret[file.readinto(secret) :]
            return secret
    except OSError as error:
        raise ConfigError(f"cannot read the secret file {path}: {error.strerror}") from error


def _ask_keyring(place: str) -> bytearray:
    service, slash, user = place.partition("/")
    if not slash:
        raise ConfigError(f"{place!r} is not SERVICE/USER")
    try:
        import keyring
    except ImportError as error:
        raise ConfigError(
            "the package keyring is not installed", hint='pip install "keymgmt[keyring]"'
        ) from error
    value = keyring.get_password(service, user)
    if value is None:
        raise ConfigError(
            f"the keyring has nothing for {place}", hint=f"keyring set {service} {user}"
        )
    return bytearray(value.encode())
