"""A second reader of sealed models, written from keymgmt/sealed/SPEC.md; [n] is a section of it.

It knows AES keys of the backend `file`, and publishers' of Ed25519 and ML-DSA-65; all is in memory.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

FORMAT, DAMAGED = "not of this format", "damaged or forged"  # [9]
UNSIGNED, LOCKED = "not signed by a trusted publisher", "not openable with the keys at hand"
KEK = "file HKDF-SHA256-A256GCM {}"  # of a backend, for a mechanism
F, TYPE = b"keymgmt-sealed/1", b"application/vnd.keymgmt.manifest+json"
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
canonical = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# Canonical JSON has one spelling and one order, so a regular expression says what it may be [3].
ID, HASH, NUMBER, CHAR = '"[0-9a-f]{32}"', '"[0-9a-f]{64}"', "[0-9]+", r'([^"\\]|\\u.{4}|\\[^u])'
NAME = r'"(?![^"]*\.\.)[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?"'
VERSION = r'"(?![^"]*\.\.)[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"'
TIME = '"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3])(:[0-5][0-9]){2}Z"'
PART = r'(?![ ]|(?i:con((in|out)\$)?|prn|aux|nul|(com|lpt)[0-9¹²³])[./"])[^/\\:*?"<>|]+(?<![ .])'
MANIFEST = rf"""{{"commitment":{HASH},"created":{TIME},"files":\[({{"digest":{HASH},
"path":"{PART}(/{PART}){{0,31}}","size":{NUMBER}}},?){{1,16384}}\],"format":"keymgmt-sealed/1",
"id":{ID},"kind":"[a-z0-9]([a-z0-9-]{{0,30}}[a-z0-9])?","main":(null|"{CHAR}*"),"metadata":{{
("{CHAR}{{0,64}}":"{CHAR}{{0,4096}}",?){{0,64}}}},"name":{NAME},"profile":"(default|fips)",
"release":{NUMBER},"segment_length":({"|".join(str(2**n) for n in range(12, 23))})}}"""
BASE64 = "(X{4}){0,2730}(X[AQgw]==|X{2}[AEIMQUYcgkosw048]=)?".replace("X", "[A-Za-z0-9+/]")
RECIPIENT = rf"""{{"backend":"[a-z0-9]([a-z0-9_-]{{0,30}}[a-z0-9])?","blob":"(?!"){BASE64}",
"key":{NAME},"mechanism":"[A-Za-z0-9][A-Za-z0-9._+-]{{0,63}}","params":
{{("[a-z][a-z0-9_]{{0,31}}":"[A-Za-z0-9._=+/-]{{0,256}}",?){{0,8}}}},"version":{VERSION}}}"""
KEYS = rf"""{{"format":"keymgmt-keys/1","groups":\[({{"nonce":{ID},
"recipients":\[({RECIPIENT},?){{1,16}}\]}},?){{1,16384}}\],"mac":{HASH},"manifest":{HASH}}}"""
SIGNATURES = rf"""{{"payloadType":"{re.escape(TYPE.decode())}",
"signatures":\[({{"keyid":{HASH},"sig":"{BASE64}"}},?){{0,16}}\]}}"""


def need(good: object, where: str, kind: str = FORMAT) -> None:
    """Ends with the kind of fault [9] and where it is, if all is not good."""
    if not good:
        sys.exit(f"refused: {kind}: {where}")


def listing(*items: bytes) -> bytes:
    """`list` [1]."""
    return b"".join(len(item).to_bytes(4) + item for item in items)


def expand(key: bytes, info: bytes, size: int = 32, hash_: str = "sha256") -> bytes:
    """HKDF-Expand [1, 6], whose first block is all that is ever needed."""
    return hmac.digest(key, info + b"\1", hash_)[:size]


def read(path: Path, most: int = sys.maxsize) -> bytes:
    """A regular file and no link, of at most so many bytes [2]; nothing, if it is missing."""
    with suppress(FileNotFoundError), os.fdopen(os.open(path, OPEN), "rb") as file:
        status = os.fstat(file.fileno())
        need(stat.S_ISREG(status.st_mode) and status.st_size <= most, path.name)
        return file.read(status.st_size)
    return b""


def parse(data: bytes, pattern: str, name: str) -> dict:
    """One of the three files [3]; no larger number is in the range."""
    value = json.loads(
        data.decode(),
        object_pairs_hook=lambda p: dict(sorted(p, key=lambda m: m[0].encode("utf-16-be"))),
        parse_int=lambda digits: range(2**53).index(int(digits)),
    )
    good = canonical(value).encode() == data and re.fullmatch(pattern, data.decode(), re.VERBOSE)
    need(good, f"{name} is not canonical, or has other members or values")
    return value


def check_files(manifest: dict, payload: Path) -> None:
    """What no pattern says of paths [3.2]; and nothing else may lie in payload/ [2]."""
    paths = [file["path"] for file in manifest["files"]]
    for path in paths:
        short = len(path.encode()) <= 1024 and all(len(p.encode()) <= 250 for p in path.split("/"))
        need(short and path.isprintable() and normalize("NFC", path) == path, repr(path))
    need(paths == sorted(paths, key=str.encode) and manifest["main"] in (None, *paths), "paths")
    folded = {Path(normalize("NFC", path.casefold())) for path in paths}
    taken = folded | {path.with_name(path.name + ".floe") for path in folded}
    folders = {folder for path in folded for folder in path.parents}
    need(len(folded) == len(paths) and not folders & taken, "paths that collide")
    kinds = {Path(path + ".floe"): stat.S_IFREG for path in paths}
    kinds |= {folder: stat.S_IFDIR for path in kinds for folder in path.parents}
    for entry in (payload, *payload.rglob("*")):
        kind = kinds.get(entry.relative_to(payload))
        need(stat.S_IFMT(entry.lstat().st_mode) == kind, f"payload/{entry.name}")


def unlock(keys: dict, id_: bytes, commitment: bytes, keks: dict[str, bytes]) -> bytes:
    """The data key, from the first group that opens [5] and meets the commitment [4]."""
    for group in keys["groups"]:
        dek, count = bytes(32), len(group["recipients"]).to_bytes(2)
        bound = F, b"wrap", bytes.fromhex(keys["manifest"]), bytes.fromhex(group["nonce"])
        with suppress(KeyError, ValueError, InvalidTag):
            for i, one in enumerate(group["recipients"]):
                context = hashlib.sha256(listing(*bound, count + i.to_bytes(2))).digest()
                kek = keks["{backend} {mechanism} {key}@{version}".format_map(one)]  # [5.1, 5.2]
                names, blob = (one["key"], one["version"]), base64.b64decode(one["blob"])
                info = b"keymgmt-file wrap 1" + listing(*map(str.encode, names), context)
                key = expand(hmac.digest(blob[:32], kek, "sha256"), info)
                share = AESGCM(key).decrypt(bytes(12), blob[32:], context)
                dek = bytes(a ^ b for a, b in zip(dek, share, strict=True))
            if hmac.compare_digest(expand(dek, listing(F, b"commitment", id_)), commitment):
                return dek
    return sys.exit(f"refused: {LOCKED}: keys.json")


def decrypt(folder: Path, manifest: dict, dek: bytes, file: dict, publishers: dict) -> bytes:
    """The plaintext of a payload file [6]."""
    path, size, length = file["path"], file["size"], manifest["segment_length"]
    data = read(folder / "payload" / f"{path}.floe")
    need(len(data) == 74 + size + 32 * max(1, -(-size // (length - 32))), path, DAMAGED)
    header, segments = data[:74], [data[i : i + length] for i in range(74, len(data), length)]
    need(header[:10] == bytes(2) + length.to_bytes(4) + (32).to_bytes(4), path)
    hash_ = {"default": blake3.blake3, "fips": hashlib.sha256}[manifest["profile"]]
    tree = [hash_(b"\0" + leaf).digest() for leaf in (header, *segments)]
    while len(tree) > 1:  # an odd one goes up as it is
        pairs = [tree[i : i + 2] for i in range(0, len(tree), 2)]
        tree = [hash_(b"\1" + b"".join(p)).digest() if len(p) == 2 else p[0] for p in pairs]
    need(not publishers or tree[0].hex() == file["digest"], path, DAMAGED)
    names = bytes.fromhex(manifest["id"]), path.encode()
    iv, aad = header[:42], listing(F, b"payload", *names)
    key, plain = expand(dek, listing(F, b"file", *names)), []
    tag = expand(key, iv + b"HEADER_TAG:" + aad, 32, "sha384")
    need(hmac.compare_digest(tag, header[42:]), path, DAMAGED)
    key = expand(key, iv + b"MESSAGE_KEY:" + aad, 48, "sha384")
    for n, segment in enumerate(segments):
        final = n == len(segments) - 1
        need(segment[:4] == (len(segment).to_bytes(4) if final else b"\xff" * 4), path, DAMAGED)
        cipher = AESGCM(expand(key, iv + b"DEK:" + (n >> 20 << 20).to_bytes(8) + aad, 32, "sha384"))
        plain.append(cipher.decrypt(segment[4:16], segment[16:], n.to_bytes(8) + bytes([final])))
    return b"".join(plain)


def open_model(folder: Path, keks: dict[str, bytes], publishers: dict) -> dict[str, bytes]:
    """The plain files, in the order of trust [8]; if there are publishers, one must have signed."""
    raw, signed = read(folder / "manifest.json", 2**24), read(folder / "signatures.json", 2**18)
    manifest = parse(raw, MANIFEST, "manifest.json")
    signatures = parse(signed, SIGNATURES, "signatures.json")["signatures"] if signed else []
    need(len({one["keyid"] for one in signatures}) == len(signatures), "signatures.json")
    check_files(manifest, folder / "payload")
    trusted, message = not publishers, b"DSSEv1 %d %s %d %s" % (len(TYPE), TYPE, len(raw), raw)
    for one in signatures:  # [7]; another kind of key than is known here verifies nothing
        with suppress(KeyError, InvalidSignature, TypeError):
            publishers[one["keyid"]].verify(base64.b64decode(one["sig"]), message)
            trusted = True
    need(trusted, "signatures.json", UNSIGNED)
    keys = parse(read(folder / "keys.json", 2**26), KEYS, "keys.json")
    need(sum(len(group["recipients"]) for group in keys["groups"]) <= 16384, "keys.json")
    need(keys["manifest"] == hashlib.sha256(raw).hexdigest(), "keys.json", DAMAGED)
    id_, mac = bytes.fromhex(manifest["id"]), bytes.fromhex(keys.pop("mac"))
    dek = unlock(keys, id_, bytes.fromhex(manifest["commitment"]), keks)
    key, body = expand(dek, listing(F, b"keys mac", id_)), canonical(keys).encode()
    need(hmac.compare_digest(hmac.digest(key, body, "sha256"), mac), "keys.json", DAMAGED)
    return {f["path"]: decrypt(folder, manifest, dek, f, publishers) for f in manifest["files"]}


def main() -> None:
    """Opens a sealed model into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kek", nargs="+", action="extend", default=[], help="KEY@VERSION=HEX")
    parser.add_argument("--publisher", nargs="+", action="extend", default=[], help="KEY.pem")
    args = parser.parse_args()
    try:
        need(not args.out.exists(), str(args.out), "not a new folder")
        keks = {KEK.format(n): bytes.fromhex(k) for n, k in (t.split("=") for t in args.kek)}
        keys = [load_pem_public_key(Path(path).read_bytes()) for path in args.publisher]
        ders = (key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for key in keys)
        ids = [hashlib.sha256(der).hexdigest() for der in ders]  # [3.4]
        files = open_model(args.model, keks, dict(zip(ids, keys, strict=True)))
        args.out.mkdir(mode=0o700)
        for path, plain in files.items():
            (args.out / path).parent.mkdir(parents=True, exist_ok=True)
            (args.out / path).write_bytes(plain)
    except (InvalidTag, ValueError, OSError, RecursionError) as error:
        sys.exit(f"refused: {DAMAGED if isinstance(error, InvalidTag) else FORMAT}")


if __name__ == "__main__":
    main()
