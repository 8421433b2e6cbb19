"""TPM emulators, and what lies between them and a client."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import programs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from swtpm import Swtpm, free_ports, maker, message

import keymgmt.cli
from keymgmt.backend import SecretSource


class Wire:
    """What lies between a client and a TPM: records all, and may answer in the TPM's place.

    A context manager. ``intercept(command)`` returns a response, or None to ask the TPM.
    """

    def __init__(self, target: int) -> None:
        self.port = free_ports()
        self.recorded = bytearray()
        self.commands: list[int] = []
        self.intercept: Callable[[bytes], bytes | None] = lambda command: None
        self._target = target
        self._servers: list[socket.socket] = []

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def __enter__(self) -> Self:
        for offset, serve in ((0, self._data), (1, self._control)):
            server = socket.create_server(("127.0.0.1", self.port + offset))
            self._servers.append(server)
            threading.Thread(target=self._accept, args=(server, serve), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()

    def ask(self, command: bytes) -> bytes:
        """Ask the TPM over a connection of our own."""
        with socket.create_connection(("127.0.0.1", self._target)) as tpm:
            tpm.sendall(command)
            return message(tpm)

    def lose(self, code: int) -> list[bytes]:
        """From now on the TPM's first answer to that command is lost; returns where it is kept."""
        lost: list[bytes] = []

        def intercept(command: bytes) -> bytes | None:
            if int.from_bytes(command[6:10], "big") != code or lost:
                return None
            lost.append(self.ask(command))
            raise EOFError

        self.intercept = intercept
        return lost

    def _accept(self, server: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._guarded, args=(serve, client), daemon=True).start()

    def _guarded(self, serve: Callable[[socket.socket], None], client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            serve(client)

    def _data(self, client: socket.socket) -> None:
        tpm = None
        try:
            while True:
                command = message(client)
                self.recorded += command
                self.commands.append(int.from_bytes(command[6:10], "big"))
                answer = self.intercept(command)
                if answer is None:
                    # Connected late, so that a hook may start, stop or kill the TPM first.
                    tpm = tpm or socket.create_connection(("127.0.0.1", self._target))
                    tpm.sendall(command)
                    answer = message(tpm)
                self.recorded += answer
                client.sendall(answer)
        finally:
            if tpm is not None:
                tpm.close()

    def _control(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target + 1)) as tpm:
            while data := client.recv(4096):
                tpm.sendall(data)
                client.sendall(tpm.recv(4096))


@pytest.fixture
def make_wire() -> Iterator[Callable[[int], Wire]]:
    """Put a wire before the emulator at a port; closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(Wire(port))


@pytest.fixture
def wire(make_wire, swtpm) -> Wire:
    return make_wire(swtpm.port)


@pytest.fixture(scope="session")
def swtpm_program(require_tool) -> Path:
    return require_tool("swtpm", package="swtpm")


@pytest.fixture
def make_swtpm(swtpm_program, tmp_path) -> Iterator[Callable[[str], Swtpm]]:
    """Start emulators by name; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(Swtpm(swtpm_program, tmp_path / f"state-{name}"))


@pytest.fixture
def swtpm(make_swtpm) -> Swtpm:
    return make_swtpm("one")


@pytest.fixture
def set_up(tmp_path) -> Callable[..., Tpm2Settings]:
    """Make the storage root key of an emulator and return settings that pin it."""
    from keymgmt_tpm2._setup import set_up as make

    def settings(swtpm: Swtpm, **changes: object) -> Tpm2Settings:
        values: dict[str, object] = {"keys": tmp_path / "keys", "tcti": swtpm.tcti}
        with Tpm2Provider("tpm", Tpm2Settings(**values)) as provider:
            name = make(provider, create=True).name
        return Tpm2Settings(**(values | {"srk_name": name, "timeout": 5.0} | changes))

    return settings


@pytest.fixture
def unencrypted(monkeypatch) -> None:
    """Sessions without parameter encryption, to show that a search of the wire finds secrets."""
    from keymgmt_tpm2._connection.tpm import Tpm
    from tpm2_pytss import constants as c

    session = Tpm.session

    def plain(tpm, **options):
        made = session(tpm, **options)
        tpm.call("trsess_set_attributes", made, c.TPMA_SESSION.CONTINUESESSION)
        return made

    monkeypatch.setattr(Tpm, "session", plain)


