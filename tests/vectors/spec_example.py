"""Prints section 13 of SPEC.md: every value of one small sealed model, from named inputs.

Uses `cryptography`, `blake3` and nothing of keymgmt, so that the text and the code meet only in the
test that compares them. Run: python tests/vectors/spec_example.py
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

F = b"keymgmt-sealed/1"
TYPE = b"application/vnd.keymgmt.manifest+json"


def u16(x: int) -> bytes:
    return x.to_bytes(2, "big")


def u32(x: int) -> bytes:
    return x.to_bytes(4, "big")


def parts(*items: bytes) -> bytes:
    return b"".join(u32(len(item)) + item for item in items)


def expand(key: bytes, info: bytes) -> bytes:
    return HKDFExpand(SHA256(), 32, info).derive(key)


def compact(value: object) -> bytes:
    """RFC 8785 for the values of this example: ASCII, sorted, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def pattern(name: str, length: int) -> bytes:
    """Inputs that look random and are not: SHA-256 of the name."""
    return hashlib.sha256(name.encode()).digest()[:length]


INPUTS = {
    "dek": pattern("dek", 32),
    "id": pattern("id", 16),
    "nonce": pattern("nonce", 16),
    "share_0": pattern("share 0", 32),
    "kek_left": pattern("kek left", 32),
    "kek_right": pattern("kek right", 32),
    "salt_left": pattern("salt left", 32),
    "salt_right": pattern("salt right", 32),
    "floe_iv": pattern("floe iv", 32),
    "segment_iv": pattern("segment iv", 12),
    "publisher_seed": pattern("publisher", 32),
    "plaintext": b"hello, model",
}


def compute(given: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every further value, and the files of the folder."""
    v = dict(given)
    path = b"model.bin"
    v["commitment"] = expand(v["dek"], parts(F, b"commitment", v["id"]))
    v["mac_key"] = expand(v["dek"], parts(F, b"keys mac", v["id"]))
    v["file_key"] = expand(v["dek"], parts(F, b"file", v["id"], path))
    v["aad"] = parts(F, b"payload", v["id"], path)

    # FLOE, one segment that is the last.
    parameters = bytes([0, 0]) + u32(4096) + u32(32)

    def floe_kdf(purpose: bytes, length: int) -> bytes:
        info = parameters + v["floe_iv"] + purpose + v["aad"]
        return HKDFExpand(SHA384(), length, info).derive(v["file_key"])

    v["header"] = parameters + v["floe_iv"] + floe_kdf(b"HEADER_TAG:", 32)
    v["message_key"] = floe_kdf(b"MESSAGE_KEY:", 48)
    info = parameters + v["floe_iv"] + b"DEK:" + bytes(8) + v["aad"]
    v["segment_key"] = HKDFExpand(SHA384(), 32, info).derive(v["message_key"])
    sealed = AESGCM(v["segment_key"]).encrypt(v["segment_iv"], v["plaintext"], bytes(8) + b"\1")
    v["segment"] = u32(len(sealed) + 16) + v["segment_iv"] + sealed
    v["leaf_0"] = blake3(b"\0" + v["header"]).digest()
    v["leaf_1"] = blake3(b"\0" + v["segment"]).digest()
    v["digest"] = blake3(b"\1" + v["leaf_0"] + v["leaf_1"]).digest()

    manifest = compact(
        {
            "format": F.decode(),
            "id": v["id"].hex(),
            "name": "example",
            "release": 1,
            "created": "2026-01-01T00:00:00Z",
            "profile": "default",
            "segment_length": 4096,
            "commitment": v["commitment"].hex(),
            "kind": "files",
            "main": None,
            "files": [
                {
                    "path": path.decode(),
                    "size": len(v["plaintext"]),
                    "digest": v["digest"].hex(),
                }
            ],
            "metadata": {},
        }
    )
    v["manifest_hash"] = hashlib.sha256(manifest).digest()

    v["share_1"] = bytes(a ^ b for a, b in zip(v["dek"], v["share_0"], strict=True))
    recipients = []
    for index, side in enumerate(("left", "right")):
        context = hashlib.sha256(
            parts(F, b"wrap", v["manifest_hash"], v["nonce"], u16(2) + u16(index))
        ).digest()
        info = b"keymgmt-file wrap 1" + parts(side.encode(), b"1", context)
        key = HKDF(SHA256(), 32, v[f"salt_{side}"], info).derive(v[f"kek_{side}"])
        blob = v[f"salt_{side}"] + AESGCM(key).encrypt(bytes(12), v[f"share_{index}"], context)
        v |= {f"context_{index}": context, f"wrap_key_{index}": key, f"blob_{index}": blob}
        recipients.append(
            {
                "backend": "file",
                "key": side,
                "version": "1",
                "mechanism": "HKDF-SHA256-A256GCM",
                "params": {},
                "blob": base64.b64encode(blob).decode(),
            }
        )
    body = {
        "format": "keymgmt-keys/1",
        "manifest": v["manifest_hash"].hex(),
        "groups": [{"nonce": v["nonce"].hex(), "recipients": recipients}],
    }
    v["mac"] = hmac.digest(v["mac_key"], compact(body), "sha256")

    publisher = Ed25519PrivateKey.from_private_bytes(v["publisher_seed"])
    v["public_key"] = publisher.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    v["keyid"] = hashlib.sha256(v["public_key"]).digest()
    v["signature"] = publisher.sign(
        b"DSSEv1 %d %s %d %s" % (len(TYPE), TYPE, len(manifest), manifest)
    )
    files = {
        "manifest.json": manifest,
        "keys.json": compact(body | {"mac": v["mac"].hex()}),
        "signatures.json": compact(
            {
                "payloadType": TYPE.decode(),
                "signatures": [
                    {
                        "keyid": v["keyid"].hex(),
                        "sig": base64.b64encode(v["signature"]).decode(),
                    }
                ],
            }
        ),
        "payload/model.bin.floe": v["header"] + v["segment"],
    }
    return v, files


def render() -> str:
    """The section's text."""
    values, files = compute(INPUTS)
    lines = [
        "One file, `model.bin`, of 12 bytes (`hello, model`), for the group of the two file keys",
        "`left` and `right` together. Inputs:",
        "",
        "```",
        *(f"{name} = {values[name].hex()}" for name in INPUTS),
        "```",
        "",
        "Computed, in this order:",
        "",
        "```",
        *(f"{name} = {value.hex()}" for name, value in values.items() if name not in INPUTS),
        "```",
    ]
    for name in ("manifest.json", "keys.json", "signatures.json"):
        lines += [
            "",
            f"`{name}`, one line without a line end:",
            "",
            "```json",
            files[name].decode(),
        ]
        lines += ["```"]
    lines += ["", "`payload/model.bin.floe` is `header || segment`."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render())  # noqa: T201
