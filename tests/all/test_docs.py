"""The config examples of the README and the manuals are configs, and their links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from keymgmt import Config

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("backends/*/README.md"),
    ROOT / "loader" / "README.md",
]
EXAMPLES = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL), 1)
    if "[providers." in text or "[policy]" in text
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_is_a_config_that_makes_its_providers(text: str, tmp_path: Path) -> None:
    # An example may leave out what the page said before; it may not say anything wrong.
    with Config(tomllib.loads(text), path=tmp_path / "keymgmt.toml") as config:
        for name in config.provider_names:
            assert config.provider(name).name == name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            missing.append(target)
    assert not missing


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_scripts_that_it_names_are_there(page: Path) -> None:
    named = re.findall(r"\b(?:benchmarks|examples|docs)/[\w/-]+\.py\b", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
