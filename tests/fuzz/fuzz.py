"""Coverage-guided fuzzing of every parser that reads bytes of strangers, with atheris.

The law: any bytes, in any file of a sealed model, either open or raise KeymgmtError, within bounded
memory and time.

    python tests/fuzz/fuzz.py manifest -max_total_time=1800 CORPUS
    python tests/fuzz/fuzz.py manifest crash-0123abcd

Targets: manifest, keys, signatures, recipient, payload, artifact (what a registry says). CORPUS is
a folder, made if missing and filled from the vectors; without one a temporary folder is. With a
file, that input alone is run. It needs atheris (PyPI) and this checkout's keymgmt; `make nightly`
runs every target for five minutes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["keymgmt", "rfc8785"]):
    from keymgmt._providers.recipient_file import Recipient
    from keymgmt._remote.artifact import Artifact, blob_of
    from keymgmt.errors import KeymgmtError
    from keymgmt.sealed.ciphertext import FileCiphertext
    from keymgmt.sealed.keys import UnlockPolicy
    from keymgmt.sealed.manifest import Manifest
    from keymgmt.sealed.payload import PayloadReader
    from keymgmt.sealed.signatures import Signatures

VECTORS = Path(__file__).parent.parent / "vectors" / "sealed"
KEY, AAD, SEGMENT = bytes(32), b"aad", 4096
SCRATCH = os.memfd_create("payload")


def manifest(data: bytes) -> None:
    parsed = Manifest.from_bytes(data)
    assert parsed.to_bytes() == data


def keys(data: bytes) -> None:
    parsed = UnlockPolicy.from_bytes(data)
    assert dataclasses.replace(parsed).to_bytes() == data


def signatures(data: bytes) -> None:
    parsed = Signatures.from_bytes(data)
    assert parsed.to_bytes() == data


def recipient(data: bytes) -> None:
    parsed = Recipient.from_bytes(data)
    assert parsed.to_bytes() == data


def payload(data: bytes) -> None:
    """The first two bytes are the size that the manifest says."""
    size, content = int.from_bytes(data[:2], "big"), data[2:]
    os.ftruncate(SCRATCH, 0)
    os.pwrite(SCRATCH, content, 0)
    buffer = bytearray(size)
    with PayloadReader(
        FileCiphertext(os.dup(SCRATCH)),
        size,
        key=KEY,
        aad=AAD,
        segment_length=SEGMENT,
        digest="blake3",
        root=None,
    ) as reader:
        try:
            reader.read_into(buffer)
        except KeymgmtError:
            assert not any(buffer)
            raise


def artifact(data: bytes) -> None:
    """What is read leads to blobs of SHA-256 alone."""
    for blob in Artifact.parse(data).files.values():
        assert blob.digest.startswith("sha256:")
        assert len(bytes.fromhex(blob.digest[7:])) == 32
        assert blob.size >= 0


TARGETS: dict[str, tuple[Callable[[bytes], None], str]] = {
    "manifest": (manifest, "manifest.json"),
    "keys": (keys, "keys.json"),
    "signatures": (signatures, "signatures.json"),
    "recipient": (recipient, ""),
    "payload": (payload, "payload/*.floe"),
    "artifact": (artifact, ""),
}


def seeds(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "payload":
        sys.path.append(str(VECTORS.parent))
        import whole_floe

        from keymgmt.floe import FloeParameters

        for size in (0, 1, SEGMENT - 32, SEGMENT - 31, 9000):
            sealed = whole_floe.encrypt(KEY, AAD, bytes(size), FloeParameters(SEGMENT))
            (folder / f"size-{size}").write_bytes(size.to_bytes(2, "big") + sealed)
    if name == "artifact":
        vector = VECTORS / "data_key_used_for_two_manifests" / "model.sealed" / "manifest.json"
        described = Manifest.from_bytes(vector.read_bytes())
        files = {"manifest.json": blob_of(b"a"), "payload/a.floe": blob_of(b"b")}
        (folder / "made").write_bytes(Artifact.make(described, files).data)
    if name == "recipient":
        from keymgmt._crypto.hpke import HPKE_KINDS, hpke_generate, hpke_public

        for kind in HPKE_KINDS:
            public = hpke_public(kind, hpke_generate(kind))
            made = Recipient(kind, "tpm2", "device7", "1", bytes(public), {"note": "a"})
            (folder / kind).write_bytes(made.to_bytes())
    for number, file in enumerate(VECTORS.glob(f"*/model.sealed/{TARGETS[name][1] or 'none'}")):
        if name != "payload" and file.stat().st_size < 65536:
            (folder / f"vector-{number}").write_bytes(file.read_bytes())


def main() -> None:
    name, *arguments = sys.argv[1:]
    target = TARGETS[name][0]
    folders = [a for a in arguments if not a.startswith("-")]
    corpus = Path(folders[0]) if folders else Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    if not corpus.is_file():
        seeds(name, corpus)
    options = [a for a in arguments if a.startswith("-")]

    def one(data: bytes) -> None:
        try:
            target(data)
        except KeymgmtError:
            return

    limits = ["-rss_limit_mb=1024", "-timeout=10", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
