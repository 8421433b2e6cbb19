"""The policies of docs/backends/vault.md: each role does its work and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keymgmt.backend import AccessDenied, Dek

PAGE = Path(__file__).parents[3] / "docs" / "backends" / "vault.md"
ROLES = dict(re.findall(r"```hcl\n# role: ([a-z ]+)\n(.*?)```", PAGE.read_text(), re.DOTALL))

MAY = {
    "sealing machine": {"wrap", "describe"},
    "edge device": {"unwrap"},
    "rotator": {"describe", "rotate", "retire"},
    "publisher": {"sign", "describe the publisher"},
}


def test_the_page_has_all_roles():
    assert set(ROLES) == set(MAY)


@pytest.fixture(scope="module")
def server(new_bao) -> Any:
    bao = new_bao()
    bao.transit("transit", "resnet50", "other")
    bao.transit("transit", "publisher", kind="ed25519")
    return bao


@pytest.mark.parametrize("role", MAY)
def test_a_role_does_its_work_and_nothing_else(server, make, role):
    server.do("POST", "transit/keys/resnet50/rotate", {})
    root = make(server)
    oldest = next(v for v in root.describe_key("resnet50").versions if v.state == "old").version
    token = server.token(ROLES[role])
    provider = make(server, token=token)
    with Dek.generate() as dek:
        wrapped = root.wrap("resnet50", dek, b"c")
        other = root.wrap("other", dek, b"c")
        work: dict[str, Callable[[], Any]] = {
            "wrap": lambda: provider.wrap("resnet50", dek, b"c"),
            "unwrap": lambda: provider.unwrap(wrapped, b"c"),
            "describe": lambda: provider.describe_key("resnet50"),
            "rotate": lambda: provider.rotate_key("resnet50"),
            "retire": lambda: provider.retire_version("resnet50", oldest),
            "sign": lambda: provider.sign("publisher", b"m"),
            "describe the publisher": lambda: provider.describe_key("publisher"),
            "create": lambda: provider.create_key("new", "aes256-gcm96", {}),
            "list": provider.list_keys,
            "wrap under another": lambda: provider.wrap("other", dek, b"c"),
            "unwrap another": lambda: provider.unwrap(other, b"c"),
            "rotate another": lambda: provider.rotate_key("other"),
            "rotate the publisher": lambda: provider.rotate_key("publisher"),
            "wrap under a mistyped": lambda: provider.wrap("resnet5O".lower(), dek, b"c"),
        }
        for what, call in work.items():
            if what in MAY[role]:
                call()
            else:
                with pytest.raises(AccessDenied):
                    call()
    body = {"plaintext": "AAAA"}
    raw = [
        ("POST", "transit/encrypt/mistyped", body),
        ("POST", "transit/keys/resnet50/config", {"deletion_allowed": True}),
        ("POST", "transit/keys/resnet50/config", {"exportable": True}),
        ("POST", "transit/keys/resnet50/config", {"min_encryption_version": 1}),
        ("DELETE", "transit/keys/resnet50", None),
        ("GET", "transit/export/encryption-key/resnet50", None),
        ("GET", "transit/backup/resnet50", None),
        ("POST", "transit/datakey/plaintext/resnet50", {}),
        ("POST", "transit/rewrap/resnet50", {"ciphertext": "vault:v1:AAAA"}),
        ("POST", "transit/config/keys", {"disable_upsert": False}),
        ("LIST", "transit/keys", None),
        ("GET", "sys/mounts", None),
        ("GET", "sys/policies/acl/root", None),
        ("POST", "auth/token/create", {"policies": ["root"]}),
    ]
    for method, path, data in raw:
        status, answer = server.api(method, path, data, token=token)
        assert status == 403, (role, method, path, answer)
    assert server.api("GET", "transit/keys/mistyped")[0] == 404


def test_a_rewrapper_has_two_roles(server, make):
    policy = ROLES["edge device"] + ROLES["sealing machine"]
    provider = make(server, token=server.token(policy))
    with Dek.generate() as dek:
        wrapped = provider.wrap("resnet50", dek, b"c")
        with provider.unwrap(wrapped, b"c") as again:
            assert again == dek
            provider.wrap("resnet50", again, b"d")
