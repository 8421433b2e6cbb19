"""docs/config.md says what the Settings models say, and the man pages what the help says."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from programs import run
from scripts import load_script

from keymgmt._config.config import _File

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def make_config() -> ModuleType:
    return load_script(DOCS / "make_config.py")


def test_the_page_is_current(make_config):
    written = (DOCS / "config.md").read_text("utf-8")
    assert written == make_config.page(), "run: python docs/make_config.py"


def test_every_table_of_a_config_is_on_it(make_config):
    page = make_config.page()
    assert all(f"\n## `[{name}" in page for name in _File.model_fields)


def test_every_setting_of_a_table_has_a_sentence(make_config):
    rows = [line for line in make_config.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]


@pytest.mark.once
def test_the_man_pages_are_those_of_the_commands():
    pages = load_script(DOCS / "make_man.py").pages()
    written = {file: file.read_text("utf-8") for file in pages if file.exists()}
    assert written == pages, "run: python docs/make_man.py"
    root = DOCS.parent
    files = {*root.glob("keymgmt/man/*"), *root.glob("backends/*/*/man/*")}
    files |= {*root.glob("loader/*/*/man/*")}
    assert files == pages.keys(), "remove the pages of what is no command any more"
    assert {"keymgmt.1", "keymgmt-seal.1", "keymgmt-tpm.1"} <= {file.name for file in files}
    if shutil.which("groff") is None:
        pytest.skip("no groff to look for mistakes in the pages")
    command = ["groff", "-man", "-Tutf8", "-ww", "-z", *map(str, sorted(files))]
    assert run(*command, check=True).stderr == ""
