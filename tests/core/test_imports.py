"""Imports run one way, and every part imports what it may and nothing else of ours."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import pytest
from programs import run_python

# What may be imported from where: each part only from those before it.
ORDER = [
    *("errors", "console", "_system", "_crypto", "_providers", "backend", "floe", "sealed"),
    *("_config", "_remote", "_trust", "_verbs", "loading", "_mount", "", "cli", "__main__"),
]
BACKENDS = {f"keymgmt_{name}" for name in ("aws", "broker", "file", "pkcs11", "tpm2", "vault")}
# A program over the core, which talks to a client in the client's protocol.
SERVICE = "keymgmt_broker_service"
FOR_SERVICE = {"keymgmt", "keymgmt.backend", "keymgmt.errors"}
SERVICE_USES = {"keymgmt_broker", "keymgmt_tpm2"}
LOADERS = {f"keymgmt_{name}" for name in ("onnxruntime", "openvino", "safetensors", "tokenizers")}
# Nothing but commands, over a loader or a backend.
COMMANDS = {"keymgmt_openvino_demo": "keymgmt_openvino", "keymgmt_vault_dev": "keymgmt_vault"}
FOR_LOADERS = {"keymgmt", "keymgmt.errors", "keymgmt.loading"}
FOR_COMMANDS = "keymgmt.console"


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


def imported(path: Path, package: str) -> set[str]:
    """Modules that a module imports: when it runs, inside of functions, and for typing alone."""
    known = modules(package)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            # `from keymgmt import floe` names a module, `from keymgmt import seal` does not.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else str(node.module))
    return names


def graph(package: str) -> dict[str, set[str]]:
    """Module of a package -> the modules of the same package that it imports."""
    return {
        module: {
            name
            for name in imported(path, package)
            if name.partition(".")[0] == package and name != module
        }
        for module, path in modules(package).items()
    }


def part(module: str) -> str:
    """The part of the core that a module is in: ``errors``, ``_system``; "" for the core itself."""
    return ([*module.split("."), ""])[1]


CORE = graph("keymgmt")


@pytest.mark.parametrize("module", sorted(CORE))
def test_the_core_imports_one_way(module):
    if part(module) == "testing":
        allowed = {"testing", "errors", "backend", "_crypto"}
    else:
        place = ORDER.index(part(module))
        allowed = set(ORDER[: place + 1])
        if part(module) == "cli":
            allowed.add("testing")  # `plugin check` runs the kit
    wrong = {name for name in CORE[module] if part(name) not in allowed}
    assert not wrong


@pytest.mark.parametrize(
    "package", sorted({"keymgmt", SERVICE} | BACKENDS | LOADERS | set(COMMANDS))
)
def test_no_module_imports_in_a_circle(package):
    edges = graph(package)
    for module, names in edges.items():
        # The package itself is imported with each of its modules, whatever they say.
        names -= {package} if module != package else set()
    # Raises CycleError, which names the circle.
    assert len(list(graphlib.TopologicalSorter(edges).static_order())) == len(edges)


@pytest.mark.parametrize(
    "package", sorted({"keymgmt", SERVICE} | BACKENDS | LOADERS | set(COMMANDS))
)
def test_nothing_imports_what_may_be_missing(package):
    others = (BACKENDS | LOADERS | set(COMMANDS) | {SERVICE}) - {package, COMMANDS.get(package)}
    if package == SERVICE:
        others -= SERVICE_USES
    for module, path in modules(package).items():
        wrong = {n for n in imported(path, "keymgmt") if n.partition(".")[0] in others}
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("package", sorted({SERVICE} | BACKENDS | LOADERS | set(COMMANDS)))
def test_what_is_imported_of_the_core(package):
    under = COMMANDS.get(package, package)
    allowed = {"keymgmt.backend"} if under in BACKENDS else FOR_LOADERS
    if package == SERVICE:
        allowed = FOR_SERVICE
    for module, path in modules(package).items():
        for name in imported(path, "keymgmt"):
            if name.partition(".")[0] == "keymgmt":
                assert name in allowed | {FOR_COMMANDS}, f"{module} imports {name}"


def test_every_module_of_the_core_imports_without_any_backend():
    names = [name for name in modules("keymgmt") if not name.endswith("__main__")]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    program += "print([name for name in sys.modules if name.startswith(('openvino', 'keymgmt_'))])"
    done = run_python(program, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_version_is_read_when_it_is_asked_for():
    program = "import keymgmt, sys\nprint('importlib.metadata' in sys.modules)\n"
    program += "print(keymgmt.__version__)\n"
    said = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)
    assert said.split() == ["False", version("keymgmt")]
