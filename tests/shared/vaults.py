"""What the tests of the Vault backend say over and over."""

from __future__ import annotations

import json

ONE_TRY = 2.0  # seconds, in which a busy machine too gets an answer
UNWRAP = 'path "transit/decrypt/*" { capabilities = ["update"] }'
JSON = {"Content-Type": "application/json"}


def errors(*words: str) -> bytes:
    """The body of a refusal."""
    return json.dumps({"errors": words}).encode()


def opens(provider, wrapped) -> bool:
    """Whether the fixture ``wrapped`` opens, which is an error where it does not."""
    with provider.unwrap(wrapped, b"c") as dek:
        return bytes(dek.view()) == bytes(32)


def approle(bao, secret_file, name: str, **options) -> dict[str, object]:
    """The settings of a login by a new role that may unwrap."""
    role_id, secret_id = bao.approle(UNWRAP, name, **options)
    ids = {"role_id": secret_file(role_id), "secret_id": secret_file(secret_id)}
    return {"method": "approle", **ids}
