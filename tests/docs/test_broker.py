"""The page of the key broker, with an enclave whose quotes are of a root of our own."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator

import pytest
from loopback import Authority, free_port
from quotes import MRENCLAVE, World
from tees import gramine_toml, mounted
from waiting import until

pytest.importorskip("keymgmt_broker_service")
pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]


@pytest.fixture
def port(desk, require_tool, tmp_path) -> Iterator[int]:
    """A desk where the broker has its certificate, and the machine an enclave."""
    require_tool("openssl")
    authority, world, port = Authority(tmp_path / "tls"), World(), free_port()
    certificate, key = authority.issue("broker")
    key.chmod(0o600)
    certificate.rename(desk.work / "broker.pem")
    key.rename(desk.work / "broker.key")
    desk.config.parent.mkdir(parents=True, mode=0o700)
    (desk.config.parent / "broker-ca.pem").write_bytes(authority.ca_file.read_bytes())
    root = world.write(desk.work / "collateral")
    enclave = tmp_path / "enclave"
    collateral = 'collateral = "collateral"\n'
    desk.stand_ins = {
        "0.0.0.0:8443": f"127.0.0.1:{port}",
        "https://broker.example:8443": f"https://127.0.0.1:{port}",
        "/etc/keymgmt/keymgmt.toml": str(desk.config),
        "1" * 64: MRENCLAVE.hex(),
        collateral: f'{collateral}unsafe_root = "{root}"\n',
        'evidence = "sgx"\nrecipients': f"evidence = {gramine_toml(enclave)}\nrecipients",
    }
    with mounted("sgx", world, enclave, require_tool):
        yield port


def test_the_page(desk, docs, port):
    (config,) = (each for each in docs.blocks("docs/broker.md") if each.text.startswith("listen"))

    def answers() -> bool:
        context = ssl.create_default_context(cafile=desk.config.parent / "broker-ca.pem")
        made = http.client.HTTPSConnection("127.0.0.1", port, context=context)
        with contextlib.suppress(OSError):
            made.request("GET", "/healthz")
            return made.getresponse().status == 200
        return False

    desk.served = {"keymgmt broker serve --config broker.toml": lambda _: until(answers, 60)}
    desk.run_page(
        "docs/broker.md",
        given={
            "keymgmt broker export": lambda: (desk.work / "broker.toml").write_text(
                desk.stand_in(config.text)
            ),
            "keymgmt seal": "mkdir model && echo net > model/model.xml",
            "A machine": lambda: desk.configure("[policy]\nrequire_signature = false\n"),
        },
    )
    assert "round trip resnet50" in desk.told["keymgmt doctor proven:resnet50"].said


def test_its_readme(desk):
    desk.run_page("backends/broker/README.md")
