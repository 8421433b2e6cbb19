"""Real tokens in temporary folders: SoftHSM2 and NSS softokn. Nothing of the system is touched."""

from __future__ import annotations

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

from keymgmt.backend import SecretSource

PIN = "user-pin-27182818"
SO_PIN = "so-pin-31415926"
SOFTHSM = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
)
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
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
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
        library.restart(library.generation)
        pin_file = self.directory / f"pin-{number}"
        pin_file.touch(0o600)
        pin_file.write_text(PIN + "\n")
        return Token(self.module, name, pin_file, made)


@pytest.fixture(scope="session")
def softhsm(require_tool: Any, tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    require_tool("softhsm2-util", package="softhsm2")
    module = require_tool(*SOFTHSM, package="softhsm2")
    directory = tmp_path_factory.mktemp("softhsm")
    (directory / "tokens").mkdir()
    config = directory / "softhsm2.conf"
    config.write_text(
        f"directories.tokendir = {directory}/tokens\n"
        "objectstore.backend = file\nlog.level = ERROR\n"
    )
    # SoftHSM reads it at C_Initialize, in this process and in every child.
    os.environ["SOFTHSM2_CONF"] = str(config)
    return SoftHsm(module, directory)


@pytest.fixture(scope="session")
def softhsm_token(softhsm: SoftHsm) -> Token:
    """A token that tests share and leave whole."""
    return softhsm.token("shared")


@pytest.fixture
def new_token(softhsm: SoftHsm) -> Iterator[Callable[..., Token]]:
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
def nss_token(require_tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Token:
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
    return Token(module, "NSS Certificate DB", pin_file, directory, arguments)


@pytest.fixture(autouse=True)
def _close_providers(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("softhsm_token", "nss_token"):
        if name in request.fixturenames:
            token = request.getfixturevalue(name)
            while token.made:
                token.made.pop().close()
