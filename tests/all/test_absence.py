"""What is absent, cut, unreadable or of wrong modes on a machine, times each backend that has it.

It is the provider's failure: the next group opens the model, and it is said where machines look.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

KEYS = {"local": "local:backup", "hsm": "hsm:breakglass", "tpm": "tpm:dev", "site": "site:model"}
# From the site's folder and a provider's table to the table of a machine that lacks something.
Change = Callable[[Path, str], str]


def edited(pattern: str, replacement: str) -> Change:
    """The table with one place changed."""

    def change(_: Path, table: str) -> str:
        made, count = re.subn(pattern, replacement, table, count=1)
        assert count == 1, table
        return made

    return change


def copied(keys: str, spoil: Callable[[Path], object]) -> Change:
    """The table with a copy of its key folder, in which something was spoilt."""

    def change(folder: Path, table: str) -> str:
        shutil.rmtree(folder / "spoilt", ignore_errors=True)
        shutil.copytree(folder / keys, folder / "spoilt")
        spoil(folder / "spoilt")
        assert f'"{keys}"' in table
        return table.replace(f'"{keys}"', '"spoilt"')

    return change


def each(name: str, spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        files = [file for file in folder.rglob(f"{name}*") if file.is_file()]
        assert files
        for file in files:
            spoil(file)

    return change


def open_pin(folder: Path, table: str) -> str:
    shutil.copyfile(folder / "pin", folder / "open-pin")
    (folder / "open-pin").chmod(0o644)
    return edited('file = "pin"', 'file = "open-pin"')(folder, table)


def cut_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


# After a provider's own line, so that it stands in its table and not in a table below.
def setting(text: str) -> Change:
    return edited(r'(backend = "\w+"\n)', rf"\g<1>{text}\n")


OTHER_PACKAGE = setting('distribution = "keymgmt-other"')
GONE = "KEYMGMT_TEST_IS_NOT_SET"
ABSENT: dict[str, tuple[str, Change]] = {
    "no package for files": ("local", OTHER_PACKAGE),
    "no key folder": ("local", edited('"keys"', '"gone"')),
    "a key folder that others read": ("local", copied("keys", lambda keys: keys.chmod(0o755))),
    "a cut key file": ("local", copied("keys", each("backup", cut_file))),
    "a key file that others read": (
        "local",
        copied("keys", each("backup", lambda file: file.chmod(0o644))),
    ),
    "no package for HSMs": ("hsm", OTHER_PACKAGE),
    "no module": ("hsm", edited(r"libsofthsm2\.so", "libgone.so")),
    "no token": ("hsm", edited('"models"', '"another"')),
    "no PIN file": ("hsm", edited('file = "pin"', 'file = "gone"')),
    "a PIN file that others read": ("hsm", open_pin),
    "no variable with the PIN": ("hsm", edited('file = "pin"', f'env = "{GONE}"')),
    "no package for TPMs": ("tpm", OTHER_PACKAGE),
    "no folder of TPM keys": ("tpm", edited('"tpm-keys"', '"gone"')),
    "a cut file of a TPM key": ("tpm", copied("tpm-keys", each("dev", cut_file))),
    "no emulator": ("tpm", edited(r"port=\d+", "port=1")),
    "no TPM device": ("tpm", edited('tcti = ".*"', 'tcti = "device:/dev/tpm-is-gone"')),
    "no package for Vault": ("site", OTHER_PACKAGE),
    "no secret file": ("site", edited(r'\{ file = ".*?" \}', '{ file = "/gone/secret" }')),
    "no variable with the secret": ("site", edited(r'\{ file = ".*?" \}', f'{{ env = "{GONE}" }}')),
    "no server": ("site", edited(r':\d+"', ':1"')),
}


@pytest.fixture(scope="module", params=list(ABSENT))
def case(request) -> str:
    name: str = request.param
    return name


def test_every_backend_lacks_something():
    assert {provider for provider, _ in ABSENT.values()} == set(KEYS)


@pytest.mark.once
def test_what_is_absent_is_the_providers_failure(site, case):
    provider, change = ABSENT[case]
    other = "hsm" if provider == "local" else "local"
    model = f"lacks-{provider}.sealed"
    if not (site.folder / model).exists():
        groups = ["--to", KEYS[provider], "--to", KEYS[other]]
        site.run("seal", "model", model, "--name", "m", *groups, "--sign", "hsm:release")
    tables = change(site.folder, site.tables[provider]) + site.tables[other]
    assert tomllib.loads(tables)["providers"].keys() == {provider, other}
    proved = json.loads(site.run_with(tables, "verify", model, "--json"))
    assert proved["opened_by"] == [other]
    (failed,) = proved["failed"]
    assert failed["provider"] == provider
    assert failed["reason"]
    report = json.loads(site.run_with(tables, "doctor", "--json", code=1))
    broken = {f["subject"].split()[0] for f in report["findings"] if f["status"] == "failed"}
    assert broken == {provider}
