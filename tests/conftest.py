"""What all tests share: tools that a desk may lack and CI must have, and a site with keys."""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import pty
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RequireTool = Callable[..., Path]
Install = Callable[..., Path]
Within = Callable[[int, int, Callable[[], object]], None]

FILES = {
    "model.xml": b"<net/>" * 100,
    "model.bin": bytes(range(256)) * 10_000,
    "sub/empty": b"",
}


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start, also where we run in the background.

    A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    pytests_own = os.getpid()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        # Core dumps alone are none of pytest's business, and hardening a process forbids them.
        if (
            event == "resource.setrlimit"
            and os.getpid() == pytests_own
            and arguments[0] != resource.RLIMIT_CORE
        ):
            raise RuntimeError("this limit would hold for pytest too; use the fixture `within`")

    sys.addaudithook(refuse)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``nightly``, unless this is the night (``make nightly``).

    And run what is marked ``once`` on one Python only, where ``KEYMGMT_TEST_ONCE`` names it.
    """
    elsewhere = []
    if not os.environ.get("KEYMGMT_TEST_NIGHTLY"):
        elsewhere.append("nightly")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if os.environ.get("KEYMGMT_TEST_ONCE", version) != version:
        elsewhere.append("once")
    left_out = [item for item in items if any(map(item.get_closest_marker, elsewhere))]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
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


@pytest.fixture(scope="session")
def softhsm_module(require_tool: RequireTool) -> Path:
    """SoftHSM's PKCS#11 module; pages say the first of these."""
    return require_tool(
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
        "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
        "/usr/lib64/pkcs11/libsofthsm2.so",
        package="softhsm2",
    )


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


@pytest.fixture
def within() -> Within:
    """Run a call in a forked child under a limit: ``within(resource.RLIMIT_FSIZE, 20, call)``.

    A limit of this process would hold for pytest as well, which writes its own output.
    """
    from forks import in_child

    def run(limit: int, value: int, call: Callable[[], object]) -> None:
        def limited() -> None:
            resource.setrlimit(limit, (value, value))
            call()

        in_child(limited)

    return run


@dataclass
class Site:
    """A folder with a file provider, two publishers, a plain model, and ways to make configs."""

    root: Path
    policy: dict[str, Any]

    def config(self, **policy: Any) -> Any:
        from keymgmt import Config

        data = {
            "providers": {"local": {"backend": "file", "path": str(self.root / "keys")}},
            "policy": self.policy | policy,
            "seal": {"sign": "local:publisher"},
        }
        return Config(data, path=self.root / "keymgmt.toml")

    @property
    def provider(self) -> Any:
        return self.config().provider("local")

    @property
    def plain(self) -> Path:
        return self.root / "model"

    def seal(self, *to: str, target: str = "m.sealed", **options: Any) -> Path:
        path = self.root / target
        import keymgmt

        options = {"keys": self.config()} | options
        keymgmt.seal(self.plain, path, to=to or ["local:a"], **options)
        return path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    from keymgmt._crypto.signatures import PublicKey

    (tmp_path / "keys").mkdir(mode=0o700)
    made = Site(tmp_path, {"publishers": {"pub.pem": ["*"]}})
    for name, content in FILES.items():
        file = made.plain / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    provider = made.config().provider("local")
    for key in "abc":
        provider.create_key(key, "aes256", {})
    for key in ("publisher", "stranger"):
        provider.create_key(key, "ed25519", {})
        pem = "pub.pem" if key == "publisher" else "stranger.pem"
        (tmp_path / pem).write_bytes(PublicKey(provider.public_key(key)).to_pem())
    return made


