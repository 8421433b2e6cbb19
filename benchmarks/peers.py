"""keymgmt beside what one would use instead: CryptoTensors, tensorizer and age, on the same bytes.

    pip install -r benchmarks/requirements-peers.txt -e . -e backends/file
    python benchmarks/peers.py --plot docs/peers.svg
    python benchmarks/peers.py --size 4G --rounds 1

*fresh*: a new process opens the file and has all of it, verified, in its memory. *repeated*: the
median of three such loads in one process, after a first one. *seal*: from the plaintext file (age,
keymgmt) or from tensors in memory (CryptoTensors, tensorizer) to a new file, which keymgmt alone
writes through to the disk (fsync) before it ends.
``keymgmt signed`` checks the publisher's signature and every digest; ``keymgmt`` neither. age
writes to /dev/null, which flatters it; its own memory is not in the column of peaks.
"""

from __future__ import annotations

import argparse
import base64
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import (
    Run,
    add_json,
    add_touch,
    bars,
    finish,
    interleave,
    length,
    machine,
    median,
    speedup,
    table,
    timed,
)

TENSORS = 16


class Peer:
    """One way to keep a model sealed. ``directory`` holds ``plain/weights.bin`` and its results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plain = directory / "plain" / "weights.bin"

    def prepare(self) -> None:
        """Make keys, and read what sealing starts from; not timed."""

    def seal(self, target: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> object:
        """All of it, verified, in memory."""
        raise NotImplementedError


class Keymgmt(Peer):
    signed = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        from keymgmt import Config

        policy: dict[str, Any] = {"require_signature": False}
        if self.signed:
            policy = {"publishers": {"pub.pem": ["*"]}}
        data = {
            "providers": {"local": {"backend": "file", "path": str(directory / "keys")}},
            "policy": policy,
            "seal": {"sign": "local:publisher"},
        }
        self.config = Config(data, path=directory / "keymgmt.toml")

    def prepare(self) -> None:
        keys = self.directory / "keys"
        if keys.exists():
            return
        from keymgmt._crypto.signatures import PublicKey

        keys.mkdir(mode=0o700)
        provider: Any = self.config.provider("local")
        provider.create_key("model", "aes256", {})
        provider.create_key("publisher", "ed25519", {})
        pem = PublicKey(provider.public_key("publisher")).to_pem()
        (self.directory / "pub.pem").write_bytes(pem)

    def seal(self, target: Path) -> None:
        import keymgmt

        keymgmt.seal(self.plain.parent, target, to=["local:model"], keys=self.config)

    def load(self, path: Path) -> object:
        import keymgmt

        with keymgmt.open(path, keys=self.config) as model:
            (entry,) = model.manifest.files
            memory = mmap.mmap(-1, entry.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            model.read_into(entry.path, memory)
        return memory


class KeymgmtSigned(Keymgmt):
    signed = True


class CryptoTensors(Peer):
    def prepare(self) -> None:
        import cryptotensors
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        def text(data: bytes) -> str:
            return base64.b64encode(data).decode()

        public = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
        encryption = {"kty": "oct", "alg": "aes256gcm", "kid": "e", "k": text(bytes(32))}
        signing = {"kty": "okp", "alg": "ed25519", "kid": "s", "d": text(bytes(32))}
        signing["x"] = text(public)
        self.keys = {"enc_key": encryption, "sign_key": signing}
        cryptotensors.register_direct_key_provider(keys=[encryption, signing])

    def seal(self, target: Path) -> None:
        from cryptotensors.numpy import save_file

        save_file(self.tensors, target, config=self.keys)

    def load_tensors(self) -> None:
        import numpy as np

        whole = np.fromfile(self.plain, np.float32)
        parts = np.split(whole, TENSORS)
        self.tensors: Any = {f"t{i:02}": part for i, part in enumerate(parts)}

    def load(self, path: Path) -> object:
        from cryptotensors.numpy import load_file

        return load_file(path)


class Tensorizer(Peer):
    def prepare(self) -> None:
        import tensorizer

        self.key = bytes(range(32))
        self.parameters = tensorizer.EncryptionParams(self.key)

    def load_tensors(self) -> None:
        import numpy as np
        import torch

        parts = np.split(np.fromfile(self.plain, np.float32), TENSORS)
        self.tensors: Any = {f"t{i:02}": torch.from_numpy(part) for i, part in enumerate(parts)}

    def seal(self, target: Path) -> None:
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(target), encryption=self.parameters)
        serializer.write_state_dict(self.tensors)
        serializer.close()

    def load(self, path: Path) -> object:
        from tensorizer import DecryptionParams, TensorDeserializer

        found = TensorDeserializer(
            str(path), device="cpu", encryption=DecryptionParams.from_key(self.key)
        )
        return {name: found[name].detach() for name in list(found)}


class Age(Peer):
    def prepare(self) -> None:
        identity = self.directory / "age.key"
        if not identity.exists():
            subprocess.run(["age-keygen", "-o", identity], check=True, stderr=subprocess.DEVNULL)
        output = subprocess.run(["age-keygen", "-y", identity], check=True, capture_output=True)
        self.identity, self.recipient = identity, output.stdout.decode().strip()

    def seal(self, target: Path) -> None:
        subprocess.run(["age", "-r", self.recipient, "-o", target, self.plain], check=True)

    def load(self, path: Path) -> object:
        command = ["age", "-d", "-i", str(self.identity), str(path)]
        return subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


PEERS: dict[str, type[Peer]] = {
    "keymgmt": Keymgmt,
    "keymgmt signed": KeymgmtSigned,
    "cryptotensors": CryptoTensors,
    "tensorizer": Tensorizer,
    "age": Age,
}
KINDS = ("fresh", "repeated", "seal")


def run_case(directory: Path, kind: str, name: str) -> Run:
    peer = PEERS[name](directory)
    peer.prepare()
    path = directory / f"{name}.sealed"
    if kind == "seal":
        path = directory / "sealing"
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if isinstance(peer, CryptoTensors | Tensorizer):
            peer.load_tensors()
        return timed_with_children(lambda: peer.seal(path))
    run = timed_with_children(lambda: peer.load(path))
    if kind == "repeated":
        runs = [timed_with_children(lambda: peer.load(path)) for _ in range(3)]
        run = {what: statistics.median(run[what] for run in runs) for what in run}
    return run


def timed_with_children(work: Callable[[], object]) -> Run:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = timed(work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run["cpu"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return run


def check(directory: Path) -> None:
    """Every peer really gives the plaintext back."""
    import numpy as np

    whole = np.fromfile(directory / "plain" / "weights.bin", np.float32)
    for name, kind in PEERS.items():
        peer = kind(directory)
        peer.prepare()
        loaded: Any = peer.load(directory / f"{name}.sealed")
        if isinstance(loaded, mmap.mmap):
            same = np.array_equal(np.frombuffer(loaded, np.uint8), whole.view(np.uint8))
        elif isinstance(loaded, dict):
            parts = [np.asarray(loaded[key]).reshape(-1) for key in sorted(loaded)]
            same = np.array_equal(np.concatenate(parts).view(np.uint8), whole.view(np.uint8))
        else:
            same = loaded.returncode == 0
        if not same:
            raise SystemExit(f"{name} did not give the plaintext back")


def plot(path: Path, size: int, runs: dict[str, list[Run]]) -> None:
    titles = {
        "fresh": "load, new process",
        "repeated": "load, again in one process",
        "seal": "seal",
    }
    figures = {
        titles[kind]: {name: size / 1e9 / median(runs[f"{kind} {name}"]) for name in PEERS}
        for kind in KINDS
    }
    bars(path, figures, "GB/s", [name for name in PEERS if not name.startswith("keymgmt")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=length, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    add_touch(parser)
    add_json(parser)
    parser.add_argument("--plot", type=Path, help="write a bar chart (SVG)")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        directory, kind, name = options.case
        print(json.dumps(run_case(Path(directory), kind, name)))
        return

    with tempfile.TemporaryDirectory(prefix="peers-", dir=Path.cwd()) as text:
        directory = Path(text)
        (directory / "plain").mkdir()
        block = os.urandom(16 << 20)
        with (directory / "plain" / "weights.bin").open("wb") as file:
            for _ in range(options.size // len(block)):
                file.write(block)
        for name, kind in PEERS.items():
            started, peer = time.perf_counter(), kind(directory)
            peer.prepare()
            if isinstance(peer, CryptoTensors | Tensorizer):
                peer.load_tensors()
            peer.seal(directory / f"{name}.sealed")
            print(f"{name}: sealed in {time.perf_counter() - started:.1f} s", file=sys.stderr)
            del peer
        check(directory)
        cases = {
            f"{kind} {name}": [sys.executable, __file__, "--case", text, kind, name]
            for kind in KINDS
            for name in PEERS
        }
        runs = interleave(cases, options.rounds, touch=options.touch)

    rows = []
    for kind in KINDS:
        for name in PEERS:
            case = runs[f"{kind} {name}"]
            rows.append(
                [
                    kind,
                    name,
                    f"{options.size / 1e9 / median(case):.2f}",
                    f"{median(case, 'cpu'):.2f}",
                    f"{speedup(runs[f'{kind} keymgmt'], case):.2f}",
                    f"{speedup(runs[f'{kind} keymgmt signed'], case):.2f}",
                    f"{median(case, 'peak_mib'):.0f}",
                ]
            )
    head = ["what", "with", "GB/s", "CPU s", "keymgmt is x", "signed is x", "peak MiB"]
    print(table(head, rows))
    if options.plot:
        plot(options.plot, options.size, runs)
    about = machine("keymgmt", "cryptography", "cryptotensors", "tensorizer", "torch")
    finish(options.json, about | {"size": options.size, "touch": options.touch}, runs)


if __name__ == "__main__":
    main()
