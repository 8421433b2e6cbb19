"""A second reader of sealed models, written from keymgmt/sealed/SPEC.md.

Every requirement that the document numbers is a call of `must` or `holds` with its number. It knows
keys of the backend `file`, and publishers' of every kind; all is in memory. `--values` prints what
section 13 lists.
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
from datetime import UTC, datetime
from pathlib import Path
from unicodedata import normalize

import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import (
    ec,
    ed25519,
    mldsa,
    mlkem,
    padding,
    rsa,
    x25519,
)
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

FORMAT, DAMAGED, EXPIRED = "not of this format", "damaged or forged", "expired"  # section 9
UNSIGNED, LOCKED = "not signed by a trusted publisher", "not openable with the keys at hand"
OLD = "an older release than accepted"

F = b"keymgmt-sealed/1"
MANIFEST_TYPE = "application/vnd.keymgmt.manifest+json"
EXPIRY_TYPE = "application/vnd.keymgmt.expiry+json"
BOUNDS = {"manifest.json": 1 << 24, "keys.json": 1 << 26, "signatures.json": 1 << 18}

# Section 4.1. A recipient or signature of None is any.
CNSA2 = ["AES-GCM", "AES-KW", "AES-KWP", "HKDF-SHA384-A256GCM", "aes256-gcm96", "hpke-mlkem1024"]
FIPS = [*CNSA2, "hpke-p256", "hpke-p384", "RSA-OAEP-256"]
PROFILES = {
    "default": (blake3.blake3, None, None),
    "fips": (hashlib.sha256, FIPS, None),
    "cnsa2": (hashlib.sha384, CNSA2, mldsa.MLDSA87PublicKey),
}

NAME = r"(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?"
BACKEND = "[a-z0-9]([a-z0-9_-]{0,30}[a-z0-9])?"
VERSION = r"(?!.*\.\.)[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"
TIME = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3])(:[0-5][0-9]){2}Z"
DEVICE = re.compile(r"(con|prn|aux|nul|con(in|out)\$|(com|lpt)[0-9¹²³])(\..*)?", re.I | re.A)

VALUES: dict[str, bytes] = {}


def must(number: str, good: object, where: str, kind: str = FORMAT) -> None:
    """A requirement of SPEC.md: ends with the kind of fault and where it is, if it is not met."""
    if not good:
        sys.exit(f"refused: {kind}: {where} [{number}]")


def holds(_number: str, good: bool) -> bool:
    """The same where something is passed over: a signature or a recipient that does not count."""
    return good


def keep(name: str, value: bytes) -> bytes:
    """A value of section 13."""
    VALUES[name] = value
    return value


def digest(data: bytes) -> bytes:
    """`H` (section 1)."""
    return hashlib.sha384(data).digest()


def listing(*items: bytes) -> bytes:
    """`list` (section 1)."""
    return b"".join(len(item).to_bytes(4) + item for item in items)


def expand(key: bytes, info: bytes, size: int = 48) -> bytes:
    """HKDF-Expand-SHA-384, whose first block is all that is ever needed."""
    return hmac.digest(key, info + b"\1", "sha384")[:size]


def canonical(value: object) -> bytes:
    """RFC 8785 of a value whose members are in order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def in_order(pairs: list) -> dict:
    """Members by their UTF-16 code units, the last of one name."""
    return dict(sorted(pairs, key=lambda pair: pair[0].encode("utf-16-be")))


# --- section 2: the folder ---------------------------------------------------------------------


def read(folder: Path, name: str) -> bytes | None:
    """A file of the folder, or None where it is missing."""
    path = folder
    for part in name.split("/"):
        path /= part
        must("M2", not path.is_symlink(), name)
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            must("M1", stat.S_ISREG(status.st_mode), name)
            must("M5", status.st_size <= BOUNDS.get(name, sys.maxsize), name)
            return file.read(status.st_size)
    return None


