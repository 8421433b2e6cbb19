"""Real tokens in temporary folders: SoftHSM2 and NSS softokn. Nothing of the system is touched."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from keymgmt_pkcs11 import Pkcs11Provider, Pkcs11Settings
from keymgmt_pkcs11._module import open_module
from programs import run
from waiting import until

from keymgmt.backend import SecretSource

PIN = "user-pin-27182818"
SO_PIN = "so-pin-31415926"
SOFTOKN = (
    "/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
    "/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
    "/usr/lib64/libsoftokn3.so",
)


@dataclass
class Token:
    """One token of a module and how to reach it."""

    module: Path
    label: str
    pin_file: Path
    directory: Path
    init_args: str | None = None
    pin: str = PIN
    made: list[Pkcs11Provider] = field(default_factory=list)

    def settings(self, **changes: Any) -> Pkcs11Settings:
        """Settings for this token; ``changes`` replace members."""
        values: dict[str, Any] = {
            "module": self.module,
            "token": self.label,
            "pin": SecretSource(file=self.pin_file),
            "init_args": self.init_args,
            "timeout": 10.0,
            **changes,
        }
        return Pkcs11Settings(**{k: v for k, v in values.items() if v is not None})

    def provider(self, **changes: Any) -> Pkcs11Provider:
        """A new provider for this token, closed when the test ends."""
        made = Pkcs11Provider("hsm", self.settings(**changes))
        self.made.append(made)
        return made

    def tool(self, *arguments: str, login: bool = True) -> str:
        """Run OpenSC's pkcs11-tool against this token."""
        command = ["pkcs11-tool", "--module", str(self.module), "--token-label", self.label]
        command += ["--login", "--pin", self.pin] if login else []
        done = run(*command, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@dataclass
class SoftHsm:
    """A SoftHSM configuration of its own; a process reads one, so all tokens lie in it."""

    module: Path
    directory: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens"

    def token(self, label: str | None = None) -> Token:
        """Make a token and know its directory."""
        number = next(self.numbers)
        name = label or f"token {number}"
        before = set(self.tokens.iterdir())
        subprocess.run(
            [
                *("softhsm2-util", "--init-token", "--free", "--label", name),
                *("--pin", PIN, "--so-pin", SO_PIN),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        (made,) = set(self.tokens.iterdir()) - before
        # SoftHSM sees new tokens of other processes only when it starts.
        library = open_module(self.module, None)
        library.in_vain = 0
        assert library.restart(library.generation)
        pin_file = self.directory / f"pin-{number}"
        pin_file.touch(0o600)
        pin_file.write_text(PIN + "\n")
        return Token(self.module, name, pin_file, made)


@pytest.fixture(scope="session")
def softhsm(require_tool, softhsm_module, tmp_path_factory) -> SoftHsm:
    require_tool("softhsm2-util", package="softhsm2")
    directory = tmp_path_factory.mktemp("softhsm")
    (directory / "tokens").mkdir()
    config = directory / "softhsm2.conf"
    config.write_text(
        f"directories.tokendir = {directory}/tokens\n"
        "objectstore.backend = file\nlog.level = ERROR\n"
    )
    # SoftHSM reads it at C_Initialize, in this process and in every child.
    os.environ["SOFTHSM2_CONF"] = str(config)
    return SoftHsm(softhsm_module, directory)


@pytest.fixture(scope="session")
def softhsm_token(softhsm) -> Token:
    """A token that tests share and leave whole."""
    return softhsm.token("shared")


@pytest.fixture
def new_token(softhsm) -> Iterator[Callable[..., Token]]:
    """Make a SoftHSM token for one test, which may do to it what it likes."""
    made: list[Token] = []

    def make(label: str | None = None) -> Token:
        made.append(softhsm.token(label))
        return made[-1]

    yield make
    for token in made:
        for provider in token.made:
            provider.close()
        shutil.rmtree(token.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def nss_token(require_tool, tmp_path_factory) -> Token:
    """The one token of an NSS key database."""
    certutil = require_tool("certutil", package="libnss3-tools")
    module = require_tool(*SOFTOKN, package="libnss3")
    directory = tmp_path_factory.mktemp("nss")
    pin_file = directory / "pin"
    pin_file.touch(0o600)
    pin_file.write_text(PIN + "\n")
    subprocess.run(
        [str(certutil), "-N", "-d", f"sql:{directory}", "-f", str(pin_file)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    arguments = f"configdir='sql:{directory}' certPrefix='' keyPrefix='' secmod='secmod.db' flags= "
    # In front of it, since NSS takes one database in a process and cannot be made to fail.
    shim = build_fault_module(require_tool, module, directory)
    return Token(shim, "NSS Certificate DB", pin_file, directory, arguments)


@pytest.fixture
def nss_faults(nss_token) -> Iterator[Faults]:
    faults = Faults(ctypes.CDLL(str(nss_token.module)))
    faults.clear()
    yield faults
    faults.clear()


@pytest.fixture(autouse=True)
def _close_providers(request) -> Iterator[None]:
    yield
    for name in ("softhsm_token", "nss_token"):
        if name in request.fixturenames:
            token = request.getfixturevalue(name)
            while token.made:
                token.made.pop().close()


CALLS = {
    "C_Initialize": 0,
    "C_GetSessionInfo": 15,
    "C_UnwrapKey": 61,
    "C_SignInit": 42,
    "C_OpenSession": 12,
    "C_Login": 18,
    "C_FindObjectsInit": 26,
    "C_EncryptInit": 29,
    "C_DecryptInit": 33,
    "C_Decrypt": 34,
    "C_CreateObject": 20,
    "C_GetTokenInfo": 6,
    "C_GetAttributeValue": 24,
    "C_GenerateKey": 58,
    "C_GenerateKeyPair": 59,
    "C_WrapKey": 60,
    "C_Encrypt": 30,
    "C_Sign": 43,
    "C_Finalize": 1,
    "C_GetSlotList": 4,
    "C_DeriveKey": 62,
}
FOREVER = -1


class Faults:
    """The switches of ``fault.c``; see there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fault_answer.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_long]
        library.fault_calls.restype = library.fault_sessions.restype = ctypes.c_long

    def answer(self, call: str, code: int, times: int = FOREVER) -> None:
        self._library.fault_answer(CALLS[call], code, times)

    def hang(self, call: str, on: bool = True) -> None:
        self._library.fault_hang(CALLS[call], int(on))

    def calls(self, call: str) -> int:
        return int(self._library.fault_calls(CALLS[call]))

    @property
    def sessions(self) -> int:
        return int(self._library.fault_sessions())

    def limit(self, sessions: int) -> None:
        self._library.fault_limit(ctypes.c_long(sessions))

    def locks(self) -> None:
        self._library.fault_locks(ctypes.c_long(1))

    def low(self) -> None:
        """Let the token's flags say that a wrong PIN was given."""
        self._library.fault_low(ctypes.c_long(1))

    def pad(self, pin: str) -> None:
        """Let somebody type the PIN at a pad of the token."""
        self._library.fault_pad(pin.encode())

    def until_finalize(self) -> None:
        """Let C_Finalize end every answer that was set."""
        self._library.fault_until_finalize()

    def personality(self, name: str) -> None:
        assert self._library.fault_personality(name.encode()), name

    def clear(self) -> None:
        self._library.fault_clear()


def build_fault_module(require_tool: Any, target: Path, directory: Path) -> Path:
    """Compile ``fault.c`` for the module that it stands in front of."""
    compiler = require_tool("cc", "gcc", "clang", package="gcc")
    made = directory / "libfault.so"
    subprocess.run(
        [
            *(str(compiler), "-shared", "-fPIC", "-O1", "-Wall", f'-DTARGET="{target}"'),
            *("-o", str(made), str(Path(__file__).with_name("fault.c")), "-ldl"),
        ],
        check=True,
        timeout=120,
    )
    return made


@pytest.fixture(scope="session")
def _faulty(softhsm, require_tool) -> tuple[Token, Faults]:
    # A copy of its own, so that its state is not that of the SoftHSM which other tests use.
    target = softhsm.directory / "libsofthsm2-behind.so"
    shutil.copy(softhsm.module, target)
    shim = build_fault_module(require_tool, target, softhsm.directory)
    token = softhsm.token("faulty")
    token.module = shim
    return token, Faults(ctypes.CDLL(str(shim)))


@pytest.fixture
def faulty(_faulty) -> Iterator[Token]:
    """A SoftHSM token behind a module that fails on request."""
    token, faults = _faulty
    faults.clear()
    yield token
    faults.clear()
    while token.made:
        token.made.pop().close()
    # What was abandoned in a hung call closes its session when the call comes back.
    until(lambda: faults.sessions == 0, 10, lambda: "a session was leaked")


@pytest.fixture
def faults(_faulty, faulty) -> Faults:
    return _faulty[1]


@pytest.fixture
def faulty_copy(softhsm, faulty, require_tool, tmp_path) -> Callable[[], tuple[Token, Faults]]:
    """Make another module for the token of ``faulty``, with switches of its own."""

    def make() -> tuple[Token, Faults]:
        target = tmp_path / "libsofthsm2-other.so"
        shutil.copy(softhsm.module, target)
        shim = build_fault_module(require_tool, target, tmp_path)
        token = Token(shim, faulty.label, faulty.pin_file, faulty.directory)
        return token, Faults(ctypes.CDLL(str(shim)))

    return make


@pytest.fixture(scope="session")
def token_class() -> type[Token]:
    return Token
