"""docs/config.md says what the Settings models say, of every setting."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from keymgmt._config.config import _File

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def make_config() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config", DOCS / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(make_config: ModuleType) -> None:
    written = (DOCS / "config.md").read_text("utf-8")
    assert written == make_config.page(), "run: python docs/make_config.py"


def test_every_table_of_a_config_is_on_it(make_config: ModuleType) -> None:
    page = make_config.page()
    assert all(f"\n## `[{name}" in page for name in _File.model_fields)


def test_every_setting_of_a_table_has_a_sentence(make_config: ModuleType) -> None:
    rows = [line for line in make_config.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]