def check_listing(payload: Path, paths: list[str]) -> None:
    """Nothing but the listed files and their folders."""
    must("M4", payload.is_dir(), "payload/")
    kinds = {Path(path + ".floe"): stat.S_IFREG for path in paths}
    kinds |= {folder: stat.S_IFDIR for path in kinds for folder in path.parents}
    for entry in payload.rglob("*"):
        kind = stat.S_IFMT(entry.lstat().st_mode)
        must("M3", kinds.get(entry.relative_to(payload)) == kind, entry.name)


# --- section 3: the three JSON files -----------------------------------------------------------


def parse(data: bytes, name: str) -> dict:
    """An object in its canonical form."""
    value = json.loads(data.decode(), object_pairs_hook=in_order)
    must("M6", canonical(value) == data, name)
    return value


def members(value: dict, names: str) -> None:
    """Those that are named, and no others."""
    must("M7", set(value) == set(names.split()), str(names))


def text(number: str, value: object, pattern: str, where: str) -> None:
    """A string that the pattern describes."""
    must(number, isinstance(value, str) and re.fullmatch(pattern, value), where)


def bits(number: str, value: object, most: int, where: str, least: int = 0) -> bytes:
    """What canonical base64 stands for; as far as it does, where this was not checked."""
    good = isinstance(value, str) and re.fullmatch("[A-Za-z0-9+/]*={0,2}", value)
    with suppress(ValueError):
        data = base64.b64decode(str(value), validate=True)
        same = base64.b64encode(data).decode() == value
        must(number, good and same and least <= len(data) <= most, where)
        return data
    must(number, False, where)
    return b""


def check_manifest(value: dict) -> None:
    """Section 3.1."""
    members(
        value,
        "commitment created files format id kind main metadata name profile release segment_length",
    )
    must("M8", value["format"] == F.decode(), "format")
    text("M9", value["id"], "[0-9a-f]{32}", "id")
    text("M10", value["name"], NAME, "name")
    number = value["release"]
    must("M11", type(number) is int and 0 <= number < 2**53, "release")
    text("M12", value["created"], TIME, "created")
    must("M13", value["profile"] in PROFILES, "profile")
    must("M14", value["segment_length"] in [2**n for n in range(12, 23)], "segment_length")
    text("M15", value["commitment"], "[0-9a-f]{96}", "commitment")
    text("M16", value["kind"], "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", "kind")
    files, metadata = value["files"], value["metadata"]
    must("M18", isinstance(files, list) and 1 <= len(files) <= 16384, "files")
    size = 2 * profile(value)[0]().digest_size
    for file in files:
        members(file, "digest path size")
        most = min(2**53 - 1, 2**40 * (value["segment_length"] - 32))
        must("M20", type(file["size"]) is int and 0 <= file["size"] <= most, "size")
        text("M21", file["digest"], f"[0-9a-f]{{{size}}}", "digest")
        check_path(file["path"])
    paths = [file["path"] for file in files]
    must("M17", value["main"] in (None, *paths), "main")
    order = [path.encode() for path in paths]
    must("M19", order == sorted(set(order)), "the order of files")
    check_collisions(paths)
    must("M22", isinstance(metadata, dict) and len(metadata) <= 64, "metadata")
    for name, said in metadata.items():
        good = len(name) <= 64 and isinstance(said, str) and len(said) <= 4096
        must("M22", good, "metadata")


def profile(manifest: dict) -> tuple:
    """Its hash of the trees, its recipients and its signatures."""
    return PROFILES.get(manifest["profile"], PROFILES["default"])


def check_path(path: str) -> None:
    """Section 3.2."""
    parts = path.split("/")
    must("M23", 1 <= len(path.encode()) <= 1024, path)
    must("M24", normalize("NFC", path) == path, repr(path))
    must("M25", len(parts) <= 32, path)
    for part in parts:
        must("M26", 1 <= len(part.encode()) <= 250 and part not in (".", ".."), path)
        must("M27", part[:1] != " " and part[-1:] not in (" ", "."), path)
        must("M28", not DEVICE.fullmatch(part), path)
    must("M29", path.isprintable(), repr(path))
    must("M30", not set(path) & set('\\:*?"<>|'), path)


