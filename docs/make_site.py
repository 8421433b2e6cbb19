"""Write what Sphinx makes the site from: ``python docs/make_site.py FOLDER``.

The pages are plain Markdown, which any forge shows. ``index.md`` is the table of contents: the
pages that it lists are copied, and a link from one to another stays a link inside of the site; any
other link into the repository becomes its address. Added are a page for each command, for each
public module and for the schemas of JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import typer
from make_man import announced, app, leaves, records, split

from keymgmt import errors

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent
REPOSITORY: Final = "https://github.com/keymgmt/keymgmt"

# The words and the target of each link, and a block of code, where nothing is one.
LINK: Final = re.compile(r"(?<=\[)([^\]]*)\]\(([^)\s]+)(?=\))")
FENCE: Final = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)

# The pages that are below a page in the navigation.
BELOW: Final = {
    "cli.md": ["schemas", "commands/*"],
    "decisions/README.md": ["*"],
    "python.md": ["python/*"],
}


# Pages


def chapters() -> dict[str, dict[Path, str]]:
    """The headings of ``index.md``, and the pages that each lists with their titles."""
    _, *parts = re.split(r"^## ", (DOCS / "index.md").read_text("utf-8"), flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: {(DOCS / to).resolve(): title for title, to in LINK.findall(part)}
        for part in parts
    }


def position(page: Path) -> Path:
    """Where a page of the repository is on the site: what is in ``docs`` is at the top."""
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT)


def rewritten(page: Path, pages: set[Path]) -> str:
    """The text of a page, with its links as they are on the site."""

    def link(match: re.Match[str]) -> str:
        words = match[1]
        path, hash_, anchor = match[2].partition("#")
        file = (page.parent / path).resolve()
        if file in pages:
            # Empty words are the title of the page: a reader of the site sees no file.
            words = "" if words.endswith(".md") else words
            path = os.path.relpath(position(file), position(page).parent)
        elif path and file.exists() and file.suffix != ".svg":
            kind = "tree" if file.is_dir() else "blob"
            path = f"{REPOSITORY}/{kind}/main/{file.relative_to(ROOT)}"
        return f"{words}]({path}{hash_}{anchor}"

    parts = FENCE.split(shown(page, page.read_text("utf-8")))
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def shown(page: Path, text: str) -> str:
    """A page in which a paragraph that is only a link to an example has that file below it."""

    def example(match: re.Match[str]) -> str:
        file = page.parent / match[1]
        language = {".service": "ini", ".yaml": "yaml"}.get(file.suffix, "docker")
        return f"{match[0]}\n\n```{language}\n{file.read_text('utf-8')}```"

    return re.sub(r"^\[[^\]]+\]\((\.\./examples/\S+)\)$", example, text, flags=re.MULTILINE)


def contents(entries: list[str], caption: str = "") -> str:
    """A table of contents that is shown in the navigation alone."""
    lines = ["", "```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *entries, "```"]
    return "\n".join(line for line in lines if line != ":caption: ") + "\n"


# Commands


def command(context: Any, mark: str) -> Iterator[str]:
    """Heading, text, options and examples of a command, or of a group without its commands."""
    first, paragraphs, examples = split(context.command.help or "")
    yield f"{mark} `{context.command_path}`"
    yield first
    if not hasattr(context.command, "commands"):
        usage = " ".join(context.command.collect_usage_pieces(context))
        yield f"```text\n{context.command_path} {usage}\n```"
    yield from paragraphs
    yield from (f"`{names}`\n: {text or 'as its name says'}" for names, text in records(context))
    if examples:
        yield "```console\n" + "\n".join(f"$ {line}" for line in examples) + "\n```"


def commands() -> Iterator[tuple[str, str]]:
    """The name and the page of each command; a group has all of its own on one page."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="keymgmt")
    packages = dict.fromkeys(root.commands, "keymgmt")
    for name, (entry, *_) in announced().items():
        packages[name] = entry.module.partition(".")[0]
    for name, package in packages.items():
        _, found, _ = root.resolve_command(context, [name])
        below = typer.Context(found, info_name=name, parent=context)
        parts = list(command(below, "#"))
        for leaf in leaves(below, package) if hasattr(found, "commands") else ():
            parts += command(leaf, "##")
        yield name, "\n\n".join(parts) + "\n"


