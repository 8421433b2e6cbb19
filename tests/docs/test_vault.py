"""The pages and the hints of the Vault backend, on OpenBao servers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback import free_port

pytest.importorskip("keymgmt_vault")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODEL = "echo net > model.xml && echo weights > model.bin"
ADMIN = 'path "transit/*" { capabilities = ["create", "read", "update", "list"] }'


@pytest.fixture
def server(desk, require_tool) -> str:
    """The address of a server with TLS as ``bao server -dev`` runs it; commands are the root's."""
    require_tool("bao")
    port = free_port()
    address = f"https://127.0.0.1:{port}"
    desk.run("mkdir tls")
    desk.serve(
        "bao server -dev -dev-no-store-token -dev-root-token-id=root -dev-tls "
        f"-dev-tls-cert-dir=tls -dev-listen-address=127.0.0.1:{port} 2>&1",
        lambda lines: next(line for line in lines if "Root Token" in line),
    )
    desk.variables |= {
        "BAO_ADDR": address,
        "BAO_TOKEN": "root",
        "BAO_CACERT": f"{desk.work}/tls/vault-ca.pem",
    }
    return address


def app_role(desk: Any) -> None:
    """A role that may do what the page does, and its ids beside the config."""
    folder = desk.config.parent
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    role = "auth/approle/role/admin"
    for command in (
        f"cp tls/vault-ca.pem {folder}/site-ca.pem",
        "bao auth enable approle",
        f"echo '{ADMIN}' | bao policy write admin -",
        f"bao write {role} token_policies=admin",
        f"umask 077; bao read -field=role_id {role}/role-id > {folder}/role-id",
        f"umask 077; bao write -f -field=secret_id {role}/secret-id > {folder}/secret-id",
    ):
        desk.run(command)


def wrapped(desk: Any) -> None:
    """What a recipient of a sealed model holds, and its context."""
    desk.run(
        """python -c "import base64, keymgmt
from keymgmt.backend import Dek
site = keymgmt.load_config().provider('site')
print(site.wrap('resnet50', Dek(bytes(32)), b'context').blob.decode())
print(base64.b64encode(b'context').decode())" """
    )
    blob, context = desk.last.out.split()
    desk.stand_ins |= {"vault:v1:...": blob, "BASE64_OF_CONTEXT": context}


def certificate(desk: Any) -> None:
    """The login by certificate, and a sealed model to open."""
    folder = desk.config.parent
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=device -addext"
    for command in (
        f"{make} extendedKeyUsage=clientAuth -keyout {folder}/device.key -out {folder}/device.pem",
        "bao auth enable cert",
        f"bao write auth/cert/certs/device certificate=@{folder}/device.pem token_policies=admin",
        MODEL,
        "keymgmt seal model.xml model.sealed --to site:resnet50",
    ):
        desk.run(command)
    # The one of the device names no CA, and so is of the public ones.
    desk.stand_ins['"https://vault.example:8200"'] = (
        f'"{desk.variables["BAO_ADDR"]}"\nca_file = "site-ca.pem"'
    )
    desk.configure("[policy]\nrequire_signature = false\n")
    desk.prelude = (
        "import keymgmt\nfrom types import SimpleNamespace\n"
        'requests = [SimpleNamespace(path="model.sealed")] * 2'
    )


def dev(desk: Any) -> Callable[[Iterator[str]], object]:
    """``keymgmt vault dev`` prints the config table to paste."""
    return lambda lines: desk.configure("".join(itertools.islice(lines, 4)))


def test_its_manual(desk, server):
    desk.served = {"keymgmt vault dev": dev(desk)}
    desk.stand_ins = {
        '"https://vault-a.example:8200", "https://vault-b.example:8200"': f'"{server}"',
        "/etc/keymgmt/keymgmt.toml": str(desk.config),
    }
    desk.run_page(
        "docs/backends/vault.md",
        given={
            "Set it up": lambda: app_role(desk),
            "What is stored": lambda: wrapped(desk),
            "Opening often: a cache of data keys": lambda: certificate(desk),
        },
    )


