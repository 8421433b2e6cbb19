"""Write docs/config.md from the Settings models: ``python docs/make_config.py``.

The models are the only place where a setting is said: names, types and defaults come from their
fields, the sentences from the ``Attributes:`` of their docstrings. A test holds the page to them.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic_core import PydanticUndefined

from keymgmt._config.config import CacheSettings, Policy, SealDefaults
from keymgmt._config.remote import Remote
from keymgmt._providers.registry import load_backend, load_evidence
from keymgmt._providers.secret_source import SecretSource
from keymgmt.backend import Settings

PAGE = Path(__file__).with_name("config.md")
TABLES = {"policy": Policy, "seal": SealDefaults, "cache": CacheSettings, "remote": Remote}
BACKENDS = ("file", "vault", "pkcs11", "tpm2", "aws", "broker")
EVIDENCE = ("sgx", "tdx", "tpm2")

INTRODUCTION = """\
# keymgmt.toml

<!-- Written by docs/make_config.py from the Settings models; edit those. -->

The config names the providers, what is trusted, and how to seal. It is the path given, else
`$KEYMGMT_CONFIG`, else `keymgmt/keymgmt.toml` in `$XDG_CONFIG_HOME` or `~/.config`, else
`/etc/keymgmt/keymgmt.toml`. Never the working directory: a config in a delivered folder would
choose whom to trust and which module to load. Nothing else is read from the environment.

- The config, each folder above it and each link on the way to it belong to root or to this user,
  and others cannot write them; a group may, if it is this user's own and nobody else is in it. The
  same holds for public key files, key directories and what remembers releases; what is private,
  such as a key directory or the file of a secret, nobody else can even read. What is refused is
  named with the one `chmod` or `chown` that mends it.
- An unknown key is an error, and the nearest known one is suggested. Values are not converted.
- A relative path is relative to the config file; `~` is the home directory.
- A secret is never written here. It is a table that says where the secret is:

| secret | where it is |
|---|---|
| `{ env = "NAME" }` | an environment variable |
| `{ file = "PATH" }` | a file that nobody else can read (0600) |
| `{ credential = "NAME" }` | a systemd credential (`LoadCredential=`) |
| `{ keyring = "SERVICE/USER" }` | the desktop's keyring, with the extra `keyring` |
| `{ prompt = "TEXT" }` | asked on the terminal |

## `[providers.NAME]`

One table for each provider; `NAME` is yours, and `NAME:KEY` names a key. Two keys are of every
backend, all others are the backend's own, below.

| key | type | default | meaning |
|---|---|---|---|
| `backend` | text | required | kind of key service, as `keymgmt backends` lists them |
| `distribution` | text | any | the only one that may provide it; another package is refused |
"""


def kind_of(annotation: Any) -> str:
    """A type in the words of a config."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [kind_of(one) for one in arguments if one is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return ", ".join(f'`"{one}"`' for one in arguments)
    if origin in (list, tuple, set, frozenset):
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return f"table: name to {kind_of(arguments[1])}"
    if annotation is SecretSource:
        return "secret"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "table"
    return {str: "text", bool: "true or false", int: "integer", float: "number", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def default_of(field: Any) -> str:
    """A default as it would be written, or that there is none."""
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        return "empty"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str | Path) else f"`{value}`"


def sentences_of(model: type[Settings]) -> dict[str, str]:
    """The ``Attributes:`` of a docstring, and of those that it inherits from: name -> sentence."""
    sentences: dict[str, str] = {}
    for each in reversed([each for each in model.__mro__ if issubclass(each, Settings)]):
        _, _, text = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        found = re.findall(r"^    (\w+): (.*(?:\n      +.*)*)", text, re.MULTILINE)
        sentences |= {name: " ".join(sentence.split()) for name, sentence in found}
    return sentences


def nested_in(annotation: Any) -> list[type[Settings]]:
    """The Settings models inside of a type, SecretSource left out."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [] if annotation is SecretSource else [annotation]
    return [model for part in typing.get_args(annotation) for model in nested_in(part)]


def markdown(text: str) -> str:
    """A docstring's inline code as Markdown's, safe inside of a table."""
    return text.replace("``", "`").replace("|", "\\|")


def table_of(model: type[Settings]) -> str:
    """One row for each key of a model; the sentences only where it has any."""
    sentences, hints = sentences_of(model), typing.get_type_hints(model)
    rows = [["key", "type", "default", "meaning"], ["---"] * 4]
    rows += [
        [f"`{name}`", kind_of(hints[name]), default_of(field), markdown(sentences.get(name, ""))]
        for name, field in model.model_fields.items()
    ]
    width = 4 if sentences else 3
    return "\n".join(["| " + " | ".join(row[:width]) + " |" for row in rows] + [""])


def nested_tables(model: type[Settings]) -> str:
    """A heading and a table for each model inside of a model."""
    parts: list[str] = []
    for name, hint in typing.get_type_hints(model, include_extras=True).items():
        for inner in nested_in(hint) if name in model.model_fields else []:
            introduction, _, _ = inspect.cleandoc(inner.__doc__ or "").partition("\nAttributes:")
            parts += [f"`{name}`: {markdown(introduction.strip())}\n", table_of(inner)]
    return "\n".join(parts)


def core() -> str:
    """The part of the page that needs no backend."""
    tables = [INTRODUCTION]
    for name, model in TABLES.items():
        introduction, _, _ = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:")
        said = introduction.strip().partition(": ")[2]
        tables += [
            f"## `[{name}]`\n",
            f"{markdown(said[:1].upper() + said[1:])}\n",
            table_of(model),
        ]
        if inner := nested_tables(model):
            tables.append(inner)
    return "\n".join(tables)


def backend(name: str) -> str:
    """The part of one installed backend."""
    model: type[Settings] = load_backend(name).Settings
    parts = [f'## `backend = "{name}"`\n', table_of(model)]
    inner = nested_tables(model)
    return "\n".join([*parts, inner] if inner else parts)


def evidence(kind: str) -> str:
    """The part of one installed kind of evidence."""
    return f'## `evidence = {{ kind = "{kind}" }}`\n\n{table_of(load_evidence(kind).Settings)}'


def page() -> str:
    """The whole page; every backend of ours must be installed."""
    parts = [*(backend(name) for name in BACKENDS), *(evidence(kind) for kind in EVIDENCE)]
    return "\n".join([core(), *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