def check_collisions(paths: list[str]) -> None:
    """No two mean one file on any system."""
    folded = [Path(normalize("NFC", path.casefold())) for path in paths]
    must("M31", len(set(folded)) == len(paths), "paths that are equal in another case")
    taken = {*folded, *(path.with_name(path.name + ".floe") for path in folded if path.name)}
    folders = {folder for path in folded for folder in path.parents}
    must("M32", not folders & taken, "a path that is a file and a folder")


def check_keys(value: dict) -> None:
    """Section 3.3."""
    members(value, "format groups mac manifest")
    must("M33", value["format"] == "keymgmt-keys/1", "format of keys.json")
    text("M34", value["manifest"], "[0-9a-f]{96}", "manifest in keys.json")
    groups = value["groups"]
    must("M35", isinstance(groups, list) and groups, "groups")
    count = sum(len(group["recipients"]) for group in groups)
    must("M36", count <= 16384, "recipients")
    for group in groups:
        members(group, "nonce recipients")
        text("M37", group["nonce"], "[0-9a-f]{32}", "nonce")
        several = group["recipients"]
        must("M38", isinstance(several, list) and 1 <= len(several) <= 16, "recipients of a group")
        for one in several:
            members(one, "backend blob key mechanism params version")
            text("M39", one["backend"], BACKEND, "backend")
            text("M40", one["key"], NAME, "key")
            text("M41", one["version"], VERSION, "version")
            text("M42", one["mechanism"], "[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", "mechanism")
            must("M43", len(one["params"]) <= 8, "params")
            for name, said in one["params"].items():
                text("M43", name, "[a-z][a-z0-9_]{0,31}", "params")
                text("M43", said, "[A-Za-z0-9._=+/-]{0,256}", "params")
            one["blob"] = bits("M44", one["blob"], 8192, "blob", 1)
    text("M45", value["mac"], "[0-9a-f]{96}", "mac")


def check_signatures(value: dict) -> None:
    """Section 3.4."""
    members(value, "expiries payloadType signatures")
    must("M46", value["payloadType"] == MANIFEST_TYPE, "payloadType")
    for name, more in (("signatures", ""), ("expiries", " expires")):
        must("M47", isinstance(value[name], list) and len(value[name]) <= 16, name)
        must("M48", len({one["keyid"] for one in value[name]}) == len(value[name]), name)
        for one in value[name]:
            members(one, "keyid sig" + more)
            text("M49", one["keyid"], "[0-9a-f]{96}", "keyid")
            one["sig"] = bits("M50", one["sig"], 8192, "sig")
            if more:
                text("M51", one["expires"], TIME, "expires")


# --- section 7: who made it --------------------------------------------------------------------


def encoded(public: object) -> bytes:
    """DER SubjectPublicKeyInfo in its one encoding."""
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


PLAIN = ed25519.Ed25519PublicKey, mldsa.MLDSA65PublicKey, mldsa.MLDSA87PublicKey


