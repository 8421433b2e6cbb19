"""Pages are run word for word, and hints are followed. How to add one: README.md in this folder.

A page is parsed (markdown-it), and every fenced block of it that can be run is run in order, in a
home and a working directory of its own. Hints are the commands in the texts of our sources, found
by parsing those (ast); a scenario provokes one, takes the command that was printed, and runs it.
``test_collected.py`` fails for whatever no scenario runs.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import programs
import pytest
from markdown_it import MarkdownIt
from swtpm import Swtpm

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "backends/*/README.md", "loader/*/README.md")
    for page in ROOT.glob(pattern)
)
RUN = {"sh", "console", "toml", "python"}
SHOWN = {"text", "json", "ini", "hcl"}

# In an environment of their own, since they change the one that they are run in.
INSTALLS = re.compile(r"(pip|apt-get|apt) install ")


@dataclass(frozen=True)
class Block:
    """A fenced block: of ``language``, below ``heading``, from ``line`` on."""

    page: str
    heading: str
    language: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block, what is shown below it, and the exit code that it says."""

    place: str
    text: str
    host: str = ""
    shown: tuple[str, ...] = ()
    code: int = 0

    @property
    def installs(self) -> bool:
        return INSTALLS.match(self.text) is not None


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Every block of code of a page; one that is only indented has no language."""
    found, heading = [], ""
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text("utf-8"))
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[number + 1].content
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, heading, token.info.strip(), line, token.content))
    return tuple(found)


def inline(page: str) -> list[str]:
    """Every command of ours inside of a sentence or a table of a page."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text("utf-8"))
    spans = [span for token in tokens for span in token.children or ()]
    texts = [span.content for span in spans if span.type == "code_inline"]
    return [text for text in texts if text.startswith("keymgmt ")]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of ``sh``, or of ``console`` with what is shown below each."""
    lines = block.text.splitlines()
    number = 0
    while number < len(lines):
        place, line, host = f"{block.page}:{block.line + 1 + number}", lines[number], ""
        number += 1
        if block.language == "console":
            prompt = re.match(r"([a-z][a-z0-9]*)?\$ +", line)
            if not prompt:
                raise ValueError(f"{place}: neither a prompt nor below one: {line}")
            host, line = prompt[1] or "", line[prompt.end() :]
        while line.endswith(("\\", "|", "&&")) and number < len(lines):
            line += "\n" + lines[number]
            number += 1
        shown = []
        while block.language == "console" and number < len(lines):
            if re.match(r"([a-z][a-z0-9]*)?\$ ", lines[number]):
                break
            shown.append(lines[number])
            number += 1
        if line.strip() and not line.startswith("#"):
            said = re.search(r"# exit code (\d+)", line)
            text = re.sub(r"\s+# .*$", "", line)
            yield Command(place, text, host, tuple(shown), int(said[1]) if said else 0)


# What a hint may tell people to run.
# It is copied from there: it stands behind a colon or in backquotes, and ends with ";" or the line.
PROGRAMS = r"(?:pip|apt-get|chmod|chown|bao|pkcs11-tool|tpm2_\w+|usermod|systemctl)"
COMMAND = re.compile(
    rf"(?:^|: |`|; )((?:keymgmt (?=[a-z])|{PROGRAMS} (?=[\w{{-]))(?:\\\n|[^;`\n])*)"
)
PLACE = re.compile(r"\{\w*\}")

# Names that nobody is to follow: of threads, and of a suite of tests.
NAMED = {"Thread", "ThreadPoolExecutor", "run_contract"}


@dataclass(frozen=True)
class Hint:
    """A command in a text of ours; what is filled in is ``{}``."""

    package: str
    place: str
    command: str


def texts(node: ast.expr) -> list[str]:
    """The texts that an expression may give; what is filled in is shown as {}."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(value)]
    if isinstance(node, ast.BinOp):
        return [left + right for left in texts(node.left) for right in texts(node.right)]
    return []


