"""The commands of this package: by heading, name -> line in the help; and where the function is.

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

# In the order of the help.
_COMMANDS: Final = {
    "Keys and set-up": {
        "init": "Make a config with a file provider, a key that wraps and one that signs.",
        "backends": "Show the installed backends, what they can do, and what is wrong with them.",
        "doctor": "Check the config, every provider and its keys; exit 1 if anything failed.",
        "keys": "Make, list, rotate, retire, delete and export keys.",
        "plugin": "Prove a backend on your own hardware, or start one.",
    },
    "Sealed models": {
        "exec": "Run a program on the plain files of a sealed model, which exist in memory alone.",
        "seal": "Encrypt a model for everybody who may open it, and sign it.",
        "inspect": "Show what a sealed model says of itself; it takes no key, and proves nothing.",
        "verify": "Prove all that can be proved: the publisher, the key, and every byte.",
        "unseal": "Write the plain files of a sealed model, where nothing protects them any more.",
        "sign": "Add a publisher's signature, after the model was opened and every digest checked.",
        "rewrap": "Change who opens a model; without --add, --drop and --set, move to newest key "
        "versions.",
        "reseal": "Encrypt a model anew, for these groups and no others: who held the old key "
        "loses access.",
        "push": "Upload a sealed model to a registry: only the files that are not there yet.",
        "pull": "Download a sealed model from a registry if this config accepts it: only missing "
        "files.",
    },
    "This program": {
        "help": "Show the help of a command.",
        "completion": "Print the script with which a shell completes commands, options, providers "
        "and keys.",
    },
}
# Module and name of each function that is not called like its module.
_PLACES: Final = {
    "keys": "keys:app",
    "plugin": "plugin:app",
    "exec": "exec:exec_",
    "verify": "inspect:verify",
    "unseal": "seal:unseal",
    "sign": "seal:sign",
    "reseal": "rewrap:reseal",
    "push": "registry:push",
    "pull": "registry:pull",
    "help": "_help:help_command",
    "completion": "_completion:completion",
}


def own_commands() -> list[LazyCommand]:
    """Our commands in the order of the help."""
    return [
        LazyCommand(name, line, panel, partial(_load, name))
        for panel, commands in _COMMANDS.items()
        for name, line in commands.items()
    ]


def _load(name: str) -> typer.Typer:
    module, _, attribute = _PLACES.get(name, f"{name}:{name}").partition(":")
    command = getattr(import_module(f"keymgmt.cli.{module}"), attribute)
    if isinstance(command, typer.Typer):
        return command
    app = typer.Typer()
    app.command(name)(command)
    return app