# Python


def modules() -> list[str]:
    """The public modules: ``python.md`` lists them."""
    return re.findall(r"^\| \[`([\w.]+)`\]", (DOCS / "python.md").read_text("utf-8"), re.MULTILINE)


def names(module: ModuleType) -> list[str]:
    """The names on the page of a module; the errors are on the page of their own alone."""
    elsewhere = set() if module is errors else {*errors.__all__}
    return [each for each in module.__all__ if each not in elsewhere | {"__version__"}]


def reference(name: str) -> str:
    """The page of a public module, from its docstrings."""
    module = import_module(name)
    values = {each: getattr(module, each) for each in names(module)}
    # What is neither has no docstring of its own.
    explained = [
        e for e, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)
    ]
    lines = [
        ".. highlight:: default",
        "",
        f".. automodule:: {name}",
        f"   :members: {', '.join(explained)}",
    ]
    lines += ["   :show-inheritance:"] * (module is errors)
    for each in sorted(values.keys() - explained):
        lines += ["", f".. py:data:: {each}"]
        if isinstance(values[each], int | str):
            lines += [f"   :value: {values[each]!r}"]
    return "\n".join([f"# `{name}`", "", "```{eval-rst}", *lines, "```", ""])


# JSON


def schemas() -> str:
    """Every output of ``--json``, with its members."""
    parts = [
        "# JSON Schemas",
        "What each command prints with `--json` ([more](cli.md#json)), and its schema.",
    ]
    for file in sorted(ROOT.glob("**/keymgmt*/schemas/*.json"), key=lambda each: each.name):
        if any(each.startswith(".") or each == "build" for each in file.relative_to(ROOT).parts):
            continue
        schema = json.loads(file.read_text("utf-8"))
        name, _, version = file.stem.rpartition("-")
        address = f"{REPOSITORY}/blob/main/{file.relative_to(ROOT)}"
        parts += [f"## `{name}/{version}`", f"[{schema['title']}]({address})"]
        for shape in schema.get("oneOf", [schema]):
            rows = [
                f"| `{member}` | {kind(value)} | {'always' * (member in shape['required'])} |"
                for member, value in shape["properties"].items()
            ]
            parts.append("\n".join(["| member | type | there |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def kind(schema: dict[str, Any]) -> str:
    """The type of a member in words."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{json.dumps(each)}`" for each in values)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind, schema["anyOf"])))
    if "items" in schema:
        return f"list of {kind(schema['items'])}"
    name = schema.get("type", "object" if "$ref" in schema else "any")
    return name if isinstance(name, str) else " or ".join(name)


# The site


def write(folder: Path) -> None:
    """Write the whole source of the site into a folder."""
    listed = chapters()
    named = {page for each in listed.values() for page in each}
    pages = named | {DOCS / "index.md", *(DOCS / "decisions").glob("*.md")}
    if left := sorted(str(page.relative_to(ROOT)) for page in {*DOCS.rglob("*.md")} - pages):
        sys.exit(f"docs/index.md does not list {', '.join(left)}: add each below a heading")
    made = {f"commands/{name}.md": text for name, text in commands()}
    made |= {f"python/{name}.md": reference(name) for name in modules()}
    made["schemas.md"] = schemas()
    for page in pages:
        made[str(position(page))] = rewritten(page, pages)
    for name, entries in BELOW.items():
        made[name] += contents(entries)
    for caption, titles in listed.items():
        entries = [f"{title} </{position(page)}>" for page, title in titles.items()]
        made["index.md"] += contents(entries, caption)
    for name, text in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    for picture in DOCS.glob("*.svg"):
        shutil.copy(picture, folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