def verifies(public: object, signature: bytes, kind: str, data: bytes) -> bool:
    """Over DSSE's encoding; the algorithm is that of the trusted key."""
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(data), data)
    with suppress(InvalidSignature, ValueError):
        if isinstance(public, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            public.verify(signature, message, pss, hashes.SHA256())
        elif isinstance(public, ec.EllipticCurvePublicKey):
            short = public.curve.name == "secp256r1"
            public.verify(signature, message, ec.ECDSA([hashes.SHA384, hashes.SHA256][short]()))
        elif isinstance(public, PLAIN):
            public.verify(signature, message)
        else:
            return False
        return True
    return False


class Want(argparse.Namespace):
    """What the reader demands: name or None, least release, signatures, and the time it is."""

    name: str | None = None
    release = 0
    signatures = 1
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_publishers(manifest: dict, raw: bytes, said: dict, trusted: list, want: Want) -> None:
    """As many as are wanted, each with another key."""
    publishers = {digest(encoded(public)).hex(): public for public in trusted}
    expiries = {one["keyid"]: one for one in said["expiries"]}
    allowed, signed, current = profile(manifest)[2], 0, 0
    for one in said["signatures"]:
        public = publishers.get(one["keyid"])
        if public is None:
            continue
        valid = verifies(public, one["sig"], MANIFEST_TYPE, raw)
        of_profile = allowed is None or isinstance(public, allowed)
        if not holds("M64", valid) or not holds("M54", of_profile):
            continue
        keep("public_key", encoded(public))
        keep("keyid", digest(encoded(public)))
        keep("signature", one["sig"])
        signed += 1
        expiry = expiries.get(one["keyid"])
        if expiry is not None:
            expires = expiry["expires"]
            body = canonical({"expires": expires, "manifest": digest(raw).hex()})
            valid = verifies(public, expiry["sig"], EXPIRY_TYPE, body)
            must("M65", valid, "an expiry", UNSIGNED)
        current += expiry is None or want.now < expiry["expires"]
    must("M66", signed >= want.signatures, "signatures.json", UNSIGNED)
    must("M67", current >= want.signatures, "signatures.json", EXPIRED)


# --- section 5: who may open it ----------------------------------------------------------------


def unwrap(one: dict, secret: bytes, context: bytes) -> bytes:
    """A share; ValueError or InvalidTag where it does not open (sections 5.1 and 5.2)."""
    mechanism, blob, params = one["mechanism"], one["blob"], one["params"]
    if mechanism == "HKDF-SHA384-A256GCM":
        salt = blob[:32]
        mine = keep("recogniser", expand(secret, b"keymgmt-file recogniser 1" + salt, 8))
        if not holds("M57", params == {"recogniser": mine.hex()}):
            raise ValueError("params")
        names = one["key"].encode(), one["version"].encode()
        info = b"keymgmt-file wrap 1" + listing(*names, context)
        key = keep("wrap_key", expand(hmac.digest(salt, secret, "sha384"), info, 32))
        return AESGCM(key).decrypt(bytes(12), blob[32:], context)
    private, public, kem, kdf = key_pair(mechanism, secret)
    if not holds("M57", params == {"pk": digest(public)[:16].hex()}):
        raise ValueError("params")
    return hpke.Suite(kem, kdf, hpke.AEAD.AES_256_GCM).decrypt(blob, private, context)


def key_pair(mechanism: str, secret: bytes) -> tuple:
    """The private key, its public one serialised, and the suite of an HPKE mechanism."""
    kem, kdf = hpke.KEM, hpke.KDF
    if mechanism in ("hpke-p256", "hpke-p384"):
        short = mechanism == "hpke-p256"
        private = ec.derive_private_key(
            int.from_bytes(secret), ec.SECP256R1() if short else ec.SECP384R1()
        )
        public = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        suite = (kem.P256, kdf.HKDF_SHA256) if short else (kem.P384, kdf.HKDF_SHA384)
        return private, public, *suite
    if mechanism == "hpke-x25519":
        private = x25519.X25519PrivateKey.from_private_bytes(secret)
        suite = kem.X25519, kdf.HKDF_SHA256
    elif mechanism == "hpke-mlkem1024":
        private = mlkem.MLKEM1024PrivateKey.from_seed_bytes(secret)
        suite = kem.MLKEM1024, kdf.HKDF_SHA384
    elif mechanism == "hpke-mlkem768-x25519":
        seed = hashlib.shake_256(secret).digest(96)
        pair = (
            mlkem.MLKEM768PrivateKey.from_seed_bytes(seed[:64]),
            x25519.X25519PrivateKey.from_private_bytes(seed[64:]),
        )
        public = b"".join(one.public_key().public_bytes_raw() for one in pair)
        return hpke.MLKEM768X25519PrivateKey(*pair), public, kem.MLKEM768_X25519, kdf.HKDF_SHA256
    else:
        raise ValueError(mechanism)
    return private, private.public_key().public_bytes_raw(), *suite


def unlock(keys: dict, manifest: dict, secrets: dict[str, bytes]) -> bytes:
    """The data key, from the first group that opens."""
    id_ = keep("id", bytes.fromhex(manifest["id"]))
    for group in keys["groups"]:
        nonce = keep("nonce", bytes.fromhex(group["nonce"]))
        dek, count = bytes(32), len(group["recipients"]).to_bytes(2)
        with suppress(KeyError, ValueError, InvalidTag):
            for index, one in enumerate(group["recipients"]):
                place = count + index.to_bytes(2)
                bound = listing(F, b"wrap", bytes.fromhex(keys["manifest"]), nonce, place)
                secret = keep("kek", secrets["{backend}:{key}@{version}".format_map(one)])
                keep("blob", one["blob"])
                share = unwrap(one, secret, keep("context", digest(bound)))
                keep("share", share)
                for name in ("context", "kek", "blob", "recogniser", "wrap_key", "share"):
                    if name in VALUES:
                        VALUES[f"{name}_{index}"] = VALUES.pop(name)
                dek = bytes(a ^ b for a, b in zip(dek, share, strict=True))
            found = keep("commitment", expand(dek, listing(F, b"commitment", id_)))
            same = hmac.compare_digest(found, bytes.fromhex(manifest["commitment"]))
            if holds("M52", same):
                return keep("dek", dek)
    return sys.exit(f"refused: {LOCKED}: keys.json")


# --- section 6: the payload --------------------------------------------------------------------


def tree(leaves: list[bytes], hash_: type) -> bytes:
    """RFC 9162, 2.1.1; an odd one goes up as it is."""
    row = [keep(f"leaf_{n}", hash_(b"\0" + leaf).digest()) for n, leaf in enumerate(leaves)]
    while len(row) > 1:
        pairs = [row[n : n + 2] for n in range(0, len(row), 2)]
        row = [hash_(b"\1" + b"".join(p)).digest() if len(p) == 2 else p[0] for p in pairs]
    return keep("digest", row[0])


def open_gcm(key: bytes, iv: bytes, sealed: bytes, aad: bytes, where: str) -> bytes:
    """AES-256-GCM, its tag compared apart from its decryption."""
    cipher = Cipher(algorithms.AES(key), modes.GCM(iv, sealed[-16:])).decryptor()
    cipher.authenticate_additional_data(aad)
    plain, good = cipher.update(sealed[:-16]), True
    try:
        cipher.finalize()
    except InvalidTag:
        good = False
    must("M62", good, where, DAMAGED)
    return plain


def decrypt(folder: Path, manifest: dict, dek: bytes, file: dict, check_digest: bool) -> bytes:
    """The plaintext of a payload file."""
    path, size, length = file["path"], file["size"], manifest["segment_length"]
    data, step = read(folder, f"payload/{path}.floe"), length - 32
    count = max(1, -(-size // step))
    if data is None:
        sys.exit(f"refused: {DAMAGED}: {path} is missing")
    must("M58", len(data) == 74 + size + 32 * count, path, DAMAGED)
    header = keep("header", data[:74])
    must("M59", header[:10] == bytes(2) + length.to_bytes(4) + (32).to_bytes(4), path)
    ends = [min(74 + (n + 1) * length, 74 + size + 32 * count) for n in range(count)]
    segments = [data[74 + n * length : end] for n, end in enumerate(ends)]
    if check_digest:
        root = tree([header, *segments], profile(manifest)[0])
        must("M63", root.hex() == file["digest"], path, DAMAGED)
    names = bytes.fromhex(manifest["id"]), path.encode()
    iv, aad = header[:42], keep("aad", listing(F, b"payload", *names))
    key, plain = keep("file_key", expand(dek, listing(F, b"file", *names), 32)), []
    tag = expand(key, iv + b"HEADER_TAG:" + aad, 32)
    must("M60", hmac.compare_digest(tag, header[42:]), path, DAMAGED)
    key = keep("message_key", expand(key, iv + b"MESSAGE_KEY:" + aad))
    for n, segment in enumerate(segments):
        final = n == count - 1
        says = len(segment).to_bytes(4) if final else b"\xff" * 4
        must("M61", segment[:4] == says, path, DAMAGED)
        block = (n >> 20 << 20).to_bytes(8)
        segment_key = keep("segment_key", expand(key, iv + b"DEK:" + block + aad, 32))
        bound = n.to_bytes(8) + bytes([final])
        keep("segment", segment)
        plain.append(open_gcm(segment_key, segment[4:16], segment[16:], bound, path))
    return keep("plaintext", b"".join(plain))


# --- section 8: the order of trust -------------------------------------------------------------


def open_model(folder: Path, secrets: dict, publishers: list, want: Want) -> dict[str, bytes]:
    """The plain files; if there are publishers, they must have signed."""
    raw, signed = read(folder, "manifest.json"), read(folder, "signatures.json")
    manifest = parse(raw or b"", "manifest.json")
    check_manifest(manifest)
    said = {"signatures": [], "expiries": []}
    if signed:
        said = parse(signed, "signatures.json")
        check_signatures(said)
    check_listing(folder / "payload", [file["path"] for file in manifest["files"]])
    if publishers:
        check_publishers(manifest, raw, said, publishers, want)
    must("M68", want.name in (None, manifest["name"]), manifest["name"], UNSIGNED)
    must("M69", manifest["release"] >= want.release, manifest["name"], OLD)
    keys = parse(read(folder, "keys.json") or b"", "keys.json")
    body = canonical({name: value for name, value in keys.items() if name != "mac"})
    check_keys(keys)
    hash_ = keep("manifest_hash", digest(raw))
    must("M55", keys["manifest"] == hash_.hex(), "keys.json", DAMAGED)
    used = {one["mechanism"] for group in keys["groups"] for one in group["recipients"]}
    allowed = profile(manifest)[1]
    must("M53", allowed is None or used <= {*allowed}, "a recipient of another profile")
    dek, id_ = unlock(keys, manifest, secrets), bytes.fromhex(manifest["id"])
    key = keep("mac_key", expand(dek, listing(F, b"keys mac", id_)))
    mac = keep("mac", hmac.digest(key, body, "sha384"))
    must("M56", hmac.compare_digest(mac, bytes.fromhex(keys["mac"])), "keys.json", DAMAGED)
    check = bool(publishers)
    return {f["path"]: decrypt(folder, manifest, dek, f, check) for f in manifest["files"]}


def main() -> None:
    """Opens a sealed model into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--key", nargs="+", action="extend", default=[], help="KEY@VERSION=HEX")
    parser.add_argument("--publisher", nargs="+", action="extend", default=[], help="KEY.pem")
    parser.add_argument("--name", help="the model that is expected")
    parser.add_argument("--release", type=int, default=0, help="the least that is accepted")
    parser.add_argument("--signatures", type=int, default=1, help="how many must have signed")
    parser.add_argument("--values", action="store_true", help="print what was computed, in hex")
    args = parser.parse_args(namespace=Want())
    VALUES.clear()
    try:
        if args.out.exists():
            sys.exit(f"refused: not a new folder: {args.out}")
        secrets = {f"file:{n}": bytes.fromhex(k) for n, k in (t.split("=") for t in args.key)}
        publishers = [load_pem_public_key(Path(path).read_bytes()) for path in args.publisher]
        files = open_model(args.model, secrets, publishers, args)
        args.out.mkdir(mode=0o700)
        for path, plain in files.items():
            (args.out / path).parent.mkdir(parents=True, exist_ok=True)
            (args.out / path).write_bytes(plain)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        sys.exit(f"refused: {FORMAT}: {type(error).__name__}")
    for name, value in VALUES.items() if args.values else ():
        print(f"{name} = {value.hex()}")


if __name__ == "__main__":
    main()
