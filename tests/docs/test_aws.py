"""The pages and the hints of the backend for AWS KMS, on moto, with the login of its instance."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("keymgmt_aws")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODEL = "mkdir model && echo net > model/model.xml && echo weights > model/model.bin"
INSTANCE = 'auth = { method = "instance" }'


# AWS KMS is sent digests to sign, which moto takes for messages.
MOTO = """
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from moto.kms.utils import ECDSAPrivateKey
from moto.server import main

def sign(key, digest, algorithm):
    return key.private_key.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))

ECDSAPrivateKey.sign = sign
main(["-H", "127.0.0.1", "-p", "0"])
"""


@pytest.fixture
def service(desk, require_tool) -> str:
    """The address of a server that is AWS KMS, AWS STS, and the metadata service of EC2."""
    require_tool("moto_server")
    (desk.folder / "service.py").write_text(MOTO)
    said: list[str] = []
    desk.serve(
        f"python {desk.folder}/service.py 2>&1",
        lambda lines: said.append(next(line for line in lines if "Running on" in line)),
    )
    address = re.search(r"http://127\.0\.0\.1:\d+", said[0])
    assert address, said
    return address[0]


def there(address: str) -> str:
    """The login and the place of a page, as they are at this desk."""
    return (
        f'auth = {{ method = "instance", endpoint = "{address}" }}\n'
        f'endpoint = "{address}"\nsts_endpoint = "{address}"'
    )


def key_id(desk: Any) -> str:
    found = re.search(
        r"resnet50\b.*?([0-9a-f]{8}(?:-[0-9a-f]+){4})",
        desk.run("keymgmt keys show cloud:resnet50").out,
        re.DOTALL,
    )
    assert found, desk.last.out
    return found[1]


def test_its_manual(desk, service):
    desk.run(MODEL)
    desk.stand_ins = {INSTANCE: there(service), "KEY-ID": lambda: key_id(desk)}
    desk.run_page("docs/backends/aws.md")
    desk.run("keymgmt verify resnet50.sealed")


def test_its_readme(desk):
    desk.run_page("backends/aws/README.md")


def test_its_hints(desk, service):
    desk.run(MODEL)
    desk.configure(
        f'[providers.cloud]\nbackend = "aws"\nregion = "eu-central-1"\n{there(service)}\n'
        "[policy]\nrequire_signature = false\n"
    )
    names = {"PROVIDER": "cloud", "KEY": "a"}
    desk.fails("keymgmt seal model a.sealed --to cloud:a")
    desk.follow("backends/aws", "keymgmt keys create PROVIDER:KEY", **names)
    desk.run("keymgmt seal model a.sealed --to cloud:a")
    desk.fails("keymgmt keys create cloud:a")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    said = desk.run("keymgmt keys show cloud:a").out
    desk.fails("keymgmt keys export cloud:a -o a.recipient")
    desk.follow("keymgmt", "keymgmt keys create {}:NAME --kind {}", NAME="office")
    desk.run("keymgmt keys export cloud:office -o office.recipient")
    # A version is not retired; its key is left.
    (version,) = set(re.findall(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4,12}){4}", said))
    told = desk.fails(f"keymgmt keys retire cloud:a@{version}")
    desk.follow("backends/aws", "keymgmt keys create PROVIDER:NEW", PROVIDER="cloud", NEW="b")
    desk.last = told
    desk.follow(
        "backends/aws",
        "keymgmt rewrap MODEL --add PROVIDER:NEW --drop aws:{}@{}",
        PROVIDER="cloud",
        NEW="b",
        MODEL="a.sealed",
    )
    said = desk.run("keymgmt inspect a.sealed").out
    assert "aws:b@" in said
    assert version not in said
    # moto says this where AWS says that it is another key's.
    desk.configure('[providers.cloud.keys]\nb = { arn = "alias/keymgmt/a" }\n')
    desk.fails("keymgmt unseal a.sealed plain")
    names = {"ROLE": "open", "PROVIDER": "cloud", "KEY": "b"}
    said = desk.follow("backends/aws", "keymgmt aws policy ROLE PROVIDER:KEY", **names).out
    assert "kms:Decrypt" in said
