"""Write the man pages from the help of the commands: ``python docs/make_man.py``.

A page for each command, in the distribution that has it: ``PACKAGE/man/keymgmt-COMMAND.1``, which
its wheel installs into ``share/man/man1``. A test holds the pages to the commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer

from keymgmt.cli import app
from keymgmt.cli._plugins import announced

ROOT: Final = Path(__file__).parents[1]
GLOBAL: Final = {"--config", "--verbose", "--log-json", "--help"}

OVERVIEW: Final = """\
.SH CONFIG
The file named by
.BR -c ,
else by
.BR $KEYMGMT_CONFIG ,
else
.I ~/.config/keymgmt/keymgmt.toml
(below
.B $XDG_CONFIG_HOME
where that is set), else
.IR /etc/keymgmt/keymgmt.toml .
Never one of the working directory.
.SH EXIT STATUS
.TP
.B 0
all is well
.TP
.B 1
anything else that went wrong
.TP
.B 2
a wrong option or argument
.TP
.B 3
the config, or a path or key that was named
.TP
.B 4
a model that is damaged or not trusted
.TP
.B 5
a key service refused
.TP
.B 6
a key service cannot be reached
.TP
.B 130
Ctrl-C
"""


def roff(text: str) -> str:
    """A text of ours as lines of roff: what is in backquotes is bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    return "\n".join("\\&" + line if line[:1] in ".'" else line for line in text.splitlines())


def split(help_text: str) -> tuple[str, list[str], list[str]]:
    """Help as its first sentence, the paragraphs after it, and the lines of its examples."""
    first, *rest = help_text.strip().split("\n\n")
    examples = [p for p in rest if p.startswith("\b")]
    lines = [line.strip() for p in examples for line in p.splitlines()[2:]]
    return " ".join(first.split()), [" ".join(p.split()) for p in rest if p not in examples], lines


def records(context: Any) -> Iterator[tuple[str, str]]:
    """The arguments and options of a command, without those that every command has."""
    for param in context.command.params:
        if GLOBAL.isdisjoint(param.opts) and (record := param.get_help_record(context)):
            yield record


def body(context: Any, heading: str) -> Iterator[str]:
    """Usage, text, options and examples of one command; ``heading`` is the macro of a section."""
    first, paragraphs, examples = split(context.command.help or "")
    usage = " ".join(context.command.collect_usage_pieces(context))
    yield f"{heading} SYNOPSIS" if heading == ".SH" else ".PP"
    yield f".B {roff(context.command_path)}\n{roff(usage)}"
    if heading == ".SH":
        yield f".SH DESCRIPTION\n{roff(first)}"
    else:
        yield f".PP\n{roff(first)}"
    yield from (".PP\n" + roff(paragraph) for paragraph in paragraphs)
    if options := list(records(context)):
        yield ".SH OPTIONS" if heading == ".SH" else ".PP\nOptions:"
        yield from (f".TP\n.B {roff(names)}\n{roff(text)}" for names, text in options)
    if examples:
        yield ".SH EXAMPLES" if heading == ".SH" else ".PP\nExamples:"
        yield "\n".join([".PP", ".nf", *map(roff, examples), ".fi"])


def leaves(context: Any, package: str) -> Iterator[Any]:
    """The contexts of the commands below a group that are of its own distribution."""
    for name, command in context.command.commands.items():
        below = typer.Context(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from leaves(below, package)
        elif command.callback.__module__.partition(".")[0] == package:
            yield below


def page(context: Any, package: str) -> str:
    """The page of a command, or of a group with all that is in it."""
    name = context.command_path.replace(" ", "-")
    first, paragraphs, _ = split(context.command.help or "")
    parts = [
        '.\\" Written by docs/make_man.py from the help of the command; edit that.',
        f'.TH {roff(name.upper())} 1 "" keymgmt',
        f".SH NAME\n{roff(name)} \\- {roff(first.rstrip('.'))}",
    ]
    if hasattr(context.command, "commands"):
        parts += [f".SH SYNOPSIS\n.B {roff(context.command_path)}\nCOMMAND [OPTIONS] [ARGS]..."]
        parts += [".SH DESCRIPTION\n" + roff(first)]
        parts += [".PP\n" + roff(paragraph) for paragraph in paragraphs]
        parts += [".SH COMMANDS"]
        for leaf in leaves(context, package):
            parts += [f".SS {roff(leaf.command_path)}", *body(leaf, ".SS")]
    else:
        parts += body(context, ".SH")
    return "\n".join([*parts, ".SH SEE ALSO\n.BR keymgmt (1)\n"])


def overview(context: Any) -> str:
    """keymgmt(1): the options of every command, the commands, the config and the exit codes."""
    first, _, _ = split(context.command.help or "")
    said = [".SH GLOBAL OPTIONS\nThey stand anywhere on the command line."]
    for param in context.command.params:
        if record := param.get_help_record(context):
            said.append(f".TP\n.B {roff(record[0])}\n{roff(record[1])}")
    said.append(".SH COMMANDS")
    for name, command in context.command.commands.items():
        said.append(f".TP\n.BR keymgmt\\-{name} (1)\n{roff(split(command.help or '')[0])}")
    return "\n".join(
        [
            '.\\" Written by docs/make_man.py from the help of the commands; edit that.',
            '.TH KEYMGMT 1 "" keymgmt',
            f".SH NAME\nkeymgmt \\- {roff(first.rstrip('.'))}",
            ".SH SYNOPSIS\n.B keymgmt\n[OPTIONS] COMMAND [ARGS]...",
            f".SH DESCRIPTION\n{roff(first)}",
            *said,
            OVERVIEW,
        ]
    )


def pages() -> dict[Path, str]:
    """Every page by its file; every distribution of ours must be installed."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="keymgmt")
    folder = ROOT / "keymgmt" / "man"
    found = {folder / "keymgmt.1": overview(context)}
    homes = dict.fromkeys(root.commands, ("keymgmt", ROOT / "keymgmt"))
    for name, (entry, *_) in announced().items():
        package = entry.module.partition(".")[0]
        for home in [*ROOT.glob(f"backends/*/{package}"), *ROOT.glob(f"loader/*/{package}")]:
            homes[name] = package, home
    for name, (package, home) in homes.items():
        _, command, _ = root.resolve_command(context, [name])
        below = typer.Context(command, info_name=name, parent=context)
        found[home / "man" / f"keymgmt-{name}.1"] = page(below, package)
    return found


if __name__ == "__main__":
    made = pages()
    for file, text in made.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
