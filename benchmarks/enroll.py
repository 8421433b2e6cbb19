"""Enrolment of many devices at the office: folders of requests, then of responses.

    python benchmarks/enroll.py [--devices 10000]

One swtpm answers for all of them: its endorsement key, certified by a maker of our own, and one
key, challenged and certified anew for each device; its time is not counted. Both commands are fresh
processes, imports included; every recipient is signed with a key of the file backend. Needs
``swtpm``, and the backends tpm2 (with its device part) and file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._setup import set_up
from keymgmt_tpm2._templates import EK_PROFILES
from keymgmt_tpm2.enroll import _device, _exchange
from keymgmt_tpm2.enroll._office import ek_id
from measure import Run, add_json, finish, machine, table, timed

MAKER = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A maker")])


def issue(key: ec.EllipticCurvePrivateKey, public, subject, extensions) -> x509.Certificate:
    """A certificate by the maker."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(MAKER)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256())


def start(state: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A TPM emulator and how it is reached."""
    port = random.randrange(20000, 30000)
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"]
    command += ["--server", f"type=tcp,port={port},bindaddr=127.0.0.1"]
    command += ["--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"]
    process = subprocess.Popen([*command, "--flags", "not-need-init,startup-clear"])
    time.sleep(2)
    return process, f"swtpm:host=127.0.0.1,port={port}"


def device(root: Path, tcti: str) -> tuple[Tpm2Provider, _exchange.Request]:
    """A provider with one key, and its request; ``maker.pem`` is who certified the TPM."""
    first = Tpm2Settings(keys=root / "tpm-keys", tcti=tcti)
    with Tpm2Provider("tpm", first) as provider:
        name = set_up(provider, create=True).name
    pinned = Tpm2Settings(keys=root / "tpm-keys", tcti=tcti, srk_name=name)
    provider = Tpm2Provider("tpm", pinned)
    provider.create_key("dev", "ecc-p256", {})

    def look(tpm):
        return tpm.public_of(next(iter(_device._candidates(tpm, [EK_PROFILES["L-1"]]))))

    ek = provider.service.run("looking", look, seconds=60)
    key = ec.generate_private_key(ec.SECP256R1())
    ca = issue(key, key.public_key(), MAKER, [x509.BasicConstraints(ca=True, path_length=None)])
    (root / "maker.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    named = x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:41434D45")
    purpose = x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")])
    alternative = x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([named]))])
    certificate = issue(key, ek.key(), x509.Name([]), [alternative, purpose])
    request = _device.make_request(provider, "dev", certificate.public_bytes(Encoding.DER))
    return provider, request


def answer(provider: Tpm2Provider, folder: Path) -> None:
    """The responses of all devices, by one TPM; the secrets are taken from the state files."""
    version = provider.keys.read("dev").newest

    def certify(tpm) -> None:
        ak = _device.attestation_key(tpm)
        key, session = tpm.load(version.public, version.private), tpm.session()
        for path in folder.glob("*.state"):
            request, secret = _exchange.read_state(path.read_bytes())
            value = _exchange.answer_value(secret, request.digest)
            attest, signature = tpm.certify(key, ak, value, session)
            response = _exchange.write_response(attest, signature)
            path.with_suffix(".response").write_bytes(response)

    provider.service.run("answering", certify, seconds=3600)


def keymgmt(root: Path, *arguments: str) -> Run:
    """Run a command in a fresh process and measure it."""
    command = [sys.executable, __file__, "--run", *arguments]
    environment = {**os.environ, "KEYMGMT_CONFIG": str(root / "keymgmt.toml")}
    ran = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    *said, run = ran.stdout.splitlines()
    print(said[-1].decode() if said else "")
    return json.loads(run)


def main() -> None:
    """Run both commands and print the figures."""
    if sys.argv[1:2] == ["--run"]:
        sys.argv = ["keymgmt", *sys.argv[2:]]

        def work() -> None:
            from keymgmt.cli import main as command

            try:
                command()
            except SystemExit as end:
                if end.code:
                    raise

        print(json.dumps(timed(work)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        folder, state = root / "devices", root / "state"
        folder.mkdir()
        state.mkdir()
        (root / "keymgmt.toml").write_text('[providers.local]\nbackend = "file"\npath = "keys"\n')
        process, tcti = start(state)
        try:
            provider, request = device(root, tcti)
            for number in range(options.devices):
                (folder / f"d{number}.request").write_bytes(request.to_bytes())
            (root / "devices.csv").write_text(f"ek,key,name\n{ek_id(request.ek)},dev,press\n")
            keymgmt(root, "keys", "create", "local:enrolment", "--sign")
            enroll = ["tpm", "enroll"]
            asked = [*enroll, "challenge", "devices", "--ca", "maker.pem", "--json"]
            decided = ["--inventory", "devices.csv", "--any-policy", "--sign", "local:enrolment"]
            runs = {"challenge": keymgmt(root, *asked)}
            answer(provider, folder)
            provider.close()
        finally:
            process.kill()
            process.wait()
        accept = [*enroll, "accept", "devices", "--ca", "maker.pem", *decided, "--json"]
        runs["accept"] = keymgmt(root, *accept)
        runs["accept, all done before"] = keymgmt(root, *accept)
    rows = [[name, *(f"{run[what]:.2f}" for what in run)] for name, run in runs.items()]
    print(table([f"{options.devices} devices", "s", "CPU s", "peak MiB"], rows))
    about = machine("keymgmt", "keymgmt-tpm2", "cryptography", "pyopenssl")
    finish(options.json, about, {name: [run] for name, run in runs.items()})


if __name__ == "__main__":
    main()
