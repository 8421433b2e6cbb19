"""Debian's ``docker-registry`` on loopback, and skopeo, which reads what is in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from loopback import Authority, free_port
from waiting import until_it_listens


@dataclass
class RegistryServer:
    """Debian's ``docker-registry``; TLS, and with ``users`` a login.

    Attributes:
        host: with its port, as it stands in a location.
        root: where it keeps its blobs.
        log: what it wrote; each request is a line of it.
    """

    host: str
    root: Path
    log: Path
    ca_file: Path
    process: subprocess.Popen[bytes]

    def requests(self, pattern: str) -> list[str]:
        """Requests that were answered, as the log has them."""
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]

    def bytes(self) -> int:
        """How much it keeps."""
        return sum(file.stat().st_size for file in self.root.rglob("data"))

    def skopeo(self, *arguments: str) -> str:
        """What skopeo says, which knows nothing of us."""
        certificates = self.root.parent / "certificates"
        certificates.mkdir(exist_ok=True)
        shutil.copy(self.ca_file, certificates / "ca.crt")
        kinds = ("--src-cert-dir", "--dest-cert-dir") if arguments[0] == "copy" else ("--cert-dir",)
        trust = [f"{kind}={certificates}" for kind in kinds]
        command = ["skopeo", arguments[0], *trust, *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        """End it; its blobs stay."""
        self.process.terminate()
        self.process.wait(30)


def serve_registry(
    program: Path, folder: Path, authority: Authority, auth: str = ""
) -> RegistryServer:
    """Start a registry that keeps its blobs in ``folder``; ``auth`` is that of its config."""
    port = free_port()
    certificate, key = authority.issue(f"registry-{port}")
    (folder / "config.yml").write_text(
        "version: 0.1\nlog:\n  accesslog:\n    disabled: false\n"
        f"storage:\n  filesystem:\n    rootdirectory: {folder / 'blobs'}\n"
        f"  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n"
        f"  tls:\n    certificate: {certificate}\n    key: {key}\n{auth}"
    )
    log = folder / "log"
    with log.open("wb") as file:
        command = [program, "serve", folder / "config.yml"]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    until_it_listens(port, process, log.read_text)
    return RegistryServer(f"127.0.0.1:{port}", folder / "blobs", log, authority.ca_file, process)
