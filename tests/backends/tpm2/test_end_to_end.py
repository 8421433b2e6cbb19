"""From an empty TPM to a sealed model with the commands."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import programs
import pytest

import keymgmt.cli


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def site(tmp_path, swtpm, monkeypatch, capsys, check_output):
    """A machine: a TPM, a config with it and with keys in files, and the command line."""
    home = tmp_path / "site"
    home.mkdir()
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("KEYMGMT_CONFIG", str(home / "keymgmt.toml"))
    monkeypatch.chdir(home)
    return Site(home, swtpm, monkeypatch, capsys, check_output)


class Site:
    def __init__(self, home: Path, swtpm, monkeypatch, capsys, check_output) -> None:
        self.home, self.swtpm, self.check_output = home, swtpm, check_output
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.lines = {"tcti": f'"{swtpm.tcti}"', "keys": '"tpm-keys"', "timeout": "20"}
        self.extra = ""
        self.configure()

    def configure(self, extra: str | None = None, **lines: str) -> None:
        self.lines |= lines
        self.extra = self.extra if extra is None else extra
        table = "\n".join(f"{name} = {value}" for name, value in self.lines.items())
        local = '[providers.local]\nbackend = "file"\npath = "keys"\n'
        text = f'[providers.tpm]\nbackend = "tpm2"\n{table}\n\n{local}\n{self.extra}'
        (self.home / "keymgmt.toml").write_text(text)

    def run(self, *arguments: object, code: int = 0) -> Ran:
        """Run ``keymgmt ARGUMENTS`` in this process."""
        self.monkeypatch.setattr(sys, "argv", ["keymgmt", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            keymgmt.cli.main()
        ran = Ran(end.value.code or 0, *self.capsys.readouterr())
        assert ran.code == code, f"{arguments}: {ran}"
        if "--json" in arguments:
            self.check_output(ran.out)
        return ran

    def set_up(self) -> None:
        made = self.run("tpm", "setup", "tpm", "--create")
        assert "made the ECC storage root key at 0x81000001" in made.out
        name = made.out.splitlines()[-1].partition(" = ")[2]
        self.configure(srk_name=name)
        assert "the pinned name of the config" in self.run("tpm", "setup", "tpm").out

    def model(self) -> Path:
        folder = self.home / "model"
        folder.mkdir()
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 64)
        return folder

    def extend(self, index: int, data: bytes) -> None:
        """Measure something, as an update does."""
        from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings

        def operation(tpm):
            from tpm2_pytss import constants as c

            tpm.call("pcr_event", c.ESYS_TR.parse(f"pcr{index}"), data)

        settings = Tpm2Settings(keys=self.home / "tpm-keys", tcti=self.swtpm.tcti)
        with Tpm2Provider("tpm", settings) as provider:
            provider.service.run("measuring", operation, pinned=False)


def test_a_model_for_this_tpm_and_a_file_key_or_the_break_glass_key(site):
    site.set_up()
    site.run("keys", "create", "local:site")
    site.run("keys", "create", "local:breakglass")
    site.run("tpm", "policy", "approver", "approver.key")
    assert (site.home / "approver.key").stat().st_mode & 0o777 == 0o600
    created = site.run("keys", "create", "tpm:dev", "--option", "approver=approver.key.pub")
    assert "PCRs approved by" in created.out
    site.configure(extra="[policy]\nrequire_signature = false\n")
    site.model()
    groups = ["--to", "tpm:dev+local:site", "--to", "local:breakglass"]
    site.run("seal", "model", "m.sealed", "--name", "m", *groups)
    # The break-glass key lies in a safe, not on this machine: to this machine, which had it, it is
    # unavailable, and that is the exit code whatever the TPM says.
    safe = site.home / "safe.jwks"
    (site.home / "keys" / "breakglass.jwks").rename(safe)

    # Not yet: nobody approved this boot state.
    denied = site.run("unseal", "m.sealed", "out0", code=6)
    assert "none of its approver is installed" in denied.err

    values = site.run("tpm", "pcrs", "tpm", "--pcr", "7,8", "--json").out
    (site.home / "now.json").write_text(values)
    sign = ["tpm", "policy", "sign", "--key", "approver.key", "--pcr", "7,8"]
    raised = ["tpm", "counter", "sign", "--key", "approver.key", "--to"]
    site.run(*raised, "1", "start.raise")
    counter = site.run("tpm", "counter", "create", "tpm", "start.raise").out.strip()
    limit = ["--counter", f"0x01800100={counter}"]
    site.run(*sign, "--values", "now.json", *limit, "now.approval")
    site.run("tpm", "policy", "install", "tpm", "now.approval")
    site.run("unseal", "m.sealed", "out1")
    assert (site.home / "out1" / "weights.bin").read_bytes()[:3] == b"\0\1\2"

    # An update closes it, the next state approved before opens it again.
    state = json.loads(values)
    new = hashlib.sha256(
        bytes.fromhex(state["pcrs"]["8"]) + hashlib.sha256(b"kernel 2").digest()
    ).hexdigest()
    (site.home / "next.json").write_text(
        json.dumps({"bank": "sha256", "pcrs": state["pcrs"] | {"8": new}})
    )
    site.run(*sign, "--values", "next.json", *limit, "next.approval")
    site.extend(8, b"kernel 2")
    closed = site.run("unseal", "m.sealed", "out2", code=6)
    assert "PCR 8 of sha256 is" in closed.err
    doctor = site.run("doctor", code=1)
    assert "PCR 8" in doctor.out + doctor.err
    site.run("tpm", "policy", "install", "tpm", "next.approval")
    site.run("unseal", "m.sealed", "out2")
    listed = site.run("tpm", "policy", "list", "tpm").out
    assert "fits the present PCRs" in listed
    assert "PCR 8 of sha256 is" in listed

    # Raising the counter outdates both.
    site.run(*raised, str(int(counter) + 1), "next.raise")
    assert int(site.run("tpm", "counter", "raise", "tpm", "next.raise").out) == int(counter) + 1
    assert "outdated" in site.run("unseal", "m.sealed", "out3", code=6).err

    # Another TPM in its place, and the break-glass key out of the safe.
    site.swtpm.kill()
    assert site.run("unseal", "m.sealed", "out4", code=6)
    safe.rename(site.home / "keys" / "breakglass.jwks")
    site.run("unseal", "m.sealed", "out4")


def test_a_fleet_without_its_tpms(site, tmp_path):
    """The device exports a recipient file; the build machine has neither TPM nor this package."""
    site.set_up()
    site.run("keys", "create", "tpm:dev", "--option", "pcr=sha256:7")
    exported = site.run(
        "keys", "export", "tpm:dev", "--format", "recipient", "-o", "device7.recipient"
    )
    fingerprint = exported.err.strip().rpartition(" ")[2]
    build = tmp_path / "build"
    build.mkdir()
    (build / "keymgmt.toml").write_text("[policy]\nrequire_signature = false\n")
    (build / "model").mkdir()
    (build / "model" / "weights.bin").write_bytes(b"weights")
    # What stands for a machine without the package: importing it ends the process.
    program = (
        "import sys; sys.modules['keymgmt_tpm2'] = sys.modules['tpm2_pytss'] = None\n"
        "from keymgmt.cli import main; main()"
    )
    seal = [sys.executable, "-c", program, "-c", "keymgmt.toml", "seal", "model", "m.sealed"]
    seal += ["--name", "m", "--to", f"@{site.home}/device7.recipient"]
    refused = programs.run(*seal, cwd=build)
    assert refused.returncode == 4
    assert "read its fingerprint out" in refused.stderr
    sealed = subprocess.run([*seal, "--fingerprint", fingerprint], cwd=build, check=False)
    assert sealed.returncode == 0
    site.configure(extra="[policy]\nrequire_signature = false\n")
    site.run("unseal", build / "m.sealed", "out")
    assert (site.home / "out" / "weights.bin").read_bytes() == b"weights"


def test_doctor_says_what_opens_and_how_fast(site):
    site.set_up()
    site.run("keys", "create", "tpm:dev")
    site.run("keys", "create", "tpm:release", "--sign")
    site.run("keys", "create", "local:site")
    said = site.run("doctor").out
    for words in (
        "IBM",
        "specification revision 1.64",
        "PCR banks",
        "as pinned",
        "0 of 3 wrong tries",
        "3 objects",
        "without a resource manager",
        "its policy holds now",
    ):
        assert words in said, words


def test_the_provider_must_be_a_tpm(site):
    refused = site.run("tpm", "setup", "local", code=3)
    assert "of the backend file, not tpm2" in refused.err
    assert site.run("tpm", "pcrs", "tpm", "--pcr", "99", code=3)
    assert site.run("tpm", "counter", "show", "tpm", "--index", "0x40000001", code=3)


def test_slots_are_freed_on_request(site):
    site.set_up()
    assert site.run("tpm", "flush", "tpm", "--yes").out == "freed 0\n"
    flushed = json.loads(site.run("tpm", "flush", "tpm", "--yes", "--json").out)
    assert flushed == {"format": "keymgmt-tpm-flush/1", "freed": 0}


def test_counters_and_the_anchor_as_json(site):
    site.set_up()
    site.run("tpm", "policy", "approver", "approver.key")

    def run(*arguments):
        return json.loads(site.run("tpm", "counter", *arguments, "--json").out)

    sign = ["sign", "--key", "approver.key", "--index", "0x01800103", "--ref", "edge"]
    signed = run(*sign, "--to", 4, "a.raise")
    assert (signed["path"], signed["value"], signed["ref"]) == ("a.raise", 4, "edge")
    made = {"format": "keymgmt-tpm-counter/1", "index": "0x01800103", "value": 4}
    assert run("create", "tpm", "a.raise") == made
    run(*sign, "--to", 6, "b.raise")
    assert run("raise", "tpm", "b.raise") == made | {"value": 6}
    assert run("raise", "tpm", "a.raise") == made | {"value": 6}
    assert run("show", "tpm", "--index", "0x01800103") == made | {"value": 6}
    assert site.run("tpm", "counter", "show", "tpm", "--index", "0x01800103").out == "6\n"
    site.run("tpm", "counter", "show", "tpm", "--json", code=3)
    anchor = json.loads(site.run("tpm", "anchor", "create", "tpm", "--json").out)
    assert not anchor["moved"]
    made = {"moved_by": "whoever may use this TPM", "warning": None}
    site.configure(anchor=f'"{anchor["name"]}"')
    assert json.loads(site.run("tpm", "anchor", "show", "tpm", "--json").out) | made == anchor
    again = site.run("tpm", "anchor", "create", "tpm", "--again").out
    assert "the one that the config pins" in again


def test_a_tpm_key_approves_and_publishes(site):
    """An approver's key in a TPM, and a publisher's."""
    site.set_up()
    site.run("keys", "create", "tpm:approver", "--sign")
    site.run("keys", "create", "tpm:publisher", "--sign")
    site.run("keys", "export", "tpm:approver", "--format", "pem", "-o", "approver.pub")
    site.run("keys", "export", "tpm:publisher", "--format", "pem", "-o", "publisher.pub")
    site.run("keys", "create", "tpm:dev", "--option", "approver=approver.pub")
    (site.home / "now.json").write_text(site.run("tpm", "pcrs", "tpm", "--json").out)
    sign = ["tpm", "policy", "sign", "--key", "tpm:approver", "--pcr", "0,7"]
    site.run(*sign, "--values", "now.json", "now.approval")
    site.run("tpm", "policy", "install", "tpm", "now.approval")
    site.model()
    site.configure(extra='[policy]\npublishers = { "publisher.pub" = ["m"] }\n')
    sign[4] = "tpm:publisher"
    refused = site.run(*sign, "--values", "now.json", "mine.approval", code=3)
    assert "is a publisher's key" in refused.err
    site.run(
        "seal", "model", "m.sealed", "--name", "m", "--to", "tpm:dev", "--sign", "tpm:publisher"
    )
    site.run("unseal", "m.sealed", "out")


def test_a_damaged_approval_is_not_installed(site):
    site.set_up()
    site.run("tpm", "policy", "approver", "approver.key")
    (site.home / "now.json").write_text(site.run("tpm", "pcrs", "tpm", "--json").out)
    sign = ["tpm", "policy", "sign", "--key", "approver.key", "--pcr", "7"]
    site.run(*sign, "--values", "now.json", "now.approval")
    good = (site.home / "now.approval").read_bytes()
    for change, message in (
        (lambda d: d.update(format="x"), "has the format"),
        (lambda d: d["state"]["pcrs"].update({"7": "11" * 32}), "not signed by the key"),
        (lambda d: d["approver"].update(ref="other"), "not signed by the key"),
        (lambda d: d.update(signature="AAAA"), "is no approval"),
        (lambda d: d.pop("counter"), "is no approval"),
    ):
        data = json.loads(good)
        change(data)
        (site.home / "bad.approval").write_text(json.dumps(data))
        refused = site.run("tpm", "policy", "install", "tpm", "bad.approval", code=3)
        assert message in refused.err
    assert site.run("tpm", "policy", "list", "tpm").out == ""
    site.run("tpm", "policy", "install", "tpm", "now.approval")
    assert "fits the present PCRs" in site.run("tpm", "policy", "list", "tpm").out


def test_policies_as_json_and_an_approval_that_is_removed(site, check_formats):
    check_formats("keymgmt_tpm2")
    site.set_up()
    made = json.loads(site.run("tpm", "policy", "approver", "approver.key", "--json").out)
    assert made["public_key"] == "approver.key.pub"
    (site.home / "now.json").write_text(site.run("tpm", "pcrs", "tpm", "--json").out)
    sign = ["tpm", "policy", "sign", "--key", "approver.key", "--values", "now.json", "--json"]
    ids = []
    for pcrs in ("7", "0,7"):
        signed = json.loads(site.run(*sign, "--pcr", pcrs, f"{pcrs}.approval").out)
        assert signed["approver"] == made["approver"]
        assert set(signed["state"]["pcrs"]) == set(pcrs.split(","))
        ids.append(signed["id"])
    installed = site.run("tpm", "policy", "install", "tpm", "7.approval", "0,7.approval", "--json")
    assert [each["id"] for each in json.loads(installed.out)["installed"]] == ids
    (site.home / "tpm-keys" / "approvals" / f"{'0' * 64}.json").write_text("{")
    site.extend(0, b"a kernel")

    def listed():
        return json.loads(site.run("tpm", "policy", "list", "tpm", "--json").out)

    assert {each["id"]: each["fits"] for each in listed()["approvals"]} == {
        ids[0]: True,
        ids[1]: False,
    }
    assert listed()["damaged"] == ["0" * 64]
    assert f"{'0' * 16} cannot be read" in site.run("tpm", "policy", "list", "tpm").out
    remove = ["tpm", "policy", "remove", "tpm"]
    # All of them or none: one that is not here takes nothing away.
    assert "is no approval that is installed" in site.run(*remove, ids[0], "1" * 64, code=3).err
    assert "is no approval that is installed" in site.run(*remove, ids[0][:4], code=3).err
    assert len(listed()["approvals"]) == 2
    removed = json.loads(site.run(*remove, "7.approval", "0" * 16, "--json").out)
    assert removed["removed"] == [ids[0], "0" * 64]
    assert [each["id"] for each in listed()["approvals"]] == [ids[1]]
    assert listed()["damaged"] == []
    assert site.run(*remove, ids[1][:16]).out == f"removed {ids[1][:16]}\n"
    assert listed()["approvals"] == []


def test_an_approver_is_made_with_its_public_key_or_not_at_all(site):
    (site.home / "approver.key.pub").write_text("somebody's")
    assert "exists" in site.run("tpm", "policy", "approver", "approver.key", code=3).err
    assert not (site.home / "approver.key").exists()
    assert (site.home / "approver.key.pub").read_text() == "somebody's"


def test_an_approvers_key_that_others_can_read(site):
    site.run("tpm", "policy", "approver", "approver.key")
    (site.home / "approver.key").chmod(0o644)
    (site.home / "v.json").write_text('{"bank": "sha256", "pcrs": {"7": "' + "00" * 32 + '"}}')
    sign = ["tpm", "policy", "sign", "--key", "approver.key", "--pcr", "7", "--values", "v.json"]
    assert "others can use it" in site.run(*sign, "a", code=3).err
    (site.home / "approver.key").chmod(0o600)
    assert "does not have all of" in site.run(*[*sign, "a", "--pcr", "8"], code=3).err
    site.run(*sign, "a")
    assert "exists" in site.run(*sign, "a", code=3).err


def test_only_a_device_installs_what_is_built_from_source():
    needed = [each for each in requires("keymgmt-tpm2") or [] if each.startswith("tpm2-pytss")]
    assert needed
    assert all("extra == 'device'" in each.replace('"', "'") for each in needed)


def test_approvers_and_verifiers_need_no_tpm_libraries(tmp_path):
    """Approving boot states and vouching for devices is done on machines without a TPM."""
    program = (
        "import sys; sys.modules['tpm2_pytss'] = None\n"
        "import keymgmt_tpm2, keymgmt_tpm2._commands\n"
        "from keymgmt.cli import main; main()"
    )
    (tmp_path / "keymgmt.toml").write_text('[providers.tpm]\nbackend = "tpm2"\nkeys = "keys"\n')
    values = '{"bank": "sha256", "pcrs": {"7": "' + "00" * 32 + '"}}'
    (tmp_path / "values").write_text(values)
    (tmp_path / "request").write_text("{}")
    maker = Path(__file__).parents[2] / "wheels" / "office" / "maker.pem"
    (tmp_path / "ca.pem").write_bytes(maker.read_bytes())
    for arguments, code, said in (
        ("tpm policy approver approver.key", 0, "approver.key.pub"),
        ("tpm policy sign --key approver.key --pcr 7 --values values a", 0, "approved sha256:7"),
        ("tpm enroll challenge request -o c --state s --ca ca.pem", 4, "has no format"),
        ("tpm pcrs tpm", 3, "no srk_name"),
        ("tpm setup tpm", 6, "TPM libraries are not usable"),
    ):
        ran = programs.run_python(
            program,
            *arguments.split(),
            cwd=tmp_path,
            env=os.environ | {"KEYMGMT_CONFIG": str(tmp_path / "keymgmt.toml")},
        )
        assert ran.returncode == code, ran.stderr
        assert said in ran.stdout + ran.stderr


@pytest.mark.once
def test_the_question_for_a_pin_is_seen_whatever_asks(site, asks, verbs_that_ask, pin_file):
    site.set_up()
    site.configure(pins=f'{{ dev = {{ file = "{pin_file}" }} }}')
    site.run("keys", "create", "tpm:dev", "--option", "pin=yes")
    site.run("keys", "create", "local:publisher", "--sign")
    site.run("keys", "export", "local:publisher", "-o", "publisher.pem")
    site.model()
    asked = 'pins = { dev = { prompt = "PIN of the TPM" } }'
    trust = '[policy]\npublishers = { "publisher.pem" = ["*"] }\n'
    seal = '[seal]\nsign = "local:publisher"\nto = ["tpm:dev"]\n'
    site.configure(trust + seal, pins=asked.partition(" = ")[2])
    for verb in verbs_that_ask("tpm:dev"):
        # Wrapping takes the public part alone, and listing no key.
        if verb[0] in ("seal", "keys"):
            site.run(*verb)
        else:
            asks("PIN of the TPM: ", pin_file.read_text().strip(), *verb, cwd=site.home)


@pytest.mark.once
def test_a_command_that_is_stopped_prints_no_traceback(site, ends_quietly):
    site.set_up()
    ends_quietly("tpm", "pcrs", "tpm", cwd=site.home)
