"""``keymgmt init``: a config that is safe from the start."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keymgmt.cli._options import Json
from keymgmt.console import print_json, say
from keymgmt.errors import ConfigError, KeyNotFound, ProviderUnavailable

if TYPE_CHECKING:
    from keymgmt._providers.contract import SupportsKeyManagement

__all__ = ["init"]

_CONFIG: Final = """\
# The providers (where keys are), the policy (what may be opened) and how to seal.

[providers.local]
backend = "file"
path = "keys"

[policy]
# Only models that this publisher signed are opened. Instead of "*", name the models it may publish.
publishers = {{ "{publisher}.pem" = ["*"] }}

[seal]
to = ["local:{kek}"]
sign = "local:{publisher}"
"""


def init(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIRECTORY]",
            help="Where to make it; else the user's config directory, where every application "
            "finds it.",
        ),
    ] = None,
    kek: Annotated[str, typer.Option(metavar="NAME", help="The key that wraps.")] = "models",
    publisher: Annotated[
        str, typer.Option(metavar="NAME", help="The key that signs.")
    ] = "publisher",
    as_json: Json = False,
) -> None:
    """Make a config with a file provider, a key that wraps and one that signs.

    Models that it opens must be signed. Nothing that exists is replaced.

    Examples:
        keymgmt init
        keymgmt init /etc/keymgmt
    """
    from keymgmt._config.config import Config
    from keymgmt._config.locate import FILE_NAME, user_directory
    from keymgmt._crypto.signatures import PublicKey
    from keymgmt._providers.contract import SupportsKeyManagement, SupportsSigning
    from keymgmt._providers.names import check_key
    from keymgmt._system.files import make_folder, replace_file

    named = directory is not None
    if directory is None:
        directory = user_directory()
        if directory is None:
            raise ConfigError("this user has no home directory", hint="name a directory")
    content = _CONFIG.format(kek=check_key(kek), publisher=check_key(publisher))
    if kek == publisher:
        raise ConfigError("a key has one purpose", hint="give --kek and --publisher two names")
    path = directory / FILE_NAME
    if os.path.lexists(path):
        raise ConfigError(
            f"there is a config already: {path}", hint="edit it, or name another directory"
        )
    table = {"backend": "file", "path": "keys"}
    with Config({"providers": {"local": table}}, path=path) as config:
        provider = config.provider("local")
        if not (
            isinstance(provider, SupportsKeyManagement) and isinstance(provider, SupportsSigning)
        ):
            raise ConfigError("the installed backend 'file' makes no keys")
        try:
            make_folder(directory)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {directory}: {error.strerror}") from error
        # The config is written last, so that everything that it names exists.
        wraps = _ensure(provider, kek, "wrap")
        signs = _ensure(provider, publisher, "sign")
        public = directory / f"{publisher}.pem"
        replace_file(public, PublicKey(provider.public_key(publisher)).to_pem())
    try:
        replace_file(path, content.encode(), exclusive=True)
    except FileExistsError as error:
        raise ConfigError(f"there is a config already: {path}") from error
    if as_json:
        made = {"config": path, "key": f"local:{kek}", "publisher": f"local:{publisher}"}
        said = {name: str(value) for name, value in {**made, "public_key": public}.items()}
        print_json({"format": "keymgmt-init/1", **said})
        return
    say(f"config     {path}")
    say(f"key        local:{kek} ({wraps})")
    say(f"publisher  local:{publisher} ({signs}), public part in {public}")
    say("")
    say(f"Back up {directory / 'keys'}, encrypted: without it, nothing opens again.")
    if named:
        say(f"Use it with: export KEYMGMT_CONFIG={shlex.quote(str(path.absolute()))}")


def _ensure(provider: SupportsKeyManagement, key: str, purpose: str) -> str:
    """Make a key unless an earlier, interrupted run made it; returns its kind."""
    try:
        info = provider.describe_key(key)
    except (KeyNotFound, ProviderUnavailable):  # no directory yet
        kind = next(name for name, use in provider.key_kinds.items() if use == purpose)
        info = provider.create_key(key, kind, {})
    if info.purpose != purpose:
        raise ConfigError(f"the key {key!r} exists and does not {purpose}", hint="name another one")
    return info.kind
