"""Folders of requests and responses: what is done, what is refused, and what goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from keymgmt_tpm2.enroll import _batch
from keymgmt_tpm2.enroll._device import make_request, respond
from keymgmt_tpm2.enroll._office import ek_id

from keymgmt.backend import Recipient

COUNT = 4


@pytest.fixture
def office(commands, manufactured, genuine):
    """A folder of requests; keymgmt; and its arguments for the two steps of the office."""
    home, run = commands
    _, ca = manufactured
    makers = [text for path in sorted(ca.glob("*cert.pem")) for text in ("--ca", path)]
    run("keys", "create", "local:enrolment", "--sign")
    run("keys", "export", "local:enrolment", "--format", "pem", "-o", "enrolment.pem")
    folder = home / "devices"
    folder.mkdir()
    request = make_request(genuine, "dev")
    for number in range(COUNT):
        (folder / f"d{number}.request").write_bytes(request.to_bytes())
    (home / "devices.csv").write_text(f"ek,key,name\n{ek_id(request.ek)},dev,press 4\n")
    decided = ["--inventory", "devices.csv", "--any-policy", "--sign", "local:enrolment"]
    accept = ["tpm", "enroll", "accept", "devices", *makers, *decided, "--json"]
    challenge = ["tpm", "enroll", "challenge", "devices", *makers, "--json"]
    return folder, run, challenge, accept


def answer(genuine, folder):
    for path in sorted(folder.glob("*.challenge")):
        path.with_suffix(".response").write_bytes(respond(genuine, "dev", path.read_bytes()))


def lines(said: str) -> list[dict]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def counts(said: str) -> tuple:
    last = lines(said)[-1]
    word = "challenged" if "challenged" in last else "accepted"
    return last[word], last["before"], last["failed"]


def attested(folder, name: str) -> bool:
    """Whether the recipient of that name is one that build machines take."""
    recipient = Recipient.load(folder / f"{name}.recipient")
    return recipient.attributes["name"] == "press 4" and (folder / f"{name}.recipient.sig").exists()


def test_a_folder_from_requests_to_recipients(office, genuine):
    folder, run, challenge, accept = office
    assert counts(run(*challenge)) == (COUNT, 0, 0)
    assert (folder / "d0.state").stat().st_mode & 0o777 == 0o600
    assert counts(run(*challenge)) == (0, COUNT, 0)
    answer(genuine, folder)
    said = lines(run(*accept))
    assert counts(json.dumps(said[-1])) == (COUNT, 0, 0)
    assert all(line["format"] == "keymgmt-tpm-enroll/1" for line in said)
    assert [line["path"] for line in said[:-1]] == [f"devices/d{n}.response" for n in range(COUNT)]
    one = Recipient.load(folder / "d0.recipient")
    assert said[0]["fingerprint"] == one.fingerprint
    assert said[0]["attributes"] == dict(one.attributes)
    assert not list(folder.glob("*.state"))
    assert all(attested(folder, f"d{number}") for number in range(COUNT))
    # Neither step does anything a second time.
    assert counts(run(*accept)) == (0, COUNT, 0)
    assert counts(run(*challenge)) == (0, COUNT, 0)
    assert not list(folder.glob("*.state"))
    (folder / "m").mkdir()
    (folder / "m" / "weights").write_bytes(b"weights")
    run("seal", "devices/m", "m.sealed", "--name", "m", "--to", "@devices/d3.recipient")


def test_who_has_not_answered_yet_is_told(office, genuine):
    folder, run, challenge, accept = office
    said = run(*challenge[:-1])
    assert said.count("challenged, endorsement key ") == COUNT
    answer(genuine, folder)
    (folder / "d1.response").unlink()
    said = run(*accept)
    assert counts(said) == (COUNT - 1, 0, 0)
    assert lines(said)[-1]["waiting"] == 1
    assert [line["path"] for line in lines(said) if line.get("state") == "waiting"] == [
        "devices/d1.request"
    ]
    assert "refused 0, not answered yet 1" in run(*accept[:-1])


def test_one_bad_file_names_itself_and_does_not_stop_the_others(office, genuine):
    folder, run, challenge, accept = office
    (folder / "d1.request").write_bytes(b"{")
    os.mkfifo(folder / "pipe.request")
    said = run(*challenge, code=4)
    assert counts(said) == (COUNT - 1, 0, 2)
    failed = [line for line in lines(said) if line.get("state") == "failed"]
    assert [line["path"] for line in failed] == ["devices/d1.request", "devices/pipe.request"]
    assert failed[0]["error"]["class"] == "FormatError"
    answer(genuine, folder)
    (folder / "d2.response").write_bytes((folder / "d3.response").read_bytes())
    (folder / "stranger.response").write_bytes(b"{}")
    said = run(*accept, code=4)
    assert counts(said) == (COUNT - 2, 0, 2)
    failed = {line["path"]: line["error"] for line in lines(said) if line.get("state") == "failed"}
    assert "not to this challenge" in failed["devices/d2.response"]["message"]
    assert "state" in failed["devices/stranger.response"]["message"]
    assert not (folder / "d2.recipient").exists()
    assert attested(folder, "d0")
    # The next run tries what failed again, and nothing else.
    (folder / "d2.response").write_bytes(
        respond(genuine, "dev", (folder / "d2.challenge").read_bytes())
    )
    assert counts(run(*accept, code=4)) == (1, 2, 1)


# On a machine without the TPM's library, as an office has it.
KILLED = """
import os, sys
sys.modules["tpm2_pytss"] = None
from keymgmt_tpm2.enroll import _batch
save, left = _batch.save_file, int(sys.argv.pop(1))
def dying(*arguments, **options):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    save(*arguments, **options)
_batch.save_file = dying
from keymgmt.cli import main
main()
"""


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_killed_between_two_files_goes_on(office, genuine, after):
    folder, run, challenge, accept = office
    command = [sys.executable, "-c", KILLED, str(after)]
    for step, made in ((challenge, "challenge"), (accept, "recipient")):
        if made == "recipient":
            answer(genuine, folder)
        ended = subprocess.run(
            [*command, *step], cwd=folder.parent, capture_output=True, check=False
        )
        assert ended.returncode == 9
        # What is there is whole: no recipient that nobody vouches for.
        for path in folder.glob("*.recipient"):
            assert attested(folder, path.stem)
        assert counts(run(*step))[2] == 0
        assert len(list(folder.glob(f"*.{made}"))) == COUNT
    assert all(attested(folder, f"d{number}") for number in range(COUNT))
    assert not list(folder.glob("*.state"))


def test_what_somebody_else_put_there_is_left_alone(office, genuine):
    folder, run, challenge, accept = office
    run(*challenge)
    answer(genuine, folder)
    (folder / "d0.recipient").write_text("somebody's")
    (folder / "d1.recipient.sig").write_text("somebody's")
    said = run(*accept, code=4)
    assert counts(said) == (COUNT - 2, 0, 2)
    assert (folder / "d0.recipient").read_text() == "somebody's"
    assert not (folder / "d0.recipient.sig").exists()
    assert (folder / "d1.recipient.sig").read_text() == "somebody's"
    assert not (folder / "d1.recipient").exists()


def test_a_signature_of_another_key_that_was_left_is_not_taken(office, genuine):
    """It lies where a killed run would have left the office's own."""
    folder, run, challenge, accept = office
    run("keys", "create", "local:other", "--sign")
    run(*challenge)
    answer(genuine, folder)
    other = [text if text != "local:enrolment" else "local:other" for text in accept]
    kept = (folder / "d0.state").read_bytes()
    run(*other)
    (folder / "d0.recipient").unlink()
    (folder / "d0.state").write_bytes(kept)
    (folder / "d0.state").chmod(0o600)
    said = lines(run(*accept, code=4))
    assert "d0.recipient.sig exists" in said[0]["error"]["message"]
    assert not (folder / "d0.recipient").exists()


def test_a_signer_that_fails_stops_the_batch_and_leaves_nothing(office, genuine):
    folder, run, challenge, accept = office
    run(*challenge)
    answer(genuine, folder)
    nobody = [text if text != "local:enrolment" else "local:nobody" for text in accept]
    run(*nobody, code=3)
    assert not list(folder.glob("*.recipient*"))
    assert len(list(folder.glob("*.state"))) == COUNT


def test_the_office_decides_before_a_folder_is_read(office):
    _, run, challenge, accept = office
    undecided = [text for text in accept if text != "--any-policy"]
    assert "which policy must the key have?" in run(*undecided, code=3)
    assert "named after its request" in run(*challenge, "-o", "x", "--state", "y", code=3)
    one = run("tpm", "enroll", "challenge", "devices/d0.request", *challenge[4:-1], code=3)
    assert "takes --output FILE and --state FILE" in one


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
    from keymgmt_tpm2.enroll._certificates import Makers

    from keymgmt.backend import ConfigError

    with pytest.raises(ConfigError, match="cannot read the folder"):
        list(_batch.challenge_all(tmp_path / "missing", Makers([])))
