"""The pages and the hints of the PKCS#11 backend, on SoftHSM tokens."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("keymgmt_pkcs11")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODEL = "echo net > model.xml && echo weights > model.bin"
PAGES_MODULE = "/usr/lib/softhsm/libsofthsm2.so"


@pytest.fixture
def module(require_tool, softhsm_module, desk) -> str:
    """SoftHSM's module; the config finds its PIN in the working directory."""
    require_tool("softhsm2-util", package="softhsm2")
    require_tool("pkcs11-tool", package="opensc")
    desk.config.parent.mkdir(parents=True)
    desk.config.parent.chmod(0o700)
    (desk.config.parent / "hsm.pin").symlink_to(desk.work / "hsm.pin")
    return str(softhsm_module)


def table(module: str, more: str = "") -> str:
    return (
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{module}"\ntoken = "Model Keys"\n'
        f'pin = {{ file = "hsm.pin" }}\n{more}[policy]\nrequire_signature = false\n'
    )


def trial(desk: Any, module: str) -> None:
    desk.configure(table(module, "allow_oaep_sha1 = true\n"))
    desk.run("keymgmt keys create hsm:trial")


def test_its_manual(desk, module):
    def pin(name: str) -> str:
        return (desk.work / name).read_text().strip()

    def slot() -> str:
        shown = desk.run(f"pkcs11-tool --module {module} --list-token-slots").out
        return shown.partition("(0x")[2].partition(")")[0]

    desk.stand_ins = {
        "/path/of/the/vendors/library.so": module,
        "LIBRARY.so": module,
        "--slot N": lambda: f"--slot 0x{slot()}",
    }
    if module != PAGES_MODULE:
        desk.stand_ins[PAGES_MODULE] = module
    tool = f"pkcs11-tool --module {module}"
    desk.typed = {
        f"{tool} --init-token": lambda: [pin("so.pin")] * 2,
        f'{tool} --token-label "Model Keys" --login --login-type so': lambda: (
            [pin("so.pin")] + [pin("hsm.pin")] * 2
        ),
        f'{tool} --token-label "Model Keys" --login --key': lambda: [pin("hsm.pin")],
    }
    desk.run_page(
        "docs/backends/pkcs11.md",
        given={
            "Set it up": lambda: desk.make_token("first"),
            "Try your module before you trust it": lambda: trial(desk, module),
        },
    )


def test_running_an_hsm(desk, docs, module):
    """Ceremony, second token, drill, PIN changes and rotation, with two tokens."""
    tool = f"pkcs11-tool --module {module}"
    beside = desk.config.parent

    def pin(name: str) -> str:
        return (desk.work / name).read_text().strip()

    def slot() -> str:
        shown = desk.run(f"{tool} --list-token-slots").out
        return shown.partition("(0x")[2].partition(")")[0]

    def empty() -> None:
        desk.run("mkdir -m 700 tokens && echo directories.tokendir = $PWD/tokens > tokens.conf")
        desk.run("export SOFTHSM2_CONF=$PWD/tokens.conf && mkdir models && echo 31415926 > so.pin")

    def second() -> None:
        desk.run(f"(umask 077; echo 16180339 > spare.pin) && cp spare.pin {beside}")
        pins = "--pin 16180339 --so-pin 31415926"
        desk.run(f"softhsm2-util --init-token --free --label 'Spare Keys' {pins}")
        desk.run("echo net > model.xml && echo weights > model.bin")

    def drill() -> None:
        (text,) = (
            b.text
            for b in docs.blocks("docs/backends/pkcs11-operations.md")
            if "[providers.spare]" in b.text and "[policy]" in b.text
        )
        (beside / "drill.toml").write_text(desk.stand_in(text))

    def oldest() -> str:
        shown = json.loads(desk.run("keymgmt keys show hsm:resnet50 --json").out)
        return str(shown["versions"][0]["version"])

    def fingerprint() -> str:
        printed = desk.told[
            "keymgmt keys export spare:resnet50 --format recipient -o spare.recipient"
        ]
        found = re.search(r"fingerprint:? ([0-9a-f-]{20,})", printed.said)
        assert found, printed.said
        return found[1]

    desk.stand_ins = {
        "LIBRARY.so": module,
        "--slot N": lambda: f"--slot 0x{slot()}",
        "drill.toml": str(beside / "drill.toml"),
        "FINGERPRINT": fingerprint,
        "VERSION": oldest,
    }
    if module != PAGES_MODULE:
        desk.stand_ins[PAGES_MODULE] = module
    login = f'{tool} --token-label "Model Keys" --login'
    desk.typed = {
        f"{tool} --init-token": lambda: [pin("so.pin")] * 2,
        f"{login} --login-type so": lambda: (
            [pin("so.pin")]
            + [pin("new.pin" if (desk.work / "new.pin").exists() else "hsm.pin")] * 2
        ),
        f'{tool} --token-label "Model Keys" --change-pin': lambda: (
            [pin("hsm.pin")] + [pin("new.pin")] * 2
        ),
        f"{login} --delete-object": lambda: [pin("new.pin")],
    }
    desk.run_page(
        "docs/backends/pkcs11-operations.md",
        given={"The ceremony": empty, "Seal to both": second, "Prove it": drill},
    )


