"""Backends that nobody installed on purpose, half of one, and one that never stops importing."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import run

import keymgmt
from keymgmt._config.config import Config
from keymgmt._providers.registry import backends, load_backend
from keymgmt.errors import BackendNotInstalled

GOOD = """
from keymgmt.backend import *
class P(KeyProvider):
    backend = "{name}"
    Settings = Settings
    def wrap(self, key, dek, context): ...
    def unwrap(self, wrapped, context): ...
    def check(self, key=None): return Health(())
"""
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    load_backend.cache_clear()
    yield
    load_backend.cache_clear()


def write_distribution(
    folder: Path,
    name: str,
    module: str,
    code: str,
    *,
    distribution: str | None = None,
    version: str = "1.2.3",
) -> Path:
    folder.mkdir(exist_ok=True)
    distribution = distribution or f"keymgmt-{name}"
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    (info / "entry_points.txt").write_text(f"[keymgmt.backends]\n{name} = {module}:P\n")
    (folder / f"{module}.py").write_text(textwrap.dedent(code.replace("{name}", name)))
    return folder


@pytest.fixture
def install(tmp_path, monkeypatch) -> Install:
    def install(name: str, module: str, code: str = GOOD, **more: str) -> Path:
        folder = write_distribution(tmp_path / module, name, module, code, **more)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return install


@pytest.mark.parametrize(
    ("name", "code", "said", "hint"),
    [
        ("reg-exits", "import sys; sys.exit('bye')", "fails to import: SystemExit", "reinstall"),
        ("reg-odd", GOOD + "    api_version = 'x'\n", "speaks version 'x'", "--upgrade keymgmt"),
    ],
)
def test_a_broken_one_is_explained_and_breaks_no_other(install, name, code, said, hint):
    install(name, name.replace("-", "_"), code)
    install("reg-fine", f"reg_fine_beside_{name.replace('-', '_')}")
    with pytest.raises(BackendNotInstalled, match=f"of keymgmt-{name} 1.2.3") as caught:
        load_backend(name)
    assert said in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert load_backend("reg-fine").backend == "reg-fine"


def test_what_is_not_named_is_not_imported(install, tmp_path):
    """So a slow or hostile plugin costs nothing until a config names its backend."""
    mark = tmp_path / "imported"
    install("reg-slow", "reg_slow", f"import time; open({str(mark)!r}, 'w'); time.sleep(60)")
    install("reg-used", "reg_used")
    began = time.monotonic()
    with Config(
        {"providers": {"a": {"backend": "reg-used"}, "b": {"backend": "reg-slow"}}}
    ) as config:
        assert config.provider("a").check().ok
        assert "reg-slow" in backends()
    assert not mark.exists()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("written", ["keymgmt-reg-own", "Keymgmt_Reg.Own"])
def test_distribution_picks_one_however_it_is_spelt(install, written):
    module = f"reg_own_{len(written)}_{written[0].lower()}_{written[0].isupper()}"
    install("reg-own", module, distribution="keymgmt-reg-own")
    install("reg-own", f"{module}_squat", distribution="typo-squatter")
    data = {"providers": {"a": {"backend": "reg-own", "distribution": written}}}
    with Config(data) as config:
        assert type(config.provider("a")).__module__ == module
    assert f"{module}_squat" not in sys.modules


def test_half_removed_metadata_is_survived(install):
    folder = install("reg-half", "reg_half")
    next(folder.glob("*.dist-info/METADATA")).unlink()
    (info,) = backends()["reg-half"]
    assert info.version == "unknown"
    assert load_backend("reg-half").backend == "reg-half"


ASK = """
import sys
from keymgmt._providers.registry import backends, load_backend
try:
    print("loaded", load_backend("reg-here").__module__)
except Exception as error:
    print(type(error).__name__, error, error.hint)
"""


def ask(here: Path, *start: str, path: Path | None = None) -> str:
    places = [path, Path(keymgmt.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in places if p)}
    done = run(sys.executable, *start, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_found_in_the_working_directory(tmp_path):
    """A downloaded folder may hold a package that calls itself a backend."""
    here = write_distribution(tmp_path / "download", "reg-here", "reg_here", GOOD)
    (here / "reg_ask.py").write_text(ASK)
    for start in (["-c", ASK], ["-m", "reg_ask"]):
        assert ask(here, *start).startswith("BackendNotInstalled")
    # On purpose it is found, there as elsewhere.
    for start in (["-c", ASK], ["-P", "-m", "reg_ask"]):  # the latter as `keymgmt backends` does
        assert ask(here, *start, path=here) == "loaded reg_here\n"
    assert ask(tmp_path, "-c", ASK, path=here) == "loaded reg_here\n"
    # An application's own folder is its own.
    assert ask(here, str(here / "reg_ask.py")) == "loaded reg_here\n"


def test_an_installed_one_is_not_hidden_by_the_working_directory(tmp_path):
    site = write_distribution(tmp_path / "site", "reg-here", "reg_here", GOOD)
    here = tmp_path / "download"
    here.mkdir()
    (here / "reg_here.py").write_text("print('this ran')\n" + GOOD)
    (here / "reg_ask.py").write_text(ASK)
    for start in (["-c", ASK], ["-m", "reg_ask"]):
        said = ask(here, *start, path=site)
        assert "is hidden by reg_here in the working directory" in said
        assert "this ran" not in said
    assert ask(here, "-P", "-c", ASK, path=site) == "loaded reg_here\n"


def test_no_command_is_found_in_the_working_directory(tmp_path):
    here = write_distribution(tmp_path / "download", "reg-here", "reg_here", "print('this ran')")
    (info,) = here.glob("*.dist-info")
    (info / "entry_points.txt").write_text("[keymgmt.commands]\nreg-here = reg_here:app\n")
    names = "from keymgmt.cli._plugins import announced; print('reg-here' in announced())"
    assert ask(here, "-c", names) == "False\n"
    assert ask(here, "-c", names, path=here) == "True\n"
