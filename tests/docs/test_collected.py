"""Nothing that a page or a hint tells people to run was left out: looked up in the sources alone.

Which scenario runs what is read from the calls of ``run_page``, ``run_block`` and ``follow`` in the
modules beside this one, each of which runs in the environment that has what it needs.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from keymgmt import errors

ROOT = Path(__file__).parents[2]
SCENARIOS = [
    path
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if path.stem != Path(__file__).stem
]


def calls(name: str) -> list[tuple[str, ...]]:
    """The words that the scenarios give to a method of ``Desk``."""
    found = []
    for path in SCENARIOS:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == name:
                words = [each.value for each in node.args if isinstance(each, ast.Constant)]
                found.append(tuple(word for word in words if isinstance(word, str)))
    return found


def runnable(docs: Any, page: str) -> list[str]:
    """What can be run on a page and is not excused."""
    found = []
    for block in docs.blocks(page):
        if block.language in ("toml", "python"):
            first = block.text.splitlines()[0]
            if not docs.is_not_run(page, first):
                found.append(f"{block.place}: {first}")
        elif block.language in docs.RUN:
            left = [each for each in docs.commands(block) if not each.installs]
            found += [
                f"{each.place}: {each.text}"
                for each in left
                if not docs.is_not_run(page, each.text)
            ]
    return found


def test_the_extra_all_has_every_backend_and_the_readme_names_the_loaders_that_it_lacks():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    brought = set(extras["all"])
    for backend in ("aws", "broker", "file", "pkcs11", "tpm2", "vault"):
        assert set(extras[backend]) <= brought
    loaders = [path.name for path in (ROOT / "loader").iterdir() if path.name in extras]
    lacking = sorted(name for name in loaders if not set(extras[name]) <= brought)
    named = ", ".join(f"`{name}`" for name in lacking)
    assert f"OpenVINO; other runtimes ({named})" in (ROOT / "README.md").read_text()


def test_pages_were_found(docs):
    assert {"README.md", "docs/cli.md", "backends/file/README.md"} <= set(docs.PAGES)
    assert sum(len(docs.blocks(page)) for page in docs.PAGES) > 70
    assert len(docs.hints()) > 80


def test_every_block_says_what_it_is(docs):
    """``sh``, ``console``, ``toml`` and ``python`` are run; what is only shown has no command."""
    wrong = []
    for page in docs.PAGES:
        for block in docs.blocks(page):
            if block.language not in docs.RUN | docs.SHOWN:
                wrong.append(f"{block.place}: a fence of {block.language or 'no language'}")
            elif block.language in docs.SHOWN and re.search(
                rf"^(\$ |keymgmt |{docs.PROGRAMS} )", block.text, re.MULTILINE
            ):
                wrong.append(f"{block.place}: a command in a fence of {block.language}")
    assert not wrong


def test_every_page_is_run(docs):
    run = {page for page, *_ in calls("run_page")}
    left_out = [each for page in docs.PAGES if page not in run for each in runnable(docs, page)]
    assert not left_out, "a scenario is to run these: tests/docs/README.md says how"
    assert run <= set(docs.PAGES)


def test_every_command_in_a_hint_is_followed(docs):
    followed = {each for each in calls("follow") if len(each) == 2}
    told = {(hint.package, hint.command): hint for hint in docs.hints()}
    left_out = [
        f"{hint.place}: {hint.command}"
        for of, hint in told.items()
        if of not in followed and not docs.is_not_run(*of) and not docs.INSTALLS.match(hint.command)
    ]
    assert not left_out, "a scenario is to follow these: tests/docs/README.md says how"
    assert followed <= set(told)


def test_what_is_not_run_is_still_there_and_has_a_reason(docs):
    there = {(hint.package, hint.command) for hint in docs.hints()}
    for page in docs.PAGES:
        for block in docs.blocks(page):
            if block.language in ("toml", "python"):
                there.add((page, block.text.splitlines()[0]))
            elif block.language in docs.RUN:
                there.update((page, each.text) for each in docs.commands(block))
    listed = [(each["where"], each["command"]) for each in docs.not_run()]
    there.update((page, "*") for page in docs.PAGES)
    assert set(listed) <= there
    assert len(listed) == len(set(listed))
    assert all(each["reason"] for each in docs.not_run())


def test_tox_runs_every_scenario():
    settings = (ROOT / "tox.ini").read_text()
    assert not [path.name for path in SCENARIOS if f"/docs/{path.name}" not in settings]


def test_the_site_has_room_for_every_page():
    """Its table of contents is the start page, and for decisions their own."""
    linked = {
        (page.parent / target).resolve()
        for page in (ROOT / "docs/index.md", ROOT / "docs/decisions/README.md")
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
    }
    left_out = {*ROOT.glob("docs/**/*.md")} - linked - {ROOT / "docs/index.md"}
    assert not left_out, "list it in docs/index.md, below the heading where a reader looks for it"


def test_every_error_is_explained():
    """With its exit code, on docs/errors.md; that of CannotUnlock depends."""
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d, or]+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE
    )
    classes = {name: getattr(errors, name) for name in errors.__all__}
    codes = {
        name: str(each.exit_code)
        for name, each in classes.items()
        if isinstance(each, type) and issubclass(each, errors.KeymgmtError)
    }
    assert dict(rows) == codes | {"CannotUnlock": "4, 5 or 6"}


def pages() -> list[str]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*/README.md")]
    return sorted(str(page.relative_to(ROOT)) for page in found)


@pytest.mark.parametrize("page", pages())
def test_its_links_lead_somewhere(page):
    missing = []
    text = (ROOT / page).read_text()
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    missing += [name for name in re.findall(r"\]\[([^\]]+)\]", text) if name not in named]
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *named.values()]:
        # What PyPI shows names the files of the repository by their addresses.
        ours = re.match(r"https://github\.com/keymgmt/keymgmt/(?:blob|tree)/main/", target)
        if not ours and ("://" in target or target.startswith("mailto:")):
            continue
        path, _, anchor = target[ours.end() if ours else 0 :].partition("#")
        folder = ROOT if ours else (ROOT / page).parent
        file = folder / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            missing.append(target)
    assert not missing


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_the_scripts_that_it_names_are_there(page):
    named = re.findall(r"\b(?:benchmarks|examples|docs)/[\w/-]+\.py\b", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
