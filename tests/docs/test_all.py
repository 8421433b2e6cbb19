"""The pages that name several key services: each on its real software."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import keymgmt.cli

for each in ("file", "vault_dev", "pkcs11", "tpm2", "openvino"):
    pytest.importorskip(f"keymgmt_{each}")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

PAGES_MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PAGES_TPM = "device:/dev/tpmrm0"
PAGES_SRK = "000b0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
APP_ROLE = (
    'auth = { method = "approle", role_id = { file = "role-id" }, '
    'secret_id = { file = "secret-id" } }'
)
IR = """python - <<'EOF'
import openvino as ov
from openvino import opset13 as ops
port = ops.parameter([1, 4], ov.Type.f32, name="x")
ov.save_model(ov.Model([ops.relu(port)], [port], "resnet50"), "resnet50.xml")
EOF"""


class Services:
    """A Vault, a token and a TPM, and the config tables that name them."""

    def __init__(self, desk: Any, require_tool: Callable[..., Path], module: Path) -> None:
        self.desk = desk
        require_tool("bao")
        require_tool("swtpm", package="swtpm")
        require_tool("softhsm2-util", package="softhsm2")
        self.module = module
        folder = desk.config.parent
        folder.mkdir(parents=True)
        folder.chmod(0o700)
        self.tcti = desk.emulate_tpm("tpm")
        desk.make_token("token")
        desk.run(f"cp hsm.pin {folder} && (umask 077; echo 31415 > {folder}/tpm.pin)")
        lines: list[str] = []
        dev = "keymgmt vault dev --directory dev 2>/dev/null"
        desk.serve(dev, lambda said: lines.extend(itertools.islice(said, 4)))
        self.site = "".join(lines)
        found = re.search(r'address = "(.*)"', self.site)
        assert found
        self.address = found[1]
        desk.configure(self.tpm())
        said = desk.run("keymgmt tpm setup tpm --create").out
        self.srk = re.findall(r"000b[0-9a-f]{64}", said)[0]
        desk.config.unlink()

    def tpm(self, name: str = "") -> str:
        pin = f'srk_name = "{name}"\n' if name else ""
        return f'[providers.tpm]\nbackend = "tpm2"\nkeys = "tpm-keys"\ntcti = "{self.tcti}"\n{pin}'

    def configure(self) -> None:
        hsm = f'backend = "pkcs11"\nmodule = "{self.module}"\ntoken = "Model Keys"'
        hsm = f'[providers.hsm]\n{hsm}\npin = {{ file = "hsm.pin" }}\n'
        self.desk.configure(self.site + hsm + self.tpm(self.srk))


@pytest.fixture
def services(desk, require_tool, softhsm_module) -> Services:
    return Services(desk, require_tool, softhsm_module)


def test_a_publishers_key(desk, services):
    desk.run("echo net > resnet50.xml && echo weights > resnet50.bin")
    token = re.findall(r"auth = .*", services.site)[0]
    desk.stand_ins = {
        '"https://vault.example:8200"\nca_file = "site-ca.pem"': f'"{services.address}"',
        APP_ROLE: token,
        PAGES_TPM: services.tcti,
        PAGES_SRK: services.srk,
    }
    if str(services.module) != PAGES_MODULE:
        desk.stand_ins[PAGES_MODULE] = str(services.module)
    desk.run_page("docs/publishers.md", given={"Sign with it": "keymgmt keys create site:resnet50"})


def first(desk: Any) -> None:
    """What the page begins with: an application, long after a model was sealed."""
    desk.run(IR)
    desk.run("keymgmt init ~/first && export KEYMGMT_CONFIG=~/first/keymgmt.toml")
    desk.run("keymgmt seal resnet50.xml resnet50.sealed --release 7")


def fleet(desk: Any, services: Services) -> None:
    """The services that the page names, a device that exported its key, and who vouches for it."""
    services.configure()
    folder = desk.config.parent
    for command in (
        "keymgmt keys create site:resnet50 && keymgmt keys create hsm:breakglass",
        "keymgmt keys create tpm:dev && keymgmt keys create local:vouch --sign",
        f"keymgmt keys export local:vouch -o {folder}/vouch.pem",
        "keymgmt keys export tpm:dev --format recipient --sign local:vouch -o device7.recipient",
    ):
        desk.run(command)
    text = desk.config.read_text()
    vouched = '[policy]\nrecipient_signers = ["vouch.pem"]'
    desk.config.write_text(text.replace("[policy]", vouched))


def from_python(desk: Any, services: Services) -> None:
    services.configure()
    desk.run("mkdir model && cp resnet50.bin model/weights.bin")
    desk.run("keymgmt keys create hsm:release --sign")
    desk.run(f"keymgmt keys export hsm:release -o {desk.config.parent}/release.pub.pem")


def test_the_readme(desk, services):
    desk.prelude = "import numpy\ninputs = [numpy.ones((1, 4), numpy.float32)]\n"
    desk.run_page(
        "README.md",
        given={
            "keymgmt": lambda: first(desk),
            "Seal, ship, load": "rm -r resnet50.sealed; unset KEYMGMT_CONFIG",
            "mkdir models": lambda: fleet(desk, services),
            "From Python": lambda: from_python(desk, services),
        },
    )


def test_commands_inside_of_sentences_exist(docs):
    """Such as `keymgmt keys retire`: their subcommands and options are those of the programs."""
    wrong = []
    for page in docs.PAGES:
        for text in set(docs.inline(page)) - {"keymgmt acme ..."}:
            words = text.removeprefix("keymgmt ").replace("|", " ").replace(",", " ").split()
            command: Any = typer.main.get_command(keymgmt.cli.app)
            for word in itertools.takewhile(
                lambda word: word != "--" and not word.isupper(), words
            ):
                context = command.context_class(command)
                known = {name for each in command.get_params(context) for name in each.opts}
                if word.startswith("-"):
                    if word.partition("=")[0] not in known:
                        wrong.append(f"{page}: {text}: no option {word}")
                elif hasattr(command, "resolve_command"):
                    # It exits as for a wrong word on the command line.
                    _, command, _ = command.resolve_command(context, [word])
    assert not wrong
