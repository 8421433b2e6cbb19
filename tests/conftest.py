"""What all tests share: tools that a desk may lack and CI must have."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RequireTool = Callable[..., Path]
Install = Callable[..., Path]


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start, also where we run in the background.

    A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what is marked ``once`` on one Python only, where ``KEYMGMT_TEST_ONCE`` names it."""
    chosen = os.environ.get("KEYMGMT_TEST_ONCE")
    if chosen and chosen != f"{sys.version_info.major}.{sys.version_info.minor}":
        left_out = [item for item in items if item.get_closest_marker("once")]
        items[:] = [item for item in items if not item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def require_tool() -> RequireTool:
    """Find a program (or, given an absolute path, a file): ``require_tool("swtpm") -> Path``.

    Several names are alternatives; the first that is found is returned. ``package`` is the Debian
    package to name. Missing is a skip at a desk, and a failure where ``CI`` is set.
    """

    def find(*names: str, package: str | None = None) -> Path:
        scripts = Path(sys.executable).parent
        for name in names:
            if Path(name).is_absolute():
                found = name if Path(name).exists() else None
            else:
                found = shutil.which(name, path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
            if found:
                return Path(found)
        message = f"not found: {' or '.join(names)}" + (
            f" (apt-get install {package})" if package else ""
        )
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)

    return find


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of a stranger, in this process and in those that it starts.

    ``install("acme-hsm", "keymgmt.backends", {"acme": "acme_hsm:Acme"}, acme_hsm="source")``;
    returns the folder on the path.
    """
    site = tmp_path / "strangers"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))

    def add(name: str, group: str, entries: dict[str, str], **modules: str) -> Path:
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
            # A module of this name may be left from another test.
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        return site

    return add
