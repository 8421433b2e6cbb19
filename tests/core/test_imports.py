"""Imports run one way, and every part imports what it may and nothing else of ours."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

NAMES = {"keymgmt_file", "keymgmt_vault", "keymgmt_pkcs11", "keymgmt_tpm2", "keymgmt_openvino"}


def modules(package: str) -> dict[str, Path]:
    """The modules of an installed package, without importing it."""
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in root.rglob("*.py")
    }


def imported(path: Path) -> set[str]:
    """Absolute names that a module imports when it runs, also inside of functions."""
    tree = ast.parse(path.read_bytes())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            # `from keymgmt import floe` names a module, `from keymgmt import seal` does not.
            known = modules("keymgmt") if node.module == "keymgmt" else {}
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else str(node.module))
    return names


def part(module: str) -> str:
    """A module of the core, or the whole package for those that are packages."""
    parts = module.split(".")
    return ".".join(parts[:2])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Part of the core -> the parts that it imports."""
    edges: dict[str, set[str]] = {}
    for module, path in modules("keymgmt").items():
        names = imported(path)
        strangers = {name for name in names if name.partition(".")[0] in NAMES}
        assert not strangers, f"{module} imports {strangers}"
        ours = {part(name) for name in names if name.partition(".")[0] == "keymgmt"}
        edges.setdefault(part(module), set()).update(ours - {part(module)})
    return edges


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in graph[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def test_the_core_has_no_circle(graph: dict[str, set[str]]) -> None:
    # Raises CycleError, which names the circle.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize(
    ("module", "above"),
    [
        ("errors", {""}),
        ("_dek", {"sealed", "_config", "cli"}),
        ("_provider", {"sealed", "_config", "cli"}),
        ("floe", {"sealed", "_config", "cli"}),
        ("backend", {"sealed", "_config", "_registry", "cli", "testing"}),
        ("sealed", {"_config", "_registry", "_seal", "_open", "cli", "testing"}),
        ("_config", {"sealed", "cli", "testing"}),
    ],
)
def test_a_lower_layer_never_reaches_a_higher_one(
    graph: dict[str, set[str]], module: str, above: set[str]
) -> None:
    reached = reach(graph, f"keymgmt.{module}")
    assert not reached & {f"keymgmt.{name}".rstrip(".") for name in above}
    assert module != "errors" or not reached


def test_the_verbs_do_not_know_the_command_line(graph: dict[str, set[str]]) -> None:
    above = {"keymgmt.cli", "keymgmt.testing"}
    assert not reach(graph, "keymgmt") & above
    assert "keymgmt.cli" not in reach(graph, "keymgmt.testing")


@pytest.mark.parametrize("package", sorted(NAMES - {"keymgmt_openvino"}))
def test_a_backend_imports_the_one_module_for_backends(package: str) -> None:
    for module, path in modules(package).items():
        for name in imported(path):
            if name.startswith("keymgmt") and name.partition(".")[0] != package:
                assert name == "keymgmt.backend", f"{module} imports {name}"


def test_the_loader_imports_public_names_and_no_backend() -> None:
    for module, path in modules("keymgmt_openvino").items():
        for name in imported(path):
            if name.startswith("keymgmt") and not name.startswith("keymgmt_openvino"):
                private = any(part.startswith("_") for part in name.split("."))
                assert name.partition(".")[0] == "keymgmt", f"{module} imports {name}"
                assert not private, f"{module} imports {name}"


def test_every_module_of_the_core_imports_without_any_backend() -> None:
    names = [name for name in modules("keymgmt") if not name.endswith("__main__")]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    program += "print([name for name in sys.modules if name.startswith(('openvino', 'keymgmt_'))])"
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