@pytest.fixture
def tree_of(site: Site) -> Any:
    """The content of every file below a folder, to see that nothing changed."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(Path(parent, name).relative_to(folder)): Path(parent, name).read_bytes()
            for parent, _, names in os.walk(folder)
            for name in names
        }

    return read


VECTORS = Path(__file__).parent / "vectors" / "sealed"


_MOVES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """``keymgmt ARGUMENTS`` on a terminal of its own."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        command = [sys.executable, "-P", "-m", "keymgmt", *map(str, arguments)]
        self.child, self.descriptor = pty.fork()
        if not self.child:
            os.chdir(cwd)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, command)
        self.seen = b""

    def until(self, text: bytes, seconds: float = 60) -> None:
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], seconds)
            assert ready, self.seen
            try:
                self.seen += os.read(self.descriptor, 4096)
            except OSError:
                raise AssertionError(f"it ended without {text!r}: {self.seen!r}") from None

    def quiet(self, seconds: float) -> bytes:
        """What is still written while nobody answers."""
        more = b""
        while select.select([self.descriptor], [], [], seconds)[0]:
            more += os.read(self.descriptor, 4096)
        return more

    def answer(self, text: str) -> None:
        os.write(self.descriptor, text.encode() + b"\n")

    def end(self) -> int:
        # Linux ends the reading of a terminal whose last writer is gone with EIO.
        with contextlib.suppress(OSError):
            while part := os.read(self.descriptor, 4096):
                self.seen += part
        _, status = os.waitpid(self.child, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal() -> Callable[..., Terminal]:
    """Run ``keymgmt ARGUMENTS`` on a terminal: ``terminal("keys", "list", cwd=path)``."""
    return Terminal


@pytest.fixture
def asks() -> Callable[..., None]:
    """Run commands that ask on a terminal: the question is seen, waits, and comes once.

    ``asks(question, answer, "verify", "model.sealed", cwd=path)``.
    """

    def run(question: str, answer: str, *arguments: object, cwd: Path) -> None:
        ran = Terminal(*arguments, cwd=cwd)
        ran.until(question.encode())
        # A bar is painted ten times a second.
        assert _MOVES.sub(b"", ran.quiet(0.3)) == b"", arguments
        shown = _MOVES.sub(b"", ran.seen).splitlines()
        assert shown[-1].decode().strip() == question.strip(), arguments
        ran.answer(answer)
        assert ran.end() == 0, ran.seen
        assert ran.seen.count(question.encode()) == 1, ran.seen

    return run


def _wait_for_main(process: subprocess.Popen[bytes]) -> None:
    """Wait until `main` looks after Ctrl-C: what Python prints as it starts is its own.

    Python catches it from its start on, and `main` begins with not catching it.
    """
    status, caught = Path(f"/proc/{process.pid}/status"), False
    while process.poll() is None:
        mask = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        now = mask is not None and bool(int(mask[1], 16) >> (signal.SIGINT - 1) & 1)
        if caught and not now:
            return
        caught = caught or now


@pytest.fixture
def ends_quietly() -> Callable[..., None]:
    """See that a command prints no traceback, however it is stopped: ``ends_quietly("demo")``.

    By Ctrl-C, at moments spread over what it takes in all; by a reader that went away; by a stdout
    that is closed.
    """
    program = [sys.executable, "-P", "-m", "keymgmt"]

    def start(*command: object, **options: Any) -> subprocess.Popen[bytes]:
        words = list(map(str, command))
        return subprocess.Popen(words, stderr=subprocess.PIPE, **options)

    def check(*arguments: object, cwd: Path, moments: int = 3) -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        begun = time.monotonic()
        with start(*program, *arguments, cwd=cwd, stdout=theirs) as process:
            os.close(theirs)
            _, said = process.communicate(timeout=600)
        whole = time.monotonic() - begun
        assert process.returncode == 128 + signal.SIGPIPE, said
        assert b"Traceback" not in said
        closed = ("sh", "-c", 'exec "$@" >&-', "sh")
        with start(*closed, *program, *arguments, cwd=cwd) as process:
            _, said = process.communicate(timeout=600)
        assert process.returncode == 1, said
        assert said.endswith(b"error: stdout: Bad file descriptor\n")
        for step in range(moments):
            with start(*program, *arguments, cwd=cwd, stdout=subprocess.DEVNULL) as process:
                _wait_for_main(process)
                time.sleep(0.7 * whole * step / moments)
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=600)
            assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT, 0), said
            assert b"Traceback" not in said

    return check