def sources() -> Iterator[tuple[str, Path]]:
    """Every source that ships, with the folder of its distribution."""
    for folder in (Path("keymgmt"), *map(Path, ("backends", "loader"))):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT)
            if not {"tests", "build", ".venv"} & set(inside.parts):
                yield "/".join(inside.parts[: 1 if folder.name == "keymgmt" else 2]), inside


def said_in(tree: ast.Module, *, commands: bool) -> Iterator[tuple[int, str]]:
    """Every text in a source that people may follow.

    That is all but docstrings (those of commands are their help), comparisons and the names of
    threads.
    """
    quiet: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            is_help = commands and isinstance(node, ast.FunctionDef) and node.decorator_list
            if isinstance(first, ast.Expr) and not is_help:
                quiet.add(id(first.value))
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Compare) or called.rpartition(".")[2] in NAMED:
            quiet.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in quiet or not isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            continue
        if found := texts(node):
            quiet.update(id(inner) for inner in ast.walk(node))
            yield from ((node.lineno, text) for text in found)


@cache
def hints() -> tuple[Hint, ...]:
    """Every command that a text of ours gives."""
    found = []
    for package, file in sources():
        tree = ast.parse((ROOT / file).read_bytes())
        is_command = "cli" in file.parts or "commands" in file.name
        for line, text in said_in(tree, commands=is_command):
            for match in COMMAND.finditer(text):
                command = PLACE.sub("{}", match[1].strip())
                found.append(Hint(package, f"{file}:{line}", command))
    return tuple(found)


@cache
def not_run() -> tuple[dict[str, str], ...]:
    """What no scenario runs, each with the reason: ``not_run.toml``."""
    return tuple(tomllib.loads((HERE / "not_run.toml").read_text("utf-8"))["not_run"])


