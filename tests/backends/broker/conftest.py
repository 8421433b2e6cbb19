"""A real service, in processes of its own, with a file provider behind it."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port
from quotes import MRENCLAVE, World
from waiting import until

from keymgmt import load_config
from keymgmt.backend import ConfigPath, Evidence, KeyProvider, Settings

KEYS = ("model", "other")


WORLD = World()
POLICY = f'evidence = "sgx"\nmrenclave = ["{MRENCLAVE.hex()}"]\n'


class MadeSettings(Settings):
    """What the evidence of a test proves: ``this`` request, ``nothing``, or ``too much``."""

    proves: str = "this"
    device: ConfigPath | None = None


class MadeEvidence(Evidence[MadeSettings]):
    """A quote of a root of our own; the service verifies it as any."""

    kind = "sgx"
    Settings = MadeSettings
    make = WORLD.sgx

    def quote(self, report_data: bytes) -> bytes:
        if self.settings.proves == "too much":
            return bytes(1 << 20)
        return type(self).make(report_data if self.settings.proves == "this" else bytes(32))


class MadeGuest(MadeEvidence):
    """The same of a TDX guest."""

    kind = "tdx"
    make = WORLD.tdx


MADE = {each.kind: each for each in (MadeEvidence, MadeGuest)}


class Service:
    """One instance of the broker; it starts with ``start``, and its log is the file ``log``."""

    def __init__(
        self, folder: Path, *, port: int = 0, secure: Path | None = None, **more: Any
    ) -> None:
        self.folder, self.port, self.secure = folder, port or free_port(), secure
        self.process: subprocess.Popen[bytes] | None = None
        self.options: tuple[str, ...] = ()
        self.log = folder / f"log-{self.port}"
        self.config = folder / f"broker-{self.port}.toml"
        self.write(**more)

    @property
    def address(self) -> str:
        return f"http{'s' if self.secure else ''}://127.0.0.1:{self.port}"

    def write(
        self,
        *,
        workers: int = 1,
        rate: float = 100000,
        more: str = "",
        keys: str | None = None,
        host: str = "127.0.0.1",
        policy: str = POLICY,
        config: str = "keymgmt.toml",
    ) -> None:
        if keys is None:
            keys = "".join(f'[keys.{key}]\nkey = "site:{key}"\nallow = ["press"]\n' for key in KEYS)
        new = self.config.with_suffix(".new")
        new.write_text(
            f'listen = "{host}:{self.port}"\nconfig = "{config}"\n'
            f'workers = {workers}\nrate = {rate}\nnonce_key = "nonce.key"\n'
            f'collateral = "collateral"\nunsafe_root = "root.der"\n{more}\n'
            f"[policies.press]\n{policy}{keys}"
        )
        new.rename(self.config)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "keymgmt",
                    "broker",
                    "serve",
                    "--config",
                    self.config,
                    *self.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def up() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            return self.status() == 200

        until(up, said=self.said)

    def status(self) -> int | None:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        if self.secure:
            context = ssl.create_default_context(cafile=self.secure)
            made = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=5, context=context)
        try:
            made.request("GET", "/healthz")
            return made.getresponse().status
        except OSError:
            return None
        finally:
            made.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[int]:
        """The processes of the service: the one that watches, and its workers."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def heal(self) -> None:
        """Go on, or start again."""
        if self.process is None:
            self.start()
        else:
            self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        for pid in self.family():
            os.kill(pid, number)

    def stop(self) -> int:
        """End it as systemd does; its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
        self.process = None


def make_site(folder: Path) -> Path:
    """A folder with a file provider and its keys, model and other, and what a broker needs."""
    from keymgmt_broker_service._commands import export_recipient

    folder.mkdir(mode=0o700)
    WORLD.write(folder / "collateral")
    (folder / "keymgmt.toml").write_text('[providers.site]\nbackend = "file"\npath = "keys"\n')
    with load_config(folder / "keymgmt.toml") as config:
        provider: Any = config.provider("site")
        for key in KEYS:
            provider.create_key(key, "hpke-p256", {})
    (folder / "nonce.key").write_bytes(os.urandom(32))
    (folder / "nonce.key").chmod(0o600)
    config_of_service = Service(folder).config
    for key in KEYS:
        export_recipient(config_of_service, key).save(folder / f"{key}.recipient")
    return folder


Make = Callable[..., Service]


@pytest.fixture(scope="module")
def module_site(tmp_path_factory) -> Path:
    return make_site(tmp_path_factory.mktemp("broker") / "site")


@pytest.fixture(scope="module")
def shared_service(module_site) -> Iterator[Service]:
    """One instance with two workers for all tests of a module, which leave it as it was."""
    made = Service(module_site, workers=2)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def make_service(module_site) -> Iterator[Make]:
    """Make an instance over the same site; it ends with the test."""
    made: list[Service] = []

    def make(*, start: bool = True, **settings: Any) -> Service:
        made.append(Service(module_site, **settings))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def world() -> World:
    """The root of the tests' own, which the service trusts."""
    return WORLD


@pytest.fixture
def prove() -> Callable[[bytes], bytes]:
    """Evidence that the policy of the tests accepts."""
    return WORLD.sgx


@pytest.fixture
def recipients(module_site) -> dict[str, Path]:
    """The recipient files of the broker's keys, as the broker exports them."""
    return {key: module_site / f"{key}.recipient" for key in KEYS}


@pytest.fixture
def client(recipients, monkeypatch) -> Callable[..., KeyProvider[Any]]:
    """Make a provider of the backend broker whose evidence is made by the test."""
    from keymgmt_broker import BrokerProvider, BrokerSettings, _settings

    monkeypatch.setattr(_settings, "load_evidence", MADE.__getitem__)

    def make(*addresses: str, **more: Any) -> KeyProvider[Any]:
        settings = BrokerSettings.model_validate(
            {
                "service": list(addresses or ["http://127.0.0.1:1"]),
                "evidence": "sgx",
                "recipients": recipients,
                "timeout": 20.0,
            }
            | more
        )
        return BrokerProvider("proven", settings)

    return make
