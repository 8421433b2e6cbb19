"""VaultProvider keeps the contract of every provider, on a real server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PatientContract

from keymgmt.testing import Hook, ProviderFactory

# A token for everything that the contract asks for, and no more.
POLICY = """
path "transit/keys" { capabilities = ["list"] }
path "transit/keys/*" { capabilities = ["create", "read", "update", "delete"] }
path "transit/encrypt/*" { capabilities = ["create", "update"] }
path "transit/decrypt/*" { capabilities = ["update"] }
path "transit/sign/*" { capabilities = ["update"] }
"""


@pytest.fixture(scope="module")
def server(new_bao) -> Any:
    bao = new_bao()
    bao.transit("transit", "model", "other")
    return bao


@pytest.fixture(scope="module")
def role(server) -> tuple[str, str]:
    return server.approle(POLICY)


class TestVault(PatientContract):
    """With AppRole; ``create`` on encrypt, so that only our look stops the upsert trap."""

    @pytest.fixture
    def provider_factory(self, server, role, secret_file, time_limit) -> ProviderFactory:
        return self.factory(server, role[0], role[1], secret_file, time_limit)

    def factory(
        self, server: Any, role_id: str, secret_id: str, place: Any, limit: float = 20.0
    ) -> ProviderFactory:
        from keymgmt_vault import VaultProvider, VaultSettings

        settings = VaultSettings.model_validate(
            {
                "address": server.address,
                "ca_file": str(server.authority.ca_file),
                "auth": {
                    "method": "approle",
                    "role_id": place(role_id),
                    "secret_id": place(secret_id),
                },
                "timeout": limit,
                "call_timeout": limit / 2,
            }
        )
        return lambda: VaultProvider("site", settings)

    @pytest.fixture
    def other_wrap_key(self) -> str:
        return "other"

    @pytest.fixture
    def recipient_key(self, provider) -> str:
        if "rsa" not in [info.key for info in provider.list_keys()]:
            provider.create_key("rsa", "rsa-2048", {})
        return "rsa"

    @pytest.fixture
    def denied_factory(self, server, role, secret_file) -> Any:
        return self.factory(server, role[0], "not-the-secret-id", secret_file)

    @pytest.fixture
    def break_service(self, server) -> Hook:
        return lambda: server.do("PUT", "sys/seal")

    @pytest.fixture
    def hang_service(self, server) -> Hook:
        return lambda: server.send(signal.SIGSTOP)

    @pytest.fixture
    def heal_service(self, server) -> Iterator[Hook]:
        def heal() -> None:
            server.send(signal.SIGCONT)
            server.unseal()
            server.wait_active()

        return heal

    @pytest.fixture
    def expire_login(self, server) -> Hook:
        return lambda: server.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")

    @pytest.fixture
    def secret_values(self, server, role) -> list[bytes]:
        return [role[1].encode(), server.root.encode()]

    @pytest.fixture
    def place_values(self, server) -> list[str]:
        return [str(server.port), "127.0.0.1", Path(server.directory).name]