def is_not_run(where: str, command: str) -> bool:
    return any(each["where"] == where and each["command"] in (command, "*") for each in not_run())


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass
class Desk:
    """A person at a shell, with a home and a working directory of their own.

    Attributes:
        variables: of the environment.
        stand_ins: what a page names -> what is there in its place, or who knows it by then.
        typed: how a command begins -> what a person types where it asks.
        served: command that goes on and on -> who takes the first lines that it prints.
        hosts: prompt of a page -> variables that are otherwise on that machine.
        given: what a page takes for granted, until it has been.
        prelude: what programs on a page take for granted, in Python.
        installs: whether pages may install, which they may in an environment of their own.
        last: what the last command printed.
        told: what the commands of pages printed.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    stand_ins: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    typed: dict[str, list[str] | Callable[[], list[str]]] = field(default_factory=dict)
    served: dict[str, Callable[[Iterator[str]], object]] = field(default_factory=dict)
    hosts: dict[str, dict[str, str]] = field(default_factory=dict)
    given: dict[str, str | Callable[[], object]] = field(default_factory=dict)
    prelude: str = ""
    installs: bool = False
    last: Ran = Ran(0, "", "")
    told: dict[str, Ran] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.work = self.folder / "work"
        self.config = self.home / ".config" / "keymgmt" / "keymgmt.toml"
        self._used: set[str] = set()
        self.running: list[subprocess.Popen[str]] = []
        for made in (self.home, self.work):
            made.mkdir(parents=True)

    def run(self, command: str, code: int | None = 0, host: str = "") -> Ran:
        """Run one command in bash, after those before it on this host; its exit code is checked."""
        state = self._state(host)
        script = (
            f'. "{state}"\nset -o pipefail\n{command}\n'
            f'code=$?\n{{ export -p; printf "cd %q\\n" "$PWD"; }} > "{state}"\nexit $code\n'
        )
        arguments, environment = ["/bin/bash", "-c", script], self._environment(host)
        typed = next((v for start, v in self.typed.items() if command.startswith(start)), None)
        if typed is not None:
            answers = typed if isinstance(typed, list) else typed()
            self.last = _at_a_terminal(arguments, environment, answers)
        else:
            done = programs.run(*arguments, env=environment, stdin=subprocess.DEVNULL, timeout=600)
            self.last = Ran(done.returncode, done.stdout, done.stderr)
        if code is not None and self.last.code != code:
            pytest.fail(f"{command}\nexit code {self.last.code}, not {code}:\n{self.last.said}")
        return self.last

    def fails(self, command: str) -> Ran:
        """Run one command that does not do what it was asked for."""
        ran = self.run(command, None)
        assert ran.code, f"{command}\n{ran.said}"
        return ran

    def _state(self, host: str) -> Path:
        """Where the shell of a host keeps its folder and variables."""
        state = self.folder / f"state-{host}"
        if not state.exists():
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            state.write_text(f"export PATH={shlex.quote(path)}\ncd {shlex.quote(str(self.work))}\n")
        return state

    def _environment(self, host: str) -> dict[str, str]:
        basic = {"HOME": str(self.home), "COLUMNS": "200", "LANG": "C.UTF-8"}
        return {**basic, "PATH": os.environ["PATH"], **self.variables, **self.hosts.get(host, {})}

    def serve(self, command: str, hear: Callable[[Iterator[str]], object] = next) -> None:
        """Start a command that goes on until the desk is left; ``hear`` takes its first lines."""
        script = f'. "{self._state("")}"\nexec {command}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", script],
            env=self._environment(""),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        assert process.stdout is not None
        hear(process.stdout)

    def leave(self) -> None:
        for process in self.running:
            process.terminate()
            process.wait(30)

    def configure(self, tables: str) -> None:
        """Put the tables of a TOML text into the config, in the place of those of their names."""
        self.config.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = self.config.read_text() if self.config.exists() else ""
        merged = _tables(there) | _tables(tables)
        self.config.touch(mode=0o600)
        self.config.write_text("\n".join(merged.values()))

    def run_page(
        self, page: str, *, given: Mapping[str, str | Callable[[], object]] | None = None
    ) -> None:
        """Run every block of a page, in order.

        ``given`` is what a page takes for granted (such as a model to seal): a command or a
        function that is run before the first block below a heading, or before a command,
        which are known by how they begin.
        """
        self.given = dict(given or {})
        for block in blocks(page):
            self._give(block.heading)
            if block.language in RUN:
                self._run_block(block)
        assert not self.given, f"{page} has no heading or command {set(self.given)}"
        unused = set(self.stand_ins) - self._used
        assert not unused, f"stand-ins that {page} does not name: {unused}"

    def _give(self, before: str) -> None:
        name = next((each for each in self.given if before.startswith(each)), before)
        given = self.given.pop(name, None)
        if isinstance(given, str):
            self.run(given)
        elif given is not None:
            given()

    def _run_block(self, block: Block) -> None:
        if block.language in ("toml", "python"):
            if is_not_run(block.page, block.text.splitlines()[0]):
                return
            text = self.stand_in(block.text)
            if block.language == "toml":
                self.configure(text)
                text = (
                    "import keymgmt\nconfig = keymgmt.load_config()\n"
                    "for name in config.provider_names:\n    config.provider(name)\n"
                )
            program = self.folder / "program.py"
            program.write_text(f"{self.prelude}\n{text}")
            self.run(f'python "{program}"')
        else:
            for command in commands(block):
                left_out = command.installs and not self.installs
                if not left_out and not is_not_run(block.page, command.text):
                    self._run_command(command)

    def _run_command(self, command: Command) -> None:
        self._give(command.text)
        if command.text in self.served:
            self.serve(self.stand_in(command.text), self.served[command.text])
            return
        ran = self.run(self.stand_in(command.text), None, command.host)
        self.told[command.text] = ran
        if ran.code != command.code:
            pytest.fail(f"{command.place}: {command.text}\nexit code {ran.code}:\n{ran.said}")
        if command.shown:
            shown = re.escape(self.stand_in("\n".join(command.shown)))
            pattern = re.sub(r"\w*(\\\.){3}", r"[^\\n]*", shown)
            assert re.search(pattern, ran.said), f"{command.place} shows {shown}, not {ran.said}"

    def emulate_tpm(self, name: str) -> str:
        """Start swtpm with its state in a folder of the working directory; its TCTI."""
        program = shutil.which("swtpm")
        assert program, "swtpm was not asked for: require_tool"
        tpm = Swtpm(Path(program), self.work / name)
        tpm.start()
        assert tpm.process
        self.running.append(tpm.process)
        return tpm.tcti

    def make_token(self, name: str) -> None:
        """Make a token of SoftHSM, called Model Keys; its PIN is in ``hsm.pin``."""
        for command in (
            f"mkdir -m 700 {name}",
            f"echo directories.tokendir = $PWD/{name} > {name}.conf",
            f"export SOFTHSM2_CONF=$PWD/{name}.conf",
            "umask 077; echo 27182818 > hsm.pin",
        ):
            self.run(command)
        pins = "--pin 27182818 --so-pin 31415926"
        self.run(f"softhsm2-util --init-token --free --label 'Model Keys' {pins}")

    def stand_in(self, text: str) -> str:
        """A text of a page, with what stands in for its placeholders."""
        if not self.stand_ins:
            return text
        names = sorted(self.stand_ins, key=len, reverse=True)

        def put(match: re.Match[str]) -> str:
            self._used.add(match[0])
            value = self.stand_ins[match[0]]
            return value if isinstance(value, str) else value()

        return re.sub("|".join(map(re.escape, names)), put, text)

    def follow(
        self, package: str, command: str, code: int = 0, piped: str = "", **words: str
    ) -> Ran:
        """Take ``command``, a hint of ``package``, out of what was printed last, and run it.

        ``words`` are what a person puts in for the words in capitals, and ``piped`` the command
        whose output the hint is about.
        """
        assert any((hint.package, hint.command) == (package, command) for hint in hints())
        pattern = re.escape(command).replace(r"\{\}", r"([^\s;`]+)")
        # A help page breaks its lines.
        found = re.search(pattern.replace(r"\ ", r"\s+"), self.last.said)
        assert found, f"not told to {command}: {self.last.said}"
        text = re.sub(r"(?<!\\)\s+", " ", found[0])
        for word, value in words.items():
            assert re.search(rf"\b{word}\b", text), (word, text)
            text = re.sub(rf"\b{word}\b", value, text)
        return self.run(f"{piped} | {text}" if piped else text, code)


def _at_a_terminal(command: list[str], environment: dict[str, str], answers: list[str]) -> Ran:
    """Run a command on a terminal, where what it asks for is typed."""
    master, slave = os.openpty()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(slave)
        left, said = list(answers), b""
        # Reading fails with EIO once the last process at the terminal has ended.
        with contextlib.suppress(OSError):
            while select.select([master], [], [], 60)[0] and (data := os.read(master, 4096)):
                said += data
                if left and said.rstrip(b" ").endswith(b":"):
                    _wait_for_silence(master)
                    os.write(master, left.pop(0).encode() + b"\n")
        # Whoever still asks is hung up on.
        os.close(master)
        code = process.wait(60)
    return Ran(code, said.decode().replace("\r\n", "\n"), "")


def _wait_for_silence(terminal: int) -> None:
    """Wait a while for the echo to go off: what is typed before that is thrown away."""
    end = time.monotonic() + 5
    while termios.tcgetattr(terminal)[3] & termios.ECHO and time.monotonic() < end:
        time.sleep(0.01)


def _tables(text: str) -> dict[str, str]:
    """The tables of a TOML text, each with its head, by name."""
    parts = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    return {part.partition("]")[0]: part.rstrip() + "\n" for part in parts if part.strip()}


@pytest.fixture
def desk(tmp_path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.leave()


@pytest.fixture(scope="session")
def docs() -> Any:
    """This module, for tests of what is collected."""
    return sys.modules[__name__]
