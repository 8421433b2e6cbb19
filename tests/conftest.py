"""What all tests share: tools that a desk may lack and CI must have."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RequireTool = Callable[..., Path]


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
