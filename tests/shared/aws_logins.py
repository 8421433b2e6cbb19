"""What logins to AWS are tried by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keymgmt.backend import Dek

ROLE = "arn:aws:iam::111122223333:role/opener"


def works(provider: Any) -> str:
    """Wrap and unwrap; who did it, as AWS STS says."""
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        assert provider.unwrap(wrapped, b"c") == dek
    login = next(f for f in provider.check().findings if f.name == "login")
    assert login.status == "ok", login
    return login.detail


def container_words(session: dict[str, Any]) -> str:
    return json.dumps(
        {("Token" if name == "SessionToken" else name): value for name, value in session.items()}
    )


def instance_answers(session: str) -> dict[str, str]:
    path = "/latest/meta-data/iam/security-credentials/"
    return {
        "PUT /latest/api/token": "imds-token",
        f"GET {path}": "the-role",
        f"GET {path}the-role": session,
    }


def profile(tmp_path: Path, config: str, credentials: str) -> dict[str, str]:
    files = {"config_file": config, "credentials_file": credentials}
    for name, text in files.items():
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(text)
    return {"method": "profile", "profile": "press"} | {
        name: str(tmp_path / name) for name in files
    }
