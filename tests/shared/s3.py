"""A server that speaks S3, on loopback: SeaweedFS."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
from loopback import free_port

USER, SECRET = "AKIDEXAMPLE", "s3cr3t-of-the-test"


@dataclass
class S3:
    """A running server with one bucket, and ways to put files into it.

    Attributes:
        address: of the server.
        bucket: the bucket's name.
        process: the server's.
    """

    address: str
    bucket: str
    process: subprocess.Popen[bytes]

    @property
    def store(self) -> Any:
        """The bucket as obstore has it."""
        from obstore.store import S3Store

        return S3Store(
            self.bucket,
            endpoint=self.address,
            region="us-east-1",
            access_key_id=USER,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
        )

    def put(self, folder: Path, at: str) -> None:
        """Copy a folder into the bucket."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                obstore.put(self.store, f"{at}/{path.relative_to(folder)}", path.read_bytes())

    def read(self, path: str) -> bytes:
        return bytes(obstore.get(self.store, path).bytes())


def serve_s3(program: Path, folder: Path, bucket: str = "models") -> S3:
    """Start a server whose data is below ``folder``; whoever calls ends its process."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": USER, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    # SeaweedFS has a gRPC port for each, which is 10000 above unless it is named.
    options = [f"-{name}.port={port}" for name, port in ports.items()]
    options += [f"-{name}.port.grpc={free_port()}" for name in ports]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-dir={folder}",
                "-s3",
                f"-s3.config={config}",
                "-s3.iam=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={folder}/s3.sock",
                f"-filer.localSocket={folder}/filer.sock",
                "-master.volumeSizeLimitMB=64",
                "-master.telemetry=false",
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
            cwd=folder,
        )
    server = S3(f"http://127.0.0.1:{ports['s3']}", bucket, process)
    end = time.monotonic() + 60
    while True:
        try:
            obstore.put(server.store, "ready", b"")  # which makes the bucket
        except obstore.exceptions.BaseError:
            if time.monotonic() > end or process.poll() is not None:
                process.kill()
                raise
            time.sleep(0.2)
        else:
            return server