def test_its_readme(desk, module):
    desk.make_token("tokens")
    if module != PAGES_MODULE:
        desk.stand_ins = {PAGES_MODULE: module}
    desk.run_page("backends/pkcs11/README.md")
    desk.run("keymgmt doctor hsm")


def test_its_hints(desk, module):
    desk.make_token("tokens")
    desk.configure(table(module))
    desk.run("echo net > model.xml && echo weights > model.bin")
    desk.run("keymgmt doctor hsm")
    desk.follow("backends/pkcs11", "keymgmt keys create {}:KEY", KEY="fleet")
    desk.fails("keymgmt keys create hsm:fleet")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    desk.fails("keymgmt seal model.xml m.sealed --to hsm:nowhere")
    desk.follow("backends/pkcs11", "keymgmt keys list PROVIDER", PROVIDER="hsm")
    desk.fails("keymgmt keys export hsm:fleet --format recipient -o fleet.recipient")
    desk.follow(
        "backends/pkcs11",
        "keymgmt keys create PROVIDER:KEY --kind ecdh-p256",
        PROVIDER="hsm",
        KEY="offline",
    )
    desk.run("keymgmt keys export hsm:offline --format recipient -o offline.recipient")
    desk.fails("keymgmt seal model.xml m.sealed --to hsm:fleet --sign hsm:fleet")
    desk.follow(
        "backends/pkcs11",
        "keymgmt keys create PROVIDER:KEY --kind ecdsa-p256",
        PROVIDER="hsm",
        KEY="publisher",
    )
    desk.fails("keymgmt seal model.xml m.sealed --to hsm:publisher")
    desk.follow(
        "backends/pkcs11",
        "keymgmt keys create PROVIDER:KEY --kind aes256",
        PROVIDER="hsm",
        KEY="second",
    )
    desk.run("keymgmt seal model.xml m.sealed --to hsm:fleet --sign hsm:publisher")
    # Made by another tool, and good for too much.
    desk.run(
        f"pkcs11-tool --module {module} --token-label 'Model Keys' --login --pin $(cat hsm.pin) "
        "--keygen --key-type AES:32 --label wide --id 77 --private --sensitive "
        "--usage-decrypt --usage-wrap"
    )
    desk.fails("keymgmt seal model.xml n.sealed --to hsm:wide")
    desk.follow("backends/pkcs11", "keymgmt pkcs11 restrict PROVIDER:{}", PROVIDER="hsm")
    desk.run("keymgmt seal model.xml n.sealed --to hsm:wide")
    # Two keys that cannot be told apart.
    tool = f"pkcs11-tool --module {module} --token-label 'Model Keys' --login"
    for _ in range(2):
        desk.run(
            f"{tool} --pin $(cat hsm.pin) "
            "--keygen --key-type AES:32 --label twin --id 55 --private --sensitive --usage-decrypt"
        )
    desk.fails("keymgmt seal model.xml t.sealed --to hsm:twin")
    desk.typed = {"pkcs11-tool": ["27182818"]}
    words = {"LIBRARY.so": module, "LABEL": "'Model Keys'", "TYPE": "secrkey", "ID": "55"}
    desk.follow(
        "backends/pkcs11",
        "pkcs11-tool --module LIBRARY.so --token-label LABEL --login --type TYPE --id ID "
        "--set-id NEW",
        NEW="56",
        **words,
    )


def test_a_token_without_a_pin(desk, module):
    desk.make_token("tokens")
    desk.configure(table(module))
    tool = f"pkcs11-tool --module {module}"
    shown = desk.run(f"{tool} --list-token-slots").out
    slot = shown.partition("(0x")[2].partition(")")[0]
    desk.run(f"{tool} --init-token --slot 0x{slot} --label 'Model Keys' --so-pin 31415926")
    desk.fails("keymgmt doctor hsm")
    desk.typed = {f"{tool} --token-label": ["31415926", "27182818", "27182818"]}
    words = {"LIBRARY.so": module, "LABEL": "'Model Keys'"}
    desk.follow(
        "backends/pkcs11",
        "pkcs11-tool --module LIBRARY.so --token-label LABEL --login --login-type so --init-pin",
        **words,
    )
    desk.run("keymgmt doctor hsm")
