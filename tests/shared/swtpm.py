"""A TPM emulator: an swtpm process with its own state, started, stopped, hung and restarted."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

from waiting import until


def maker(folder: Path, localca: Path) -> list[str]:
    """Options by which swtpm_setup makes a TPM whose endorsement key a maker certified.

    The maker's certificates come to be in ``folder``, which is made.
    """
    folder.mkdir()
    (folder / "options").write_text(
        "--platform-manufacturer ACME\n--platform-version 2.1\n--platform-model Test\n"
    )
    (folder / "localca.conf").write_text(
        f"statedir={folder}\nsigningkey={folder}/signkey.pem\n"
        f"issuercert={folder}/issuercert.pem\ncertserial={folder}/certserial\n"
    )
    (folder / "setup.conf").write_text(
        f"create_certs_tool={localca}\ncreate_certs_tool_config={folder}/localca.conf\n"
        f"create_certs_tool_options={folder}/options\nactive_pcr_banks=sha256\n"
    )
    options = ["--tpm2", "--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256"]
    return [*options, "--config", f"{folder}/setup.conf", "--logfile", f"{folder}/log"]


def free_ports() -> int:
    """The first of two free consecutive ports, which swtpm's TCTI wants."""
    for _ in range(200):
        port = random.randrange(20000, 30000)
        with contextlib.ExitStack() as stack:
            try:
                for number in (port, port + 1):
                    bound = stack.enter_context(socket.socket())
                    bound.bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free consecutive ports")


class Swtpm:
    """One emulated TPM. A context manager; its state outlives ``stop`` and ``kill``."""

    def __init__(self, program: Path, state: Path) -> None:
        self.program, self.state = program, state
        self.port = free_ports()
        self.process: subprocess.Popen[bytes] | None = None
        state.mkdir(parents=True, exist_ok=True)

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def start(self) -> None:
        command = [str(self.program), "socket", "--tpm2", "--tpmstate", f"dir={self.state}"]
        command += ["--server", f"type=tcp,port={self.port},bindaddr=127.0.0.1"]
        command += ["--ctrl", f"type=tcp,port={self.port + 1},bindaddr=127.0.0.1"]
        command += ["--flags", "not-need-init,startup-clear"]
        said = self.state / "stderr"
        with said.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file)
        until(self._answers, said=said.read_text)

    def _answers(self) -> bool:
        """That it listens is not enough: it answers once both of its ports are served."""
        assert self.process is not None
        assert self.process.poll() is None, (self.state / "stderr").read_text()
        with (
            contextlib.suppress(OSError, EOFError),
            socket.create_connection(("127.0.0.1", self.port), 5) as data,
        ):
            data.sendall(bytes.fromhex("80010000000a0000017c"))  # TPM2_GetTestResult
            message(data)
            return True
        return False

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``hang`` and ``kill``; may be called at any time."""
        if self.process is None or self.process.poll() is not None:
            self.kill()
            self.start()
        else:
            self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def message(stream: socket.socket) -> bytes:
    """Read one command or response of a TPM."""
    head = _exactly(stream, 10)
    return head + _exactly(stream, int.from_bytes(head[2:6], "big") - 10)


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data
