"""Where a secret comes from: a PIN, a token, a passphrase. Never a literal in the config."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo, model_validator

from keymgmt._crypto.dek import wipe
from keymgmt._providers.contract import Settings
from keymgmt._system.home import expand_home
from keymgmt._system.terminal import asking
from keymgmt._system.trusted_file import Access, read_file
from keymgmt.errors import ProviderUnavailable

__all__ = ["CREDENTIALS", "ConfigPath", "SecretSource", "read_projected"]

CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)
MAX_SECRET: Final = 65536


def _resolve(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError("a path is not empty")
    base = (info.context or {}).get("base")
    path = expand_home(value)
    return path if path.is_absolute() or base is None else Path(base) / path


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]
"""A path in the config: ``~`` is expanded, and a relative one is relative to the config file."""


class SecretSource(Settings):
    """Where a secret is: exactly one of five sources. It is read when needed, and not kept here.

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
    _unanswered: bool = False  # nobody is asked a second time who did not answer

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
        if self.keyring is not None and "/" not in self.keyring:
            raise ValueError("a keyring entry is written SERVICE/USER")
        return self

    def __str__(self) -> str:
        kind, value = next((k, v) for k, v in self.__dict__.items() if v is not None)
        return f"{kind} {value}"

    def read(self) -> bytearray:
        """Fetch the secret, 1 to 65536 bytes without a final line end; the caller wipes it.

        Raises:
            ProviderUnavailable: the source is missing, empty, too large or not private. That is a
                fault of this machine, so another provider is tried.
        """
        secret = self._fetch()
        if secret.endswith(b"\n"):
            del secret[-1:]
            if secret.endswith(b"\r"):
                del secret[-1:]
        if not secret:
            raise ProviderUnavailable(f"the secret from {self} is empty")
        return secret

    def read_text(self) -> str:
        """Fetch a token, an id or a key that goes into a request; a ``str`` cannot be wiped.

        Raises:
            ProviderUnavailable: as ``read``, or the text is not printable ASCII.
        """
        return _plain(self.read(), str(self))

    def _fetch(self) -> bytearray:
        if self.env is not None:
            value = os.environb.get(self.env.encode())
            if value is None:
                raise ProviderUnavailable(f"the environment variable {self.env} is not set")
            return bytearray(value)
        if self.file is not None:
            return _read(self.file, "secret file", "private")
        if self.credential is not None:
            directory = os.environ.get(CREDENTIALS)
            if not directory:
                raise ProviderUnavailable(
                    f"no systemd credentials here, so none named {self.credential}",
                    hint="add LoadCredential= to the unit; it sets CREDENTIALS_DIRECTORY",
                )
            # systemd makes these files with the mode 0400 or 0440, in a directory that only the
            # unit can enter (systemd.exec(5)): so a group may read them here.
            file = Path(directory) / self.credential
            return _read(file, "credential", "any")
        if self.keyring is not None:
            return _ask_keyring(self.keyring)
        if sys.stdin is None or not sys.stdin.isatty():
            raise ProviderUnavailable(
                f"cannot ask for {self.prompt!r}: this is not a terminal",
                hint="name a file, a credential or an environment variable instead",
            )
        if not self._unanswered:
            try:
                with asking():
                    return bytearray(getpass.getpass(f"{self.prompt}: ").encode())
            except EOFError:  # Ctrl-D
                self._unanswered = True
        raise ProviderUnavailable(
            f"no answer to {self.prompt!r}",
            hint="run it again and type it, or name a file, a credential or an environment "
            "variable instead",
        )


def read_projected(file: Path, label: str) -> str:
    """Read a token that a pod gets as a projected volume; raises as ``read_text``.

    Kubernetes lets all users of the pod read such a file, so it need not be private; others may not
    write it.
    """
    hint = "is this a pod with that volume? else name another file"
    return _plain(_read(file, label, "trusted", hint).strip(), str(file))


def _plain(secret: bytearray, source: str) -> str:
    try:
        text = secret.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    finally:
        wipe(secret)
    if text and text.isprintable():
        return text
    del text  # it may be the secret, and an error tracker would show it
    raise ProviderUnavailable(
        f"the secret from {source} is not a token, an id or a key: "
        "it is empty, or not printable ASCII"
    )


def _read(file: Path, label: str, access: Access, hint: str | None = None) -> bytearray:
    return read_file(
        file, label=label, limit=MAX_SECRET, access=access, error=ProviderUnavailable, hint=hint
    )


def _ask_keyring(entry: str) -> bytearray:
    service, _, user = entry.partition("/")
    try:
        import keyring
    except ImportError as error:
        raise ProviderUnavailable(
            "the package keyring is not installed", hint='pip install "keymgmt[keyring]"'
        ) from error
    try:
        value = keyring.get_password(service, user)
    except Exception as error:  # noqa: BLE001
        # A backend of keyring raises errors of any class, whose text could quote the secret.
        raise ProviderUnavailable(
            f"the keyring does not give {entry}: {type(error).__name__}",
            hint="see which keyring is used: keyring diagnose",
        ) from None
    if value is None:
        raise ProviderUnavailable(
            f"the keyring has nothing for {entry}", hint=f"keyring set {service} {user}"
        )
    return bytearray(value.encode())
