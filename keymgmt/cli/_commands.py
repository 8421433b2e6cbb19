"""The commands of this package: name -> heading and line in the help, and where the function is.

The module of a command is imported when the command is run or completed; the help of the whole
program imports none. A test compares each line with the first sentence of the command's own help.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Final

import typer

from keymgmt.cli._lazy import LazyCommand

__all__ = ["own_commands"]

_KEYS: Final = "Keys and set-up"
_MODELS: Final = "Sealed models"
_PROGRAM: Final = "This program"
_COMMANDS: Final = {
    "init": (
        _KEYS,
        "Make a config with a file provider, a key that wraps and one that signs.",
        "init:init",
    ),
    "backends": (
        _KEYS,
        "Show the installed backends, what they can do, and what is wrong with them.",
        "backends:backends",
    ),
    "doctor": (
        _KEYS,
        "Check the config, every provider and its keys; exit 1 if anything failed.",
        "doctor:doctor",
    ),
    "exec": (
        _MODELS,
        "Run a program on the plain files of a sealed model, which exist in memory alone.",
        "exec:exec_",
    ),
    "seal": (
        _MODELS,
        "Encrypt a model for everybody who may open it, and sign it.",
        "seal:seal",
    ),
    "inspect": (
        _MODELS,
        "Show what a sealed model says of itself; it takes no key, and proves nothing.",
        "inspect:inspect",
    ),
    "verify": (
        _MODELS,
        "Prove all that can be proved: the publisher, the key, and every byte.",
        "inspect:verify",
    ),
    "unseal": (
        _MODELS,
        "Write the plain files of a sealed model, where nothing protects them any more.",
        "seal:unseal",
    ),
    "sign": (
        _MODELS,
        "Add a publisher's signature, after the model was opened and every digest checked.",
        "seal:sign",
    ),
    "rewrap": (
        _MODELS,
        "Change who opens a model; without --add, --drop and --set, move to newest key versions.",
        "rewrap:rewrap",
    ),
    "reseal": (
        _MODELS,
        "Encrypt a model anew, for these groups and no others: who held the old key loses access.",
        "rewrap:reseal",
    ),
    "push": (
        _MODELS,
        "Upload a sealed model to a registry: only the files that are not there yet.",
        "registry:push",
    ),
    "pull": (
        _MODELS,
        "Download a sealed model from a registry if this config accepts it: only missing files.",
        "registry:pull",
    ),
    "help": (_PROGRAM, "Show the help of a command.", "_help:help_command"),
    "completion": (
        _PROGRAM,
        "Print the script with which a shell completes commands, options, providers and keys.",
        "_completion:completion",
    ),
    "keys": (_KEYS, "Make, list, rotate, retire, delete and export keys.", "keys:app"),
    "plugin": (_KEYS, "Prove a backend on your own hardware, or start one.", "plugin:app"),
}


def own_commands() -> list[LazyCommand]:
    """Our commands in the order of the help."""
    return [
        LazyCommand(name, line, panel, partial(_load, name, place))
        for name, (panel, line, place) in _COMMANDS.items()
    ]


def _load(name: str, place: str) -> typer.Typer:
    module, _, attribute = place.partition(":")
    command = getattr(import_module(f"keymgmt.cli.{module}"), attribute)
    if isinstance(command, typer.Typer):
        return command
    app = typer.Typer()
    app.command(name)(command)
    return app
