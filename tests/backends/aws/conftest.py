"""Two services on loopback: moto, which is another's program, and a simulation of our own.

moto lets through what AWS refuses (disabled keys, keys pending deletion, policies, grants), has no
RSA decryption and signs digests otherwise, so for all of that there is ``Simulated``: it answers as
the API reference of AWS KMS says. What ran on it did not run on AWS.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port
from scripts import load_script
from waiting import until_it_listens
from webserver import Seen, reply, serving

from keymgmt.backend import KeyProvider

Make = Callable[..., KeyProvider[Any]]
REGION = "eu-central-1"
# pytest imports no module that stands beside a test.
_simulated = load_script(Path(__file__).with_name("simulated_kms.py"))
Simulated = _simulated.Simulated


class Moto:
    """One moto server process; ``client`` talks to it without our code."""

    def __init__(self, program: Path, directory: Path) -> None:
        port = free_port()
        environment = {"HOME": str(directory), "PATH": os.environ["PATH"]}
        self.process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        until_it_listens(port, self.process)
        self.port = port
        self.address = f"http://127.0.0.1:{port}"

    def client(self, region: str = REGION) -> Any:
        from botocore.session import Session

        return Session().create_client(
            "kms",
            region_name=region,
            endpoint_url=self.address,
            aws_access_key_id="tests",
            aws_secret_access_key="tests",
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def moto(require_tool, tmp_path_factory) -> Iterator[Moto]:
    made = Moto(require_tool("moto_server"), tmp_path_factory.mktemp("moto"))
    yield made
    made.end()


@pytest.fixture
def instance(moto) -> dict[str, str]:
    """The login of an EC2 instance, of whose metadata service moto has an imitation too."""
    return {"method": "instance", "endpoint": moto.address}


@pytest.fixture
def kms(rsa_keys) -> Iterator[Any]:
    """A simulation of AWS KMS and STS of this test alone."""
    made = Simulated(REGION)
    yield made
    made.close()


@pytest.fixture
def simulate(rsa_keys) -> Iterator[Callable[..., Any]]:
    """Make further simulations: ``simulate(region, tls)``."""
    made: list[Any] = []

    def start(*arguments: Any) -> Any:
        made.append(Simulated(*arguments))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def rsa_keys() -> None:
    """Make the RSA keys of all simulations: within a request it could take too long."""
    for bits in (2048, 3072, 4096):
        _simulated.rsa_key(bits)


@pytest.fixture
def secret_file(tmp_path) -> Callable[[str], dict[str, str]]:
    """Write a private file with a secret; the table that names it."""

    def write(value: str, name: str = "") -> dict[str, str]:
        path = tmp_path / (name or f"secret-{secrets.token_hex(4)}")
        path.touch(mode=0o600)
        path.write_text(value)
        return {"file": str(path)}

    return write


@pytest.fixture
def make(kms, secret_file) -> Iterator[Make]:
    """Make a provider of the simulation: ``make(auth=..., keys=...)``, any settings."""
    from keymgmt_aws import AwsProvider, AwsSettings

    made: list[KeyProvider[Any]] = []

    def provider(**settings: Any) -> Any:
        name, secret = kms.user
        settings = {
            "region": REGION,
            "endpoint": kms.address,
            "sts_endpoint": kms.address,
            "timeout": 6.0,
            "call_timeout": 3.0,
            "auth": {
                "method": "static",
                "access_key_id": secret_file(name),
                "secret_access_key": secret_file(secret),
            },
        } | settings
        one = AwsProvider("cloud", AwsSettings.model_validate(settings))
        made.append(one)
        return one

    yield provider
    for one in made:
        one.close()


@pytest.fixture
def static(kms, secret_file) -> dict[str, Any]:
    name, secret = kms.user
    return {
        "method": "static",
        "access_key_id": secret_file(name),
        "secret_access_key": secret_file(secret),
    }


@pytest.fixture
def metadata() -> Iterator[Any]:
    """A metadata service: ``answers`` are path -> text; ``seen`` are path and headers."""

    class Service:
        answers: dict[str, str]
        redirect = ""
        seen: list[tuple[str, str, dict[str, str]]]

    service = Service()
    service.answers, service.seen = {}, []

    def answer(request: Seen, handler: Any) -> None:
        service.seen.append((request.method, request.path, dict(handler.headers.items())))
        body = service.answers.get(f"{request.method} {request.path}")
        status = 307 if service.redirect else 404 if body is None else 200
        reply(handler, status, (body or "").encode(), Location=service.redirect)

    with serving(answer) as web:
        service.address = web.url  # type: ignore[attr-defined]
        yield service
