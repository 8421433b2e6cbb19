"""What pages and hints tell people to install, with pip and apt-get; and the page that installs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]


def cache() -> str:
    """uv's own, although the home of the desk is another one."""
    return subprocess.check_output(["uv", "cache", "dir"], text=True).strip()


@pytest.fixture
def fresh(desk, tmp_path_factory) -> Any:
    """A desk with a new environment; what is ours comes from what was built, and not from PyPI."""
    dist = os.environ.get("KEYMGMT_TEST_DIST")
    if dist is None:
        dist = str(tmp_path_factory.mktemp("dist"))
        command = ["uv", "build", "--quiet", "--all-packages", "--out-dir", dist]
        subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    desk.variables = {"PIP_FIND_LINKS": dist, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    desk.variables |= {"UV_FIND_LINKS": dist, "UV_CACHE_DIR": cache()}
    # How the registry is reached from here.
    ways = re.compile("(SSL|PIP|UV|REQUESTS|HTTPS?|NO)_", re.IGNORECASE)
    desk.variables |= {n: v for n, v in os.environ.items() if ways.match(n)} | desk.variables
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    desk.run(f"{base} -m venv ../fresh && export PATH=$PWD/../fresh/bin:$PATH")
    return desk


def test_everything_that_is_to_be_installed_is_there(fresh, docs, require_tool):
    """The words as they stand; what stands in for pip resolves them, and changes nothing."""
    told = {
        command.text
        for page in docs.PAGES
        for block in docs.blocks(page)
        if block.language in ("sh", "console")
        for command in docs.commands(block)
        if command.installs
    }
    told |= {hint.command for hint in docs.hints() if docs.INSTALLS.match(hint.command)}
    require_tool("apt-get")
    pip = fresh.folder / "fresh" / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec uv pip "$@" --dry-run --python "${0%/*}/python"\n')
    (fresh.folder / "apt.conf").write_text('APT::Get::Simulate "true";\n')
    fresh.variables["APT_CONFIG"] = str(fresh.folder / "apt.conf")
    assert len(told) > 10
    for text in sorted(told):
        named = text.replace("[{}]", "[file]").replace("{}", "keymgmt-file")
        fresh.run(named.removesuffix(", where it is missing"))


def test_writing_a_backend(fresh):
    fresh.installs = True
    fresh.prelude = (
        "from abc import ABC\nfrom typing import ClassVar, Generic, TypeVar\n"
        "from keymgmt.backend import Dek, Health, Settings, WrappedKey\n"
        'S = TypeVar("S", bound=Settings)\n'
    )

    fresh.run_page("docs/writing-a-backend.md")
