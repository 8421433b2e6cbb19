"""What an unwrap with AWS KMS costs beyond botocore, and the import: ``python benchmarks/aws.py``.

A stub on loopback answers each request at once, in a process of its own. Raw botocore is what one
would write without keymgmt: one client, one call. Both are asked in turns.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from botocore.session import Session
from keymgmt_aws import AwsProvider, AwsSettings

from keymgmt.backend import WrappedKey

ROUNDS = 400
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def serve() -> None:
    body = json.dumps({"KeyId": ARN, "Plaintext": base64.b64encode(os.urandom(32)).decode()})
    kind = "Content-Type: application/x-amz-json-1.1"
    answer = f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            one, _ = listener.accept()
            if not os.fork():
                break
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    got = b""
    while data := one.recv(65536):
        got += data
        head_end = got.find(b"\r\n\r\n")
        if head_end < 0:
            continue
        length = int(got.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(got) >= head_end + 4 + length:
            got = b""
            one.sendall(answer)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    seconds = []
    for module in ("keymgmt.backend", "keymgmt.backend, keymgmt_aws", "botocore.session"):
        program = (
            f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        )
        runs = [subprocess.check_output([sys.executable, "-c", program]) for _ in range(5)]
        seconds.append(min(map(float, runs)))
    print(f"import: keymgmt_aws {seconds[1] - seconds[0]:.3f} s over keymgmt.backend's; ", end="")
    print(f"botocore, with the first call, {seconds[2]:.3f} s")
    with (
        subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        secret = Path(folder) / "secret"
        secret.touch(mode=0o600)
        secret.write_text("secret")
        auth = {"method": "static", "access_key_id": {"file": str(secret)}}
        auth["secret_access_key"] = {"file": str(secret)}
        settings = {"region": "eu-central-1", "endpoint": address, "auth": auth}
        settings["keys"] = {"model": {"arn": ARN}}
        provider = AwsProvider("cloud", AwsSettings.model_validate(settings))
        wrapped = WrappedKey(
            "aws", "model", ARN.rpartition("/")[2], "SYMMETRIC_DEFAULT", bytes(184)
        )
        client = Session().create_client(
            "kms",
            "eu-central-1",
            endpoint_url=address,
            aws_access_key_id="secret",
            aws_secret_access_key="secret",
        )
        context = {"keymgmt-context": "0" * 64}

        def raw() -> object:
            return client.decrypt(KeyId=ARN, CiphertextBlob=bytes(184), EncryptionContext=context)

        def ours() -> object:
            return provider.unwrap(wrapped, b"c")

        raw(), ours()
        times = [(milliseconds(raw), milliseconds(ours)) for _ in range(ROUNDS)]
        for name, values in zip(("raw botocore", "keymgmt"), zip(*times, strict=True), strict=True):
            low = statistics.quantiles(values, n=10)[0]
            print(f"{name:13} median {statistics.median(values):.3f} ms, tenth {low:.3f} ms")
        server.kill()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
