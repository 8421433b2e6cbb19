"""One model, four key services: each on its real software, driven by the command line alone.

"This device's TPM and the site's Vault together, or the HSM in the safe, or the file key": every
way in opens, and no other does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RequireTool = Callable[..., Path]
PIN = "user-pin-271828"
CONTENT = bytes(range(256)) * 1024


@dataclass
class Site:
    """A folder with the config tables of four providers, and a way to run commands there."""

    folder: Path
    tables: dict[str, str]
    environment: dict[str, str]

    def run(self, *arguments: str, providers: str = "local tpm site hsm", code: int = 0) -> str:
        """Run a command with a config that has only these providers; returns its output."""
        config = self.folder / f"only-{providers.replace(' ', '-')}.toml"
        config.write_text(
            "".join(self.tables[name] for name in providers.split())
            + '[policy]\npublishers = { "publisher.pem" = ["*"] }\n'
        )
        done = subprocess.run(
            [sys.executable, "-m", "keymgmt.cli", "--config", config, *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")


@pytest.fixture(scope="module")
def tpm(require_tool: RequireTool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The TCTI of an emulated TPM."""
    program = require_tool("swtpm", package="swtpm")
    state = tmp_path_factory.mktemp("tpm")
    for _ in range(20):
        port = random.randrange(20000, 30000)
        command = [program, "socket", "--tpm2", "--tpmstate", f"dir={state}"]
        command += ["--server", f"type=tcp,port={port},bindaddr=127.0.0.1"]
        command += ["--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"]
        command += ["--flags", "not-need-init,startup-clear"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            # It ends at once where a port is taken.
            while process.poll() is None:
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port + 1), 1),
                ):
                    break
                time.sleep(0.01)
            else:
                continue
            yield f"swtpm:host=127.0.0.1,port={port}"
            process.kill()
            return
    pytest.fail("swtpm does not start")


@pytest.fixture(scope="module")
def vault(require_tool: RequireTool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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


@pytest.fixture(scope="module")
def site(
    require_tool: RequireTool, tpm: str, vault: str, tmp_path_factory: pytest.TempPathFactory
) -> Site:
    module = require_tool(
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
        package="softhsm2",
    )
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
        "hsm": f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{module}"\ntoken = "models"\n'
        'pin = { file = "pin" }\n',
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


def groups(site: Site) -> list[list[str]]:
    """Who opens the model, as ``inspect`` shows it."""
    found: list[list[str]] = json.loads(site.run("inspect", "model.sealed", "--json"))["groups"]
    return found


def search_path() -> str:
    """Programs of this environment first: ``bao`` comes from a wheel."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_the_tables_name_four_backends(site: Site) -> None:
    found = [tomllib.loads(table)["providers"] for table in site.tables.values()]
    backends = {table["backend"] for tables in found for table in tables.values()}
    assert backends == {"file", "pkcs11", "tpm2", "vault"}
    keys = [[text.partition("@")[0] for text in group] for group in groups(site)]
    assert keys == [["tpm2:dev", "vault:model"], ["pkcs11:breakglass"], ["file:backup"]]


@pytest.mark.parametrize(
    "providers", ["tpm site", "hsm", "local", "local tpm", "site hsm", "local tpm site hsm"]
)
def test_every_way_in_opens(site: Site, providers: str) -> None:
    target = f"plain-{providers.replace(' ', '-')}"
    site.run("unseal", "model.sealed", target, providers=providers)
    assert (site.folder / target / "weights.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("provider", ["tpm", "site"])
def test_half_of_a_group_opens_nothing_and_says_what_is_missing(site: Site, provider: str) -> None:
    said = site.run("verify", "model.sealed", providers=provider, code=4)
    assert "no recipient of resnet50 opens" in said
    for recipient in ("pkcs11:breakglass@", "file:backup@"):
        assert recipient in said


def test_doctor_finds_all_four_well(site: Site) -> None:
    keys = ["local:backup", "tpm:dev", "site:model", "hsm:breakglass"]
    report = json.loads(site.run("doctor", *keys, "--json"))
    assert report["ok"]
    subjects = {finding["subject"] for finding in report["findings"]}
    assert {"local (file)", "tpm (tpm2)", "site (vault)", "hsm (pkcs11)"} == subjects


def test_rotation_reaches_every_service(site: Site) -> None:
    before = groups(site)
    for key in ("local:backup", "tpm:dev", "site:model", "hsm:breakglass"):
        site.run("keys", "rotate", key)
    site.run("rewrap", "model.sealed")
    after = groups(site)
    assert len(after) == len(before)
    for old, new in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        assert new.partition("@")[0] == old.partition("@")[0]
        assert new != old
    for providers in ("tpm site", "hsm", "local"):
        site.run("verify", "model.sealed", providers=providers)