@pytest.fixture
def settings(swtpm, set_up) -> Tpm2Settings:
    return set_up(swtpm)


@pytest.fixture
def sign_raise() -> Callable[..., object]:
    """Have an approver's key sign that counters are raised: ``sign_raise(key, 4) -> Raise``."""
    from keymgmt_tpm2.policy._counter import DEFAULT_INDEX, Raise
    from keymgmt_tpm2.policy._policy import Approver, Counter

    def make(key, to, *, index=DEFAULT_INDEX, ref=""):
        der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        sign = lambda message: key.sign(message, ec.ECDSA(hashes.SHA256()))  # noqa: E731
        return Raise.sign(Counter(index, to), Approver(der, ref), sign)

    return make


@pytest.fixture
def define_with_auth() -> Callable[..., object]:
    """Define an index as we do, but with an auth value: ``define_with_auth(tpm, index)``."""

    def define(tpm, index):
        from tpm2_pytss import constants as c
        from tpm2_pytss import types as t

        area = t.TPMS_NV_PUBLIC(
            nvIndex=index.number,
            nameAlg=c.TPM2_ALG.SHA256,
            attributes=c.TPMA_NV(index.attributes),
            authPolicy=index.policy,
            dataSize=index.size,
        )
        public, session = t.TPM2B_NV_PUBLIC(nvPublic=area), tpm.session()
        return tpm.call("nv_define_space", b"mine", public, c.ESYS_TR.OWNER, session1=session)

    return define


@pytest.fixture
def pin_file(tmp_path) -> Path:
    path = tmp_path / "pin"
    path.write_text("correct-pin-71\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def provider(settings) -> Iterator[Tpm2Provider]:
    with Tpm2Provider("tpm", settings) as made:
        yield made


@pytest.fixture(scope="session")
def manufactured(tmp_path_factory, require_tool):
    """State of a TPM whose endorsement key a maker certified, and the maker's certificates."""
    setup = require_tool("swtpm_setup", package="swtpm-tools")
    localca = require_tool("swtpm_localca", package="swtpm-tools")
    folder = tmp_path_factory.mktemp("maker")
    ca, state = folder / "ca", folder / "state"
    options = maker(ca, localca)
    state.mkdir()
    result = programs.run(setup, "--tpmstate", state, *options)
    log = (ca / "log").read_text() if (ca / "log").exists() else ""
    assert result.returncode == 0, f"{result.stderr}\n{log}"
    return state, ca


@pytest.fixture
def genuine(manufactured, make_swtpm, tmp_path, set_up, pin_file):
    """A provider of that TPM, with a fresh copy of its state."""
    state, _ = manufactured
    shutil.copytree(state, tmp_path / "state-genuine")
    settings = set_up(make_swtpm("genuine"), pin=SecretSource(file=pin_file))
    with Tpm2Provider("tpm", settings) as provider:
        provider.create_key("dev", "ecc-p256", {"pcr": "7"})
        yield provider


@pytest.fixture(scope="session")
def roots(manufactured):
    _, ca = manufactured
    pems = b"".join(path.read_bytes() for path in sorted(ca.glob("*cert.pem")))
    certificates = x509.load_pem_x509_certificates(pems)
    trusted = [c for c in certificates if c.issuer == c.subject]
    between = [c for c in certificates if c.issuer != c.subject]
    assert trusted
    return tuple([c.public_bytes(Encoding.DER) for c in group] for group in (trusted, between))


@pytest.fixture
def commands(genuine, tmp_path, monkeypatch, capsys, check_output):
    """``keymgmt ARGUMENTS`` on the device and where devices are vouched for, in one folder."""
    home = tmp_path / "both"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("KEYMGMT_CONFIG", str(home / "keymgmt.toml"))
    settings = genuine.settings
    (home / "keymgmt.toml").write_text(
        f'[providers.tpm]\nbackend = "tpm2"\nkeys = "{settings.keys}"\ntcti = "{settings.tcti}"\n'
        f'srk_name = "{settings.srk_name}"\n[providers.local]\nbackend = "file"\npath = "keys"\n'
        '[policy]\nattestation_signers = ["enrolment.pem"]\nrequire_attested = true\n'
        "require_signature = false\n"
    )

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["keymgmt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            keymgmt.cli.main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == code, f"{arguments}: {out} {err}"
        if "--json" in arguments:
            check_output(out)
        return out + err

    return home, run
