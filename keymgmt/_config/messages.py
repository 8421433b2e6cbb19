"""Errors of a config, with the file, the table, the key, and the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin

from pydantic import ValidationError

from keymgmt._providers.contract import Settings
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["parse_settings", "sentence"]

# The type of a pydantic error -> a message for somebody who writes TOML. Types that only the
# settings of other people's backends can raise keep the message of pydantic.
_WORDS: Final = {
    "missing": "it is missing",
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"),
        "not a table: write {{ NAME = VALUE }}",
    ),
    **dict.fromkeys(("list_type", "tuple_type"), "not a list: write [VALUE, VALUE]"),
    "string_type": "not a text: write it in quotes",
    "is_instance_of": "not a path: write it in quotes",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "not a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "neither true nor false"),
    "literal_error": "not {expected}",
    "greater_than": "not above {gt}",
    "greater_than_equal": "below {ge}",
    "less_than": "not below {lt}",
    "less_than_equal": "above {le}",
    "too_short": "fewer than {min_length} in it",
    "too_long": "more than {max_length} in it",
    "string_too_short": "shorter than {min_length} characters",
    "string_too_long": "longer than {max_length} characters",
    "string_pattern_mismatch": "not of the form {pattern}",
}


def parse_settings(
    model: type[Any], data: Mapping[str, Any], base: Path, file: str, table: str
) -> Any:
    """Check ``data`` against a Settings model; a ConfigError names file, table and key."""
    try:
        return model.model_validate(data, context={"base": base})
    except ValidationError as error:
        raise _explain(error, model, file, table) from None


def _explain(error: ValidationError, model: type[BaseModel], file: str, table: str) -> ConfigError:
    errors = error.errors(include_input=False, include_url=False)
    # A misspelt key is both unknown and missing. The unknown key is the helpful error.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path, members = _walk(model, first["loc"])
    where = ".".join(part for part in [table, *path[:-1]] if part)
    key = path[-1] if path else ""
    prefix = f"{file}: " + (f"[{where}] " if where else "") + (f"{key}: " if key else "")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, members, n=1)
        known = ", ".join(sorted(members))
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {known}"
        return ConfigError(f"{prefix}unknown key", hint=hint)
    if first["type"].startswith("union_tag_"):
        member, tags = first["ctx"]["discriminator"], first["ctx"].get("expected_tags")
        tag = f"unknown {member} {first['ctx']['tag']!r}" if tags else f"{member} is missing"
        return ConfigError(f"{prefix}{tag}", hint=tags and f"known: {tags}")
    more = error.error_count() - 1
    return ConfigError(
        f"{prefix}{sentence(first)}",
        hint=f"{more} more in this table" if more else None,
    )


def sentence(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, of one of the errors of a ValidationError."""
    if words := _WORDS.get(error["type"]):
        return words.format(**error.get("ctx", {}))
    message: str = error["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _walk(model: type[BaseModel], location: Iterable[object]) -> tuple[list[str], list[str]]:
    """The path of an error as the file has it, and the members known in its table.

    pydantic puts names of its own into the path: the tag of a tagged union, the type of each member
    of a plain union that it tried, and ``[key]`` where the name of a member itself is wrong.
    """
    path: list[str] = []
    tables: list[type[BaseModel]] = [model]
    plain_union = False
    for part in map(str, location):
        if part == "[key]":  # the name is in the path already
            continue
        tagged = [each for each in tables if _has_tag(each, part)] if len(tables) > 1 else []
        table = next((each for each in tables if part in each.model_fields), None)
        if tagged:
            tables = tagged
        elif table is not None:
            annotation = table.model_fields[part].annotation
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
