"""Four key services on their real software, and a model that all of them open."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import programs
import pytest
from swtpm import Swtpm

RequireTool = Callable[..., Path]
PIN = "user-pin-271828"
CONTENT = bytes(range(256)) * 1024


def search_path() -> str:
    """Programs of this environment first: ``bao`` comes from a wheel."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@dataclass
class Site:
    """A folder with the config tables of four providers, and a way to run commands there."""

    folder: Path
    tables: dict[str, str]
    environment: dict[str, str]
    content: bytes = CONTENT

    def run(self, *arguments: str, providers: str = "local tpm site hsm", code: int = 0) -> str:
        """Run a command with a config that has only these providers; returns its output."""
        tables = "".join(self.tables[name] for name in providers.split())
        return self.run_with(tables, *arguments, code=code)

    def run_with(self, tables: str, *arguments: str, code: int = 0) -> str:
        """Run a command with a config of these tables; returns its output."""
        config = self.folder / "keymgmt.toml"
        config.write_text(tables + '[policy]\npublishers = { "publisher.pem" = ["*"] }\n')
        done = programs.run_keymgmt(
            "--config", config, *arguments, cwd=self.folder, env=self.environment
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")


@pytest.fixture(scope="session")
def tpm(require_tool, tmp_path_factory) -> Iterator[str]:
    """The TCTI of an emulated TPM."""
    program = require_tool("swtpm", package="swtpm")
    with Swtpm(program, tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm.tcti


@pytest.fixture(scope="session")
def vault(require_tool, tmp_path_factory) -> Iterator[str]:
    """The provider table of a server that ``keymgmt vault dev`` runs."""
    require_tool("bao")
    home = tmp_path_factory.mktemp("vault")
    command = [sys.executable, "-m", "keymgmt.cli", "vault", "dev", "--directory", home / "dev"]
    environment = {"PATH": search_path(), "HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert all(lines)
        yield "".join(lines)
        process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def site(softhsm_module, tpm, vault, tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\n")
    (folder / "pin").touch(0o600)
    (folder / "pin").write_text(PIN)
    environment = {"PATH": search_path(), "HOME": str(folder)}
    environment["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    token = ["softhsm2-util", "--init-token", "--free", "--label", "models"]
    token += ["--pin", PIN, "--so-pin", "so-pin-314159"]
    subprocess.run(token, check=True, env=environment, capture_output=True, timeout=60)
    tables = {
        "local": '[providers.local]\nbackend = "file"\npath = "keys"\n',
        "hsm": f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{softhsm_module}"\n'
        'token = "models"\npin = { file = "pin" }\n',
        "tpm": f'[providers.tpm]\nbackend = "tpm2"\nkeys = "tpm-keys"\ntcti = "{tpm}"\n',
        "site": vault,
    }
    made = Site(folder, tables, environment)
    setup = json.loads(made.run("tpm", "setup", "tpm", "--create", "--json", providers="tpm"))
    tables["tpm"] += f'srk_name = "{setup["srk_name"]}"\n'
    for key in ("local:backup", "tpm:dev", "hsm:breakglass"):
        made.run("keys", "create", key)
    made.run("keys", "create", "hsm:release", "--sign")
    made.run("keys", "export", "hsm:release", "-o", "publisher.pem")
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(CONTENT)
    seal = ["seal", "model", "model.sealed", "--name", "resnet50", "--sign", "hsm:release"]
    seal += ["--to", "tpm:dev+site:model", "--to", "hsm:breakglass", "--to", "local:backup"]
    made.run(*seal)
    return made