def test_its_readmes(desk, server):
    desk.served = {"keymgmt vault dev": dev(desk)}
    desk.run_page("backends/vault-dev/README.md")
    desk.run("keymgmt doctor site:model")
    desk.config.unlink()
    app_role(desk)
    desk.run(f"bao secrets enable transit && {MODEL}")
    desk.stand_ins = {
        '"https://vault-a.example:8200", "https://vault-b.example:8200"': f'"{server}"'
    }
    desk.run_page("backends/vault/README.md")


def configured(desk: Any, address: str) -> None:
    folder = desk.config.parent
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    desk.run(f'(umask 077; printf "$BAO_TOKEN" > {folder}/token)')
    desk.configure(
        f'[providers.site]\nbackend = "vault"\naddress = "{address}"\n'
        f'ca_file = "{desk.work}/tls/vault-ca.pem"\n'
        'auth = { method = "token", token = { file = "token" } }\n'
        "[policy]\nrequire_signature = false\n"
    )
    desk.run(MODEL)


def test_its_hints(desk, server):
    configured(desk, server)
    desk.fails("keymgmt keys create site:a")
    desk.follow("backends/vault", "bao secrets enable -path={} transit")
    desk.fails("keymgmt seal model.xml a.sealed --to site:a")
    desk.follow("backends/vault", "keymgmt keys create PROVIDER:KEY", PROVIDER="site", KEY="a")
    desk.run("keymgmt seal model.xml a.sealed --to site:a")
    desk.fails("keymgmt keys export site:a --format recipient -o a.recipient")
    desk.follow("keymgmt", "keymgmt keys create {}:NAME --kind {}", NAME="office")
    desk.run("keymgmt keys export site:office --format recipient -o office.recipient")
    desk.fails("keymgmt keys create site:a")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    assert "disable_upsert" in desk.run("keymgmt doctor site:a").said
    desk.follow("backends/vault", "bao write {}/config/keys disable_upsert=true")
    assert "disable_upsert" not in desk.run("keymgmt doctor site:a").said
    desk.run("bao delete transit/keys/a/soft-delete")
    desk.fails("keymgmt verify a.sealed")
    desk.follow("backends/vault", "bao write -f {}/keys/{}/soft-delete-restore")
    desk.run("keymgmt verify a.sealed")
    desk.run("keymgmt vault policy --help")
    desk.follow(
        "backends/vault",
        "bao policy write NAME -",
        piped="keymgmt vault policy open site:a",
        NAME="edge",
    )


def test_the_hints_of_a_new_server(desk, require_tool):
    """One that nobody has initialised and unsealed yet."""
    require_tool("bao")
    port = free_port()
    desk.run("mkdir tls && touch tls/vault-ca.pem")
    (desk.work / "bao.hcl").write_text(
        'storage "inmem" {}\nlistener "tcp" {\n'
        f'address = "127.0.0.1:{port}"\ntls_disable = true\n}}\n'
        f'api_addr = "http://127.0.0.1:{port}"\n'
    )
    desk.serve(
        "bao server -config=bao.hcl 2>&1",
        lambda lines: next(line for line in lines if "server started" in line),
    )
    desk.variables |= {"BAO_ADDR": f"http://127.0.0.1:{port}", "BAO_TOKEN": "none yet"}
    configured(desk, f"http://127.0.0.1:{port}")
    desk.fails("keymgmt doctor site")
    said = desk.follow("backends/vault", "bao operator init").out
    for share in re.findall(r"Unseal Key \d: (\S+)", said)[:3]:
        desk.fails("keymgmt doctor site")
        desk.typed = {"bao operator unseal": [share]}
        desk.follow("backends/vault", "bao operator unseal")
    assert "it is sealed" not in desk.fails("keymgmt doctor site").said
