"""SPEC.md's worked example: our code computes its numbers, and opens its folder."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import re
from pathlib import Path

import pytest

from keymgmt import inspect
from keymgmt._crypto.dek import Dek
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed import derive
from keymgmt.sealed.ciphertext import FileCiphertext
from keymgmt.sealed.folder import SealedFolder
from keymgmt.sealed.keys import UnlockPolicy
from keymgmt.sealed.manifest import Manifest, manifest_hash
from keymgmt.sealed.payload import PayloadReader
from keymgmt.sealed.signatures import Signatures, signed_bytes

MODEL = Path(__file__).parent.parent / "vectors" / "sealed" / "worked_example" / "model.sealed"
SPEC = importlib.resources.files("keymgmt.sealed").joinpath("SPEC.md").read_text()
VALUES = {
    name: bytes.fromhex(value)
    for name, value in re.findall(r"^(\w+) = ([0-9a-f]*)$", SPEC, re.MULTILINE)
}
JSON = dict(re.findall(r"^`([\w.]+\.json)`, one line.*?```json\n(.*?)\n```", SPEC, re.M | re.S))


def test_our_code_computes_the_same():
    dek, model_id = Dek(VALUES["dek"]), VALUES["id"]
    manifest = Manifest.from_bytes(JSON["manifest.json"].encode())
    assert derive.commitment(dek, model_id) == VALUES["commitment"] == manifest.commitment
    assert derive.file_key(dek, model_id, "model.bin") == VALUES["file_key"]
    assert derive.payload_aad(model_id, "model.bin") == VALUES["aad"]
    digest = manifest_hash(JSON["manifest.json"].encode())
    assert digest == VALUES["manifest_hash"]
    for index in range(2):
        context = derive.wrap_context(digest, VALUES["nonce"], 2, index)
        assert context == VALUES[f"context_{index}"]
    policy = UnlockPolicy.from_bytes(JSON["keys.json"].encode())
    policy.check_mac(dek, model_id)
    assert dataclasses.replace(policy).to_bytes() == JSON["keys.json"].encode()
    signatures = Signatures.from_bytes(JSON["signatures.json"].encode())
    assert signatures.signatures[0].signature == VALUES["signature"]
    assert signed_bytes(JSON["manifest.json"].encode()).startswith(
        b"DSSEv1 37 application/vnd.keymgmt.manifest+json 443 {"
    )


def test_our_code_opens_the_folder():
    assert inspect(MODEL).groups == (("file:a@1", "file:b@1"),)
    descriptor = os.open(MODEL / "payload/model.bin.floe", os.O_RDONLY)
    with PayloadReader(
        FileCiphertext(descriptor),
        12,
        key=VALUES["file_key"],
        aad=VALUES["aad"],
        segment_length=4096,
        digest="blake3",
        root=VALUES["digest"],
    ) as reader:
        content = bytearray(12)
        reader.read_into(content)
    assert content == VALUES["plaintext"] == b"hello, model"


@pytest.mark.parametrize("created", ["2026-00-01", "2026-01-00", "2026-13-01", "\u0662026-01-01"])
def test_created_is_a_day_in_ascii(created):
    text = JSON["manifest.json"].replace("2026-01-01", created)
    with pytest.raises(FormatError):
        Manifest.from_bytes(text.encode())


def test_what_is_in_the_way_of_a_small_file_is_named(tmp_path):
    (tmp_path / "keys.json").mkdir()
    with SealedFolder(tmp_path) as folder, pytest.raises(ConfigError, match=r"keys\.json is not a"):
        folder.replace("keys.json", b"{}")
