"""The pages and the hints of the TPM backend, on swtpm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eventlog import ACTION, event, log
from swtpm import free_ports, maker

pytest.importorskip("keymgmt_tpm2")
pytest.importorskip("keymgmt_file")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODEL = "echo net > resnet50.xml && echo weights > resnet50.bin"


@pytest.fixture
def tcti(desk: Any, require_tool: Callable[..., Path]) -> str:
    """How an emulated TPM is reached, by us and by tpm2-tools."""
    require_tool("swtpm", package="swtpm")
    require_tool("tpm2_pcrextend", package="tpm2-tools")
    made = desk.emulate_tpm("tpm")
    desk.variables["TPM2TOOLS_TCTI"] = made
    return made


def manufacture(desk: Any, require_tool: Callable[..., Path]) -> None:
    """The state of a TPM whose endorsement key a maker certified, and ``maker.pem``."""
    require_tool("swtpm_setup", package="swtpm-tools")
    localca = require_tool("swtpm_localca", package="swtpm-tools")
    ca = desk.folder / "ca"
    options = " ".join(maker(ca, localca))
    desk.run(f"mkdir tpm && swtpm_setup --tpmstate tpm {options} && cat {ca}/*cert.pem > maker.pem")


def event_log() -> bytes:
    """What a machine measured: one event for each of PCR 0, 2 and 7."""
    return log(*(event(index, ACTION, b"event") for index in (0, 2, 7)))


def configured(desk: Any, tcti: str, more: str = "") -> None:
    desk.configure(
        f'[providers.tpm]\nbackend = "tpm2"\nkeys = "tpm-keys"\ntcti = "{tcti}"\n{more}'
        "[policy]\nrequire_signature = false\n"
    )


def pinned(desk: Any) -> str:
    """The name of the root key, which a person copies."""
    found = re.search(r"000b[0-9a-f]{64}", desk.run("keymgmt tpm setup tpm --json").out)
    assert found
    return found[0]


def anchored(desk: Any, tcti: str) -> str:
    """The name of the anchor that was made, as tpm2-tools print it."""
    found = re.search(
        r"name: (000b[0-9a-f]{64})", desk.run(f"tpm2_nvreadpublic -T {tcti} 0x01800102").out
    )
    assert found, desk.last
    return found[1]


def told(desk: Any) -> str:
    """The fingerprint that the last command printed: a person reads it out."""
    found = re.search(r"fingerprint:? (\S+)", desk.last.said)
    assert found, desk.last
    return found[1]


def play(desk: Any) -> None:
    """The line that was printed is put into the table."""
    (line,) = re.findall(r"srk_name = .*", desk.last.out)
    desk.config.write_text(desk.config.read_text().replace('"play-keys"', f'"play-keys"\n{line}'))


def anew(desk: Any, tcti: str) -> None:
    """A config with the TPM alone."""
    configured(desk, tcti)
    configured(desk, tcti, f'srk_name = "{pinned(desk)}"\n')


def fleet(desk: Any, tcti: str) -> None:
    desk.run("rm -r resnet50.sealed")
    anew(desk, tcti)


def office(desk: Any) -> None:
    """What the office knows: its signing key, its devices, and the values of a good machine."""
    desk.configure('[providers.local]\nbackend = "file"\npath = "local"\n')
    enrolment = desk.config.parent / "enrolment.pem"
    for command in (
        "rm -r resnet50.sealed device7.recipient",
        "keymgmt keys create local:enrolment --sign",
        f"keymgmt keys export local:enrolment -o {enrolment}",
        "keymgmt tpm pcrs tpm --pcr 0,2,7 --json > reference.json",
        "mkdir before && cd before && keymgmt tpm enroll request tpm:dev -o request",
        "keymgmt tpm enroll challenge request -o challenge --state state --ca ../maker.pem",
    ):
        desk.run(command)
    ek = re.search(r"endorsement key ([0-9a-f]{64})", desk.last.out)
    assert ek
    desk.run("cd ..")
    (desk.work / "devices.csv").write_text(f"ek,key,name\n{ek[1]},dev,device 7\n")


def test_its_manual(desk: Any, require_tool: Callable[..., Path]) -> None:
    manufacture(desk, require_tool)
    tcti = desk.emulate_tpm("tpm")
    port = free_ports()
    configured(desk, tcti)
    desk.run(MODEL)
    (desk.work / "log").write_bytes(event_log())
    desk.stand_ins = {
        "000b9876543210fedcba9876543210fedcba9876543210fedcba9876543210fedcba": lambda: anchored(
            desk, tcti
        ),
        "000b0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef": lambda: pinned(
            desk
        ),
        "device:/dev/tpmrm0": tcti,
        "/etc/keymgmt/tpm-keys": str(desk.config.parent / "tpm-keys"),
        "/etc/systemd/tpm2-pcr-public-key.pem": "kernel.pem",
        "/media/safe/keys": str(desk.home / "keys"),
        "/sys/kernel/security/tpm0/binary_bios_measurements": "log",
        "--fingerprint 3f2a...": lambda: f"--fingerprint {told(desk)}",
        "2321": str(port),
        "2322": str(port + 1),
        "/var/lib/keymgmt/releases.json": str(desk.config.parent / "releases.json"),
    }
    desk.run_page(
        "docs/backends/tpm2.md",
        given={
            "keymgmt keys create play:dev --option pcr=sha256:16": lambda: play(desk),
            "Unified kernel images": "openssl genrsa 2048 | openssl rsa -pubout -out kernel.pem",
            "A release memory that a restored disk does not bring back": lambda: anew(desk, tcti),
            "A fleet": lambda: fleet(desk, tcti),
            "Attested devices": lambda: office(desk),
            "Many devices at once": "mkdir devices && cp request devices/device7.request",
            "keymgmt tpm enroll accept devices": "keymgmt tpm enroll respond tpm:dev "
            "devices/device7.challenge -o devices/device7.response",
        },
    )


def test_its_readme(desk: Any, tcti: str) -> None:
    configured(desk, tcti)
    desk.run("(umask 077; echo 271828 > pin)")
    desk.stand_ins = {
        "device:/dev/tpmrm0": tcti,
        '{ credential = "tpm-pin" }': f'{{ file = "{desk.work}/pin" }}',
        "000b0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef": lambda: pinned(
            desk
        ),
    }
    desk.run_page("backends/tpm2/README.md")


def test_its_hints(desk: Any, tcti: str) -> None:
    configured(desk, tcti)
    desk.run(MODEL)
    desk.fails("keymgmt doctor tpm")
    desk.run("keymgmt tpm setup tpm --create")
    desk.fails("keymgmt keys create tpm:dev")
    desk.follow("backends/tpm2", "keymgmt tpm setup {}")
    configured(desk, tcti, f'srk_name = "{pinned(desk)}"\n')
    desk.run("mkdir -m 700 ~/.config/keymgmt/tpm-keys && keymgmt doctor tpm")
    desk.follow("backends/tpm2", "keymgmt keys create {}:KEY", KEY="dev")
    desk.fails("keymgmt keys create tpm:dev")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    desk.fails("keymgmt seal resnet50.xml m.sealed --to tpm:other")
    desk.follow("backends/tpm2", "keymgmt keys create {}:{}")
    # Boot states, approved. PCR 23 is one that a program can change without a boot.
    desk.run("echo none > none.pem")
    desk.fails("keymgmt keys create tpm:boot --option approver=none.pem")
    desk.follow("backends/tpm2", "keymgmt tpm policy approver FILE", FILE="approver.key")
    desk.follow(
        "backends/tpm2", "keymgmt keys create P:KEY --option approver={}", P="tpm", KEY="boot"
    )
    desk.run("keymgmt tpm policy sign --help")
    desk.follow("backends/tpm2", "keymgmt tpm pcrs PROVIDER --json", PROVIDER="tpm")
    desk.run("keymgmt tpm pcrs tpm --pcr 23 --json > now.json")
    desk.run("keymgmt tpm policy sign now --key approver.key --pcr 23 --values now.json")
    desk.run("keymgmt seal resnet50.xml b.sealed --to tpm:boot")
    desk.fails("keymgmt verify b.sealed")
    desk.follow(
        "backends/tpm2", "keymgmt tpm policy install PROVIDER FILE", PROVIDER="tpm", FILE="now"
    )
    desk.run("keymgmt verify b.sealed")
    desk.run("tpm2_pcrextend 23:sha256=" + "11" * 32)
    desk.fails("keymgmt verify b.sealed")
    desk.run("keymgmt tpm pcrs tpm --pcr 23 --json > next.json", code=0)
    desk.fails("keymgmt verify b.sealed")
    desk.follow(
        "backends/tpm2",
        "keymgmt tpm policy sign APPROVAL --key FILE --pcr LIST",
        APPROVAL="next",
        FILE="approver.key",
        LIST="23 --values next.json",
    )
    desk.run("keymgmt tpm policy install tpm next && keymgmt verify b.sealed")
    desk.run("keymgmt tpm counter sign --key approver.key --to 3 a.raise")
    desk.fails("keymgmt tpm counter show tpm")
    made = {"PROVIDER": "tpm", "FILE": "a.raise"}
    desk.follow("backends/tpm2", "keymgmt tpm counter create PROVIDER FILE", **made)
    # An anchor, that somebody takes away.
    desk.fails("keymgmt tpm anchor show tpm")
    desk.follow("backends/tpm2", "keymgmt tpm anchor create {}:KEY", KEY="boot")
    srk = f'srk_name = "{pinned(desk)}"\n'
    name = anchored(desk, tcti)
    desk.fails("keymgmt tpm anchor create tpm")
    desk.follow("backends/tpm2", "keymgmt tpm anchor create {} --again", KEY="boot")
    configured(desk, tcti, f'{srk}anchor = "{name}"\n')
    desk.run("keymgmt tpm anchor show tpm && tpm2_nvundefine -C o 0x01800102")
    desk.fails("keymgmt tpm anchor show tpm")
    desk.follow("backends/tpm2", "keymgmt tpm anchor create {} --again")
    assert anchored(desk, tcti) == name  # no hint takes its policy away
    # A key of other PCRs than those of now.
    desk.run("keymgmt keys create tpm:bound --option pcr=23")
    desk.run("tpm2_pcrextend 23:sha256=" + "22" * 32)
    desk.fails("keymgmt tpm anchor create tpm:bound --again")
    desk.follow("backends/tpm2", "keymgmt keys rotate {}")
    desk.run("keymgmt tpm anchor create tpm:bound --again")
    # Names in the config that cannot be those of an anchor or of its index.
    configured(desk, tcti, f'{srk}anchor = "000b"\n')
    desk.fails("keymgmt tpm anchor show tpm")
    configured(desk, tcti, srk)
    made = {"PROVIDER": "tpm", "KEY": "bound --again"}
    desk.follow("backends/tpm2", "keymgmt tpm anchor create PROVIDER:KEY", **made)


def test_a_tpm_that_is_locked_full_or_gone(desk: Any, tcti: str) -> None:
    configured(desk, tcti)
    desk.run("keymgmt tpm setup tpm --create")
    configured(desk, tcti, f'srk_name = "{pinned(desk)}"\ntimeout = 3.0\n')
    desk.run("keymgmt keys create tpm:dev")
    # Other programs fill its slots, and give wrong passwords.
    desk.typed = {"keymgmt tpm flush": ["y"]}
    for _ in range(2):
        desk.run("tpm2_createprimary -Q -c primary")
    desk.fails("keymgmt doctor tpm")
    desk.follow("backends/tpm2", "keymgmt tpm flush {}")
    for _ in range(3):
        desk.run("tpm2_createprimary -Q -c primary")
    desk.fails("keymgmt keys create tpm:full")
    desk.follow("backends/tpm2", "keymgmt tpm flush PROVIDER", PROVIDER="tpm")
    desk.run("tpm2_createprimary -Q -c primary && tpm2_flushcontext -t")
    desk.run("echo s | tpm2_create -Q -C primary -p right -i - -u public -r private -c object")
    for _ in range(5):
        desk.run("tpm2_flushcontext -t; ! tpm2_unseal -c object -p wrong")
    desk.fails("keymgmt tpm flush tpm --yes && keymgmt doctor tpm")
    clear = {"PROVIDER": "tpm"}
    desk.follow("backends/tpm2", "keymgmt tpm setup PROVIDER --clear-lockout", **clear)
    desk.run("keymgmt doctor tpm")
    desk.running[-1].kill()
    desk.fails("keymgmt keys create tpm:second")
    # Another TPM in its place, that nobody has set up.
    configured(desk, desk.emulate_tpm("new"), f'srk_name = "000b{"11" * 32}"\n')
    desk.fails("keymgmt keys create tpm:second")
    desk.follow("backends/tpm2", "keymgmt tpm setup PROVIDER", PROVIDER="tpm --create")