@pytest.fixture(scope="session")
def verbs_that_ask() -> Callable[[str], list[tuple[str, ...]]]:
    """Commands, in an order in which they work, that need the provider of a key."""

    def verbs(key: str) -> list[tuple[str, ...]]:
        return [
            ("seal", "model", "model.sealed"),
            ("verify", "model.sealed"),
            ("unseal", "model.sealed", "plain"),
            ("sign", "model.sealed"),
            ("rewrap", "."),
            ("reseal", "model.sealed"),
            ("doctor", key),
            ("keys", "list"),
        ]

    return verbs


@pytest.fixture(scope="session")
def check_schema() -> Callable[[Any], str]:
    """Check a JSON document, by a schema of an installed package; returns its ``format``."""
    jsonschema = pytest.importorskip("jsonschema")

    def check(document: Any) -> str:
        name = document["format"].replace("/", "-") + ".json"
        (place,) = [each / name for each in _schema_folders() if (each / name).is_file()]
        schema = json.loads(place.read_text("utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)
        return str(document["format"])

    return check


@pytest.fixture(scope="session")
def check_output(check_schema: Callable[[Any], str]) -> Callable[[str], set[str]]:
    """Check all that a command printed with ``--json``: one document, or one on each line."""

    def check(out: str) -> set[str]:
        documents = [out] if out.startswith("{\n") else out.splitlines()
        return {check_schema(json.loads(document)) for document in documents}

    return check


@pytest.fixture(scope="session")
def check_formats() -> Callable[[str], None]:
    """See that a package has a schema for each format that its commands print, and no other."""

    def check(package: str) -> None:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        sources = [file.read_text("utf-8") for file in root.rglob("*.py")]
        printed = {
            name.replace("/", "-") + ".json"
            for text in sources
            if re.search("import .*print_(json|line)", text)
            for name in re.findall(r'"(keymgmt-[a-z0-9-]+/\d+)"', text)
        }
        assert printed
        assert printed == {path.name for path in (root / "schemas").iterdir()}

    return check


def _schema_folders() -> list[Path]:
    """The folder ``schemas`` of each installed package of ours."""
    specs = [
        importlib.util.find_spec(module.name)
        for module in pkgutil.iter_modules()
        if module.ispkg and module.name.startswith("keymgmt")
    ]
    found = [Path(spec.origin).with_name("schemas") for spec in specs if spec and spec.origin]
    return [folder for folder in found if folder.is_dir()]


@pytest.fixture(scope="session")
def lay_out() -> Callable[[str, Path], dict[str, str]]:
    """``lay_out(name, path)`` makes a vector's folder, with what git cannot hold; its fields."""

    def make(name: str, path: Path) -> dict[str, str]:
        lines = (VECTORS / name / "vector.txt").read_text().splitlines()
        fields = dict(line.split(": ", 1) for line in lines)
        source = VECTORS / name / "model.sealed"
        shutil.copytree(source, path) if source.exists() else path.mkdir()
        (path / "payload").mkdir(exist_ok=True)
        if "make" in fields:
            _make(path, *fields["make"].split())
        return fields

    return make


def _make(path: Path, what: str, name: str, size: str = "0") -> None:
    target = path / name
    if what == "mkdir":
        target.mkdir()
    elif what == "remove":
        shutil.rmtree(target)
    elif what == "groups":
        value = json.loads(target.read_bytes())
        _dump(target, value | {"groups": value["groups"] * int(size)})
    elif what == "strangers":
        target, sig = path / "signatures.json", base64.b64encode(bytes(8192)).decode()
        strangers = [{"keyid": f"{number:096x}", "sig": sig} for number in range(int(name))]
        value = json.loads(target.read_bytes())
        value["signatures"] += strangers
        value["expiries"] = [one | {"expires": "2026-01-02T00:00:00Z"} for one in strangers]
        _dump(target, value)
    else:
        _replace(target, target.rename(path.parent / "kept"), what, int(size))


def _replace(target: Path, kept: Path, what: str, size: int) -> None:
    """Put something else where a file or folder was, which is ``kept``."""
    if what in ("link", "zero"):
        target.symlink_to(kept if what == "link" else "/dev/zero")
    elif what == "fifo":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    elif what == "socket":
        # By a name of its own: a socket's path has at most 107 bytes.
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(target.parent):
            server.bind(target.name)
    elif what == "large":
        with target.open("wb") as file:
            file.truncate(size)


def _dump(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))
