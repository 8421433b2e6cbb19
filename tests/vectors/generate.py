"""Makes tests/vectors/sealed: one scenario a folder, by the small function named after it.

    python tests/vectors/generate.py [FOLDER]   (needs the file backend)

A scenario is `NAME/vector.txt` (what a reader must say, and why) beside `NAME/model.sealed`. Our
randomness comes from a counter, so the same code makes the same bytes, but for what OpenSSL makes
with its own: ephemeral HPKE keys, and signatures by ML-DSA. The private keys in `site/` are for
these vectors alone.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import whole_floe

import keymgmt._crypto.dek
import keymgmt._system.files
from keymgmt import Config
from keymgmt._crypto.dek import Dek
from keymgmt._crypto.signatures import PublicKey
from keymgmt._system.strict_json import dump_json
from keymgmt._trust.recipients import resolve_group
from keymgmt._verbs.plain_files import PlainFile
from keymgmt._verbs.seal import Content, write_sealed
from keymgmt._verbs.sign import Signer
from keymgmt.floe import FloeParameters
from keymgmt.sealed import derive
from keymgmt.sealed.digests import leaf_hash, tree_root
from keymgmt.sealed.keys import UnlockPolicy, wrap_group
from keymgmt.sealed.manifest import Manifest, manifest_hash
from keymgmt.sealed.profiles import PROFILES
from keymgmt.sealed.signatures import Signatures

HERE = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "sealed"
SEGMENT = 4096
STEP = SEGMENT - 32
Files = dict[str, bytes]
SCENARIOS: list[tuple[str, str, str, str, Callable[[], Files | None]]] = []


class Counter:
    """Bytes that are different each time and the same in each run."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, itertools.count()

    def __call__(self, length: int) -> bytes:
        stream = hashlib.shake_256(f"{self._seed} {next(self._count)}".encode())
        return stream.digest(length)


def seed(name: str) -> None:
    counter = Counter(name)
    os.urandom = counter  # type: ignore[assignment]

    def fill(buffer: bytearray) -> None:
        buffer[:] = counter(len(buffer))

    keymgmt._crypto.dek.fill_random = fill
    # The name of a temporary file is no part of a vector, so none is taken from the counter.
    keymgmt._system.files._temporary = _temporary


def _temporary(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.tmp"


SITE = HERE / "site"


def site(root: Path = SITE) -> Config:
    return Config(
        {
            "providers": {"local": {"backend": "file", "path": str(root / "keys")}},
            "policy": {"publishers": {"publisher.pem": ["*"]}},
        },
        path=root / "keymgmt.toml",
    )


TEMPLATE = Manifest(
    id=bytes(16),
    name="vector",
    release=1,
    created="2026-01-01T00:00:00Z",
    profile="default",
    segment_length=SEGMENT,
    commitment=b"",
    kind="files",
    main=None,
    files=(),
)
WORK: Path
CONFIG: Config
DEK: Dek


def content(size: int, name: str = "x") -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


def signer(key: str = "local:publisher", profile: str = "default") -> Signer:
    return Signer(CONFIG, key, PROFILES[profile])


def build(
    files: dict[str, bytes] | None = None,
    to: tuple[str, ...] = ("local:a",),
    sign: str | None = "local:publisher",
    **template: Any,
) -> Files:
    """A whole sealed model as path -> bytes; DEK is its data key."""
    global DEK
    files = files if files is not None else {"m.bin": content(STEP + 9), "m.xml": b"<net/>"}
    plain, out = WORK / "plain", WORK / "out"
    for folder in (plain, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    contents = {}
    for path, data in sorted(files.items(), key=lambda item: item[0].encode()):
        file = plain / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        contents[path] = Content(path, len(data), PlainFile.of(file, file.stat()).open)
    DEK = Dek.generate()
    write_sealed(
        out,
        contents,
        DEK,
        [resolve_group(text, CONFIG) for text in to],
        signer(sign) if sign else None,
        template=dataclasses.replace(TEMPLATE, **{"id": os.urandom(16), **template}),
    )
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def _lenient(manifest: bytes, profile: str = "") -> Manifest:
    """Enough of a manifest that no reader would take to make its keys.json."""
    value = json.loads(manifest)
    if not profile:
        profile = value["profile"] if value["profile"] in PROFILES else "default"
    return dataclasses.replace(TEMPLATE, id=bytes.fromhex(value["id"]), profile=profile)


def rewrapped(files: Files, manifest: bytes, dek: Dek | None = None) -> Files:
    """The same with another manifest that the publisher signed and the recipients open."""
    digest = manifest_hash(manifest)
    group = wrap_group(dek or DEK, digest, resolve_group("local:a", CONFIG))
    parsed = _lenient(manifest)
    policy = UnlockPolicy.make(dek or DEK, parsed, digest, [group])
    signed = Signatures().with_signature(*signer().sign(manifest))
    small = {
        "manifest.json": manifest,
        "keys.json": policy.to_bytes(),
        "signatures.json": signed.to_bytes(),
    }
    return files | small


def with_manifest(change: Callable[[dict[str, Any]], None], files: Files | None = None) -> Files:
    """Edit the manifest as its publisher could: signed and wrapped anew, so only the edit is bad."""
    files = files or build()
    value = json.loads(files["manifest.json"])
    change(value)
    return rewrapped(files, dump_json(value))


def craft(
    files: Files,
    damage: Callable[[bytes], bytes] = lambda sealed: sealed,
    write: bool = True,
    **members: Any,
) -> Files:
    """A model whose publisher makes what our code would not: every other check passes.

    ``damage`` is done to each ciphertext before its digest is made. What is not ``write``-n cannot
    lie in a folder; a reader that lets its path pass does not find it, and says so.
    """
    build()
    value = dataclasses.replace(TEMPLATE, id=os.urandom(16), commitment=bytes(48)).to_json()
    value["commitment"] = derive.commitment(DEK, bytes.fromhex(value["id"])).hex()
    length = members.get("segment_length", SEGMENT)
    sealed = {}
    for path, data in files.items():
        model_id = bytes.fromhex(value["id"])
        key, aad = derive.file_key(DEK, model_id, path), derive.payload_aad(model_id, path)
        made = damage(whole_floe.encrypt(key, aad, data, FloeParameters(length)))
        body = [made[n : n + length] for n in range(74, len(made), length)]
        leaves = b"".join(leaf_hash("blake3", part) for part in (made[:74], *body))
        digest = tree_root("blake3", leaves).hex()
        value["files"].append({"path": path, "size": len(data), "digest": digest})
        sealed[f"payload/{path}.floe"] = made
    return rewrapped(sealed if write else {}, dump_json(value | members))


def remade(change: Callable[[dict[str, Any]], None], to: str = "local:a") -> Files:
    """keys.json edited by a holder of the data key: its MAC is right."""
    files = build(to=(to,))
    value = json.loads(files[KEYS])
    del value["mac"]
    change(value)
    model_id = bytes.fromhex(json.loads(files[MANIFEST])["id"])
    mac = derive.keys_mac(DEK, model_id, [dump_json(value)])
    return files | {KEYS: dump_json(value | {"mac": mac.hex()})}


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Files:
    """Edit a small file as anybody could."""
    files = build()
    value = json.loads(files[name])
    change(value)
    return files | {name: dump_json(value)}


def raw(name: str, change: Callable[[bytes], bytes], files: Files | None = None) -> Files:
    files = files or build()
    return files | {name: change(files[name])}


def scenario(expect: str, comment: str, **fields: str) -> Callable[[Any], Any]:
    def register(make: Callable[[], Files]) -> Callable[[], Files]:
        extra = "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in fields.items())
        SCENARIOS.append((make.__name__, expect, comment, extra, make))
        return make

    return register


PAYLOAD = "payload/m.bin.floe"
MANIFEST, KEYS, SIGNATURES = "manifest.json", "keys.json", "signatures.json"

# --- good -------------------------------------------------------------------------------------


@scenario("ok", "Two files, one recipient, one signature.")
def plain_model() -> Files:
    return build()


def _size(size: int) -> Callable[[], Files]:
    def make() -> Files:
        return build({"m.bin": content(size)})

    return make


for _name, _bytes in {
    "size_zero": 0,
    "size_one": 1,
    "size_one_segment_less_one": STEP - 1,
    "size_one_segment": STEP,
    "size_one_segment_and_one": STEP + 1,
    "size_two_segments": 2 * STEP,
    "size_three_segments_less_one": 3 * STEP - 1,
}.items():
    _make = _size(_bytes)
    _make.__name__ = _name
    scenario("ok", f"A file of {_bytes} bytes in segments of {STEP}.")(_make)


@scenario("ok", "Profile fips: digests by SHA-256.")
def profile_fips() -> Files:
    return build(profile="fips")


@scenario("ok", "Profile cnsa2: digests by SHA-384, ML-KEM-1024 and ML-DSA-87.")
def profile_cnsa2() -> Files:
    return build(to=("local:a+local:mlkem",), sign="local:pq5", profile="cnsa2")


def _as_default(profile: str, to: str, sign: str) -> Files:
    """As if the profile did not matter for recipients and signers."""
    files = build(sign=sign, profile=profile)
    digest = manifest_hash(files[MANIFEST])
    groups = [wrap_group(DEK, digest, resolve_group(to, CONFIG))]
    made = UnlockPolicy.make(DEK, _lenient(files[MANIFEST], "default"), digest, groups)
    return files | {KEYS: made.to_bytes()}


@scenario("FormatError", "Profile fips, and a recipient of X25519.")
def fips_recipient_x25519() -> Files:
    return _as_default("fips", "local:x25519", "local:publisher")


@scenario("FormatError", "Profile fips, and a recipient of the hybrid.")
def fips_recipient_hybrid() -> Files:
    return _as_default("fips", "local:hybrid", "local:publisher")


@scenario("FormatError", "Profile cnsa2, and a recipient of P-384.")
def cnsa2_recipient_p384() -> Files:
    return _as_default("cnsa2", "local:p384", "local:pq5")


@scenario("UntrustedPublisher", "Profile cnsa2, and a signature of ML-DSA-65.")
def cnsa2_signed_with_ml_dsa_65() -> Files:
    return _as_default("cnsa2", "local:a", "local:pq")


@scenario("ok", "Folders, spaces, and names beyond ASCII.")
def names() -> Files:
    return build({"a/b/c": b"1", "a/b d": b"2", "grün/模型.bin": b"3", "z": b""})


@scenario("ok", "A group of three, all of which are needed.")
def group_of_three() -> Files:
    return build(to=("local:a+local:b+local:c",))


@scenario("ok", "The first group is another site's; the second opens.")
def second_group_opens() -> Files:
    return build(to=("local:gone", "local:a+local:b"))


@scenario("ok", "Signed by a stranger and by the publisher.")
def two_signatures() -> Files:
    files = build(sign="local:stranger")
    signed = Signatures.from_bytes(files[SIGNATURES])
    signed = signed.with_signature(*signer().sign(files[MANIFEST]))
    return files | {SIGNATURES: signed.to_bytes()}


@scenario("ok", "A publisher's ML-DSA-65 key.")
def signed_with_ml_dsa() -> Files:
    return build(sign="local:pq")


@scenario("ok", "Public-key recipients of every kind in one group.")
def hpke_recipients() -> Files:
    return build(to=("local:p256+local:p384+local:x25519+local:hybrid+local:mlkem",))


@scenario("ok", "Every member of the manifest at its largest or longest.")
def members_at_their_bounds() -> Files:
    return build(
        name="a" * 64,
        release=(1 << 53) - 1,
        kind="k" * 32,
        metadata={f"{i:064}": "v" * 40 for i in range(64)},
    )


@scenario("ok", "Section 13 of SPEC.md.")
def worked_example() -> Files:
    return build({"model.bin": b"hello, model"}, to=("local:a+local:b",), name="example")


# --- truncation and extension -----------------------------------------------------------------

for _file, _error in (
    (MANIFEST, "FormatError"),
    (KEYS, "FormatError"),
    (SIGNATURES, "FormatError"),
):
    for _label, _cut in (("empty", 0), ("half", 0.5), ("less_one", -1)):

        def _make(_file: str = _file, _cut: float = _cut) -> Files:
            return raw(_file, lambda d: d[: int(len(d) * _cut)] if _cut >= 0 else d[:-1])

        _make.__name__ = f"{_file.split('.')[0]}_{_label}"
        # No signatures.json and an empty one are the same: nobody signed.
        _unsigned = _file == SIGNATURES and _cut == 0
        scenario("UntrustedPublisher" if _unsigned else _error, f"{_file} cut: {_label}.")(_make)

for _label, _length in {
    "nothing": 0,
    "half_a_header": 40,
    "header": 74,
    "header_and_one": 75,
    "first_segment": 74 + SEGMENT,
    "all_but_one": -1,
}.items():

    def _make(_length: int = _length) -> Files:
        return raw(PAYLOAD, lambda d: d[:_length])

    _make.__name__ = f"payload_cut_to_{_label}"
    scenario("IntegrityError", f"A payload file cut: {_label}.")(_make)


@scenario("IntegrityError", "A byte behind the last segment.")
def payload_with_a_byte_more() -> Files:
    return raw(PAYLOAD, lambda d: d + b"\0")


@scenario("FormatError", "A line end behind the manifest.")
def manifest_with_a_line_end() -> Files:
    return raw(MANIFEST, lambda d: d + b"\n")


@scenario("FormatError", "There is no manifest.")
def manifest_missing() -> Files:
    files = build()
    del files[MANIFEST]
    return files


@scenario("FormatError", "There is no keys.json.")
def keys_missing() -> Files:
    files = build()
    del files[KEYS]
    return files


@scenario("UntrustedPublisher", "There is no signatures.json.")
def signatures_missing() -> Files:
    files = build()
    del files[SIGNATURES]
    return files


@scenario("IntegrityError", "A listed payload file is missing.")
def payload_missing() -> Files:
    files = build()
    del files[PAYLOAD]
    return files


# --- payload ----------------------------------------------------------------------------------


def _flip(offset: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        out = bytearray(data)
        out[offset] ^= 1
        return bytes(out)

    return change


for _label, _offset in {
    "parameters": 5,
    "iv": 12,
    "header_tag": 73,
    "segment_length_field": 74,
    "segment_iv": 80,
    "ciphertext": 100,
    "segment_tag": 74 + SEGMENT - 1,
    "last_byte": -1,
}.items():

    def _make(_offset: int = _offset) -> Files:
        return raw(PAYLOAD, _flip(_offset))

    _make.__name__ = f"payload_flipped_{_label}"
    scenario(
        "FormatError" if _label == "parameters" else "IntegrityError",
        f"One bit of a payload file: {_label}.",
        signature_only="IntegrityError",
    )(_make)


@scenario("IntegrityError", "Two segments of one file changed places.")
def segments_swapped() -> Files:
    def swap(d: bytes) -> bytes:
        first, second = d[74 : 74 + SEGMENT], d[74 + SEGMENT : 74 + 2 * SEGMENT]
        return d[:74] + second + first + d[74 + 2 * SEGMENT :]

    return raw(PAYLOAD, swap, build({"m.bin": content(2 * STEP + 9)}))


@scenario("IntegrityError", "A segment stands in place of another one.")
def segment_repeated() -> Files:
    def repeat(d: bytes) -> bytes:
        return d[:74] + d[74 : 74 + SEGMENT] * 2 + d[74 + 2 * SEGMENT :]

    return raw(PAYLOAD, repeat, build({"m.bin": content(2 * STEP + 9)}))


@scenario("IntegrityError", "Two files of the same size changed places.")
def files_swapped() -> Files:
    files = build({"a": content(50, "a"), "b": content(50, "b")})
    left, right = "payload/a.floe", "payload/b.floe"
    return files | {left: files[right], right: files[left]}


@scenario("IntegrityError", "The payload of another model of the same size.")
def payload_of_another_model() -> Files:
    other = build()
    return build() | {PAYLOAD: other[PAYLOAD]}


@scenario(
    "IntegrityError", "Other bytes encrypted with the real data key, under a valid signature."
)
def payload_forged_with_the_data_key() -> Files:
    files = build()
    value = json.loads(files[MANIFEST])
    model_id = bytes.fromhex(value["id"])
    forged = whole_floe.encrypt(
        derive.file_key(DEK, model_id, "m.bin"),
        derive.payload_aad(model_id, "m.bin"),
        bytes(STEP + 9),
        FloeParameters(SEGMENT),
    )
    return files | {PAYLOAD: forged}


@scenario("IntegrityError", "The manifest lists the digests of other bytes, and is signed.")
def digest_wrong() -> Files:
    def change(m: dict[str, Any]) -> None:
        m["files"][0]["digest"] = "00" * 32

    return with_manifest(change)


@scenario("IntegrityError", "The signed manifest says another profile than was sealed with.")
def profile_changed() -> Files:
    return with_manifest(lambda m: m.update(profile="fips"))


@scenario("IntegrityError", "The signed manifest says another segment length.")
def segment_length_changed() -> Files:
    return with_manifest(lambda m: m.update(segment_length=8192))


@scenario("IntegrityError", "The signed manifest says a smaller size.")
def size_smaller() -> Files:
    def change(m: dict[str, Any]) -> None:
        m["files"][0]["size"] -= 1

    return with_manifest(change)


# --- manifest ---------------------------------------------------------------------------------


@scenario("UntrustedPublisher", "The manifest was edited after it was signed.")
def manifest_edited() -> Files:
    return edited(MANIFEST, lambda m: m.update(name="other"))


@scenario("CannotUnlock", "The commitment is another one, signed.", signature_only="ok")
def commitment_wrong() -> Files:
    return with_manifest(lambda m: m.update(commitment="00" * 48))


@scenario(
    "CannotUnlock",
    "One data key for two manifests: the second has another id.",
    signature_only="ok",
)
def data_key_used_for_two_manifests() -> Files:
    return with_manifest(lambda m: m.update(id="00" * 16))


def _bad_manifest(name: str, comment: str, change: Callable[[dict[str, Any]], None]) -> None:
    def make() -> Files:
        return with_manifest(change)

    make.__name__ = f"manifest_{name}"
    scenario("FormatError", comment)(make)


def _bad_paths(name: str, comment: str, *paths: str) -> None:
    def make() -> Files:
        return craft(dict.fromkeys(paths, b""), write=False)

    make.__name__ = f"manifest_{name}"
    scenario("FormatError", comment)(make)


_bad_manifest("newer_format", "A version to come.", lambda m: m.update(format="keymgmt-sealed/2"))
_bad_manifest("older_format", "The version before.", lambda m: m.update(format="keymgmt-sealed/0"))
_bad_manifest("unknown_member", "A member nobody knows.", lambda m: m.update(extra=1))
_bad_manifest("missing_member", "A member is missing.", lambda m: m.pop("release"))
_bad_manifest("wrong_type", "A string where an integer belongs.", lambda m: m.update(release="1"))
_bad_manifest("boolean_release", "true is no integer.", lambda m: m.update(release=True))
_bad_manifest("negative_release", "An integer below zero.", lambda m: m.update(release=-1))
_bad_manifest("unknown_profile", "A profile to come.", lambda m: m.update(profile="fast"))
_bad_manifest("size_of_2_53", "2^53 bytes.", lambda m: m["files"][0].update(size=1 << 53))
_bad_manifest("too_many_segments", "2^40 and one.", lambda m: m["files"][0].update(size=1 << 52))
_bad_manifest(
    "commitment_in_capitals", "Hex.", lambda m: m.update(commitment=m["commitment"].upper())
)
_bad_manifest("kind_with_a_space", "No word.", lambda m: m.update(kind="a b"))
_bad_manifest("release_of_2_53", "2^53.", lambda m: m.update(release=1 << 53))
_bad_manifest("digest_short", "Of another hash.", lambda m: m["files"][0].update(digest="00" * 31))
_bad_manifest(
    "metadata_many", "65 of them.", lambda m: m.update(metadata={f"{n}": "" for n in range(65)})
)


def _crafted(name: str, expect: str, comment: str, files: Files, **more: Any) -> None:
    def make() -> Files:
        return craft(files, **more)

    make.__name__ = name
    # What is wrong behind a right digest is seen only by who has a key.
    only = {"signature_only": "ok"} if expect == "IntegrityError" else {}
    scenario(expect, comment, **only)(make)


ONE = {"m.bin": content(STEP + 9)}
for _name, _length in (("too_small", 2048), ("too_large", 1 << 23), ("no_power", 4097)):
    _crafted(
        f"manifest_segment_{_name}",
        "FormatError",
        f"Segments of {_length} bytes, all else right.",
        ONE,
        segment_length=_length,
    )
_crafted("manifest_no_files", "FormatError", "An empty model.", {})
_crafted("manifest_paths_unsorted", "FormatError", "Not in order.", {"b": b"1", "a": b"2"})
_crafted("path_of_no_device", "ok", "U+0131 is not the letter i.", {"con\u0131n$": b"1"})
for _name, _offset in (
    ("header_tag", 73),
    ("segment_length_field", 74),
    ("last_segment_length_field", 74 + SEGMENT + 3),
    ("segment_tag", 74 + SEGMENT - 1),
    ("ciphertext", 100),
):
    _crafted(
        f"published_{_name}",
        "IntegrityError",
        f"One bit was changed before the digest was made: {_name}.",
        ONE,
        damage=_flip(_offset),
    )


@scenario("FormatError", "One path twice.")
def manifest_paths_twice() -> Files:
    return with_manifest(lambda m: m.update(files=m["files"] * 2), build({"a": b"1"}))


_bad_manifest("main_unlisted", "main is no file.", lambda m: m.update(main="other"))
_bad_manifest("upper_case_hex", "Hex in capitals.", lambda m: m.update(id=m["id"].upper() + ""))
_bad_manifest("bad_name", "A name with a slash.", lambda m: m.update(name="a/b"))
_bad_manifest("bad_time", "No time of day.", lambda m: m.update(created="2026-01-01T24:00:00Z"))
_bad_manifest("metadata_object", "Metadata in metadata.", lambda m: m.update(metadata={"a": {}}))
_bad_paths("path_parent", "A path that climbs.", "../../etc/passwd")
_bad_paths("path_absolute", "An absolute path.", "/etc/passwd")
_bad_paths("path_empty_part", "Two slashes.", "a//b")
_bad_paths("path_backslash", "A Windows path.", "a\\..\\b")
_bad_paths("path_device", "The name of a device.", "aux.bin")
_bad_paths("path_drive", "A drive.", "c:model")
_bad_paths("path_control", "A line end in a path.", "a\nb")
_bad_paths("path_bidi", "A character that turns the direction.", "a\u202eb")
_bad_paths("path_not_nfc", "Two code points for one letter.", "gru\u0308n")
_bad_paths("path_trailing_dot", "A dot that Windows drops.", "a.")
_bad_paths("paths_case", "Two names for one file.", "M.bin", "m.bin")
_bad_paths("paths_casefold", "Two names after full case folding.", "STRASSE", "straße")
_bad_paths("path_of_1025_bytes", "Too long.", "/".join(["a" * 250] * 4 + ["b" * 21]))
_bad_paths("path_leading_space", "A space that some drop.", " a")
_bad_paths("path_device_of_two_words", "A device in capitals.", "LPT\u00b9.txt")
_bad_paths("path_file_and_folder", "A file that is a folder.", "a", "a/b")
_bad_paths("path_floe_folder", "A folder where a ciphertext lies.", "a", "a.floe/b")
_bad_paths("path_too_deep", "33 folders.", "/".join("a" * 33))
_bad_paths("path_too_long", "A part of 251 bytes.", "a" * 251)


def _bad_text(name: str, comment: str, change: Callable[[bytes], bytes]) -> None:
    def make() -> Files:
        files = build()
        return files | {MANIFEST: change(files[MANIFEST])}

    make.__name__ = f"json_{name}"
    scenario("FormatError", comment)(make)


_bad_text("white_space", "A space.", lambda d: d.replace(b'"release":1', b'"release": 1'))
_bad_text(
    "duplicate", "A member twice.", lambda d: d.replace(b'"release":1', b'"release":1,"release":1')
)
_bad_text(
    "unsorted",
    "Members not in order.",
    lambda d: b'{"release":1,' + d[1:].replace(b',"release":1', b""),
)
_bad_text("float", "1.0 for 1.", lambda d: d.replace(b'"release":1', b'"release":1.0'))
_bad_text("exponent", "1e0 for 1.", lambda d: d.replace(b'"release":1', b'"release":1e0'))
_bad_text("nan", "No number.", lambda d: d.replace(b'"release":1', b'"release":NaN'))
_bad_text("infinity", "No number.", lambda d: d.replace(b'"release":1', b'"release":-Infinity'))
_bad_text(
    "huge_integer", "4000 digits.", lambda d: d.replace(b'"release":1', b'"release":' + b"9" * 4000)
)
_bad_text(
    "integer_of_2_53", "2^53.", lambda d: d.replace(b'"release":1', b'"release":9007199254740992')
)
_bad_text("minus_zero", "-0 for 0.", lambda d: d.replace(b'"release":1', b'"release":-0'))
_bad_text("escape", "A letter as an escape.", lambda d: d.replace(b'"vector"', b'"\\u0076ector"'))
_bad_text("lone_surrogate", "Half a character.", lambda d: d.replace(b'"vector"', b'"\\ud800"'))
_bad_text("not_utf8", "A byte that is none of UTF-8.", lambda d: d.replace(b'"vector"', b'"\xff"'))
_bad_text("byte_order_mark", "A mark before it.", lambda d: b"\xef\xbb\xbf" + d)
_bad_text("array", "An array on top.", lambda d: b"[" + d + b"]")
_bad_text("deep", "A hundred thousand arrays.", lambda d: b"[" * 100_000 + b"]" * 100_000)
_bad_text("null", "Only null.", lambda d: b"null")

# --- keys.json --------------------------------------------------------------------------------


@scenario("IntegrityError", "One bit of the MAC.", signature_only="ok")
def mac_wrong() -> Files:
    def change(k: dict[str, Any]) -> None:
        k["mac"] = f"{int(k['mac'][0], 16) ^ 1:x}" + k["mac"][1:]

    return edited(KEYS, change)


@scenario("IntegrityError", "keys.json of another model.", signature_only="IntegrityError")
def keys_of_another_model() -> Files:
    other = build()
    return build() | {KEYS: other[KEYS]}


@scenario(
    "CannotUnlock", "Recipients of another manifest, with the hash corrected.", signature_only="ok"
)
def recipients_of_another_model() -> Files:
    other = json.loads(build()[KEYS])

    def change(k: dict[str, Any]) -> None:
        k["groups"] = other["groups"]

    return edited(KEYS, change)


def _groups(change: Callable[[list[Any]], Any], *to: str) -> Files:
    files = build(to=to)
    value = json.loads(files[KEYS])
    value["groups"] = change(value["groups"])
    return files | {KEYS: dump_json(value)}


@scenario("CannotUnlock", "A share moved to a group of its own.", signature_only="ok")
def recipient_moved_to_its_own_group() -> Files:
    def change(groups: list[Any]) -> Any:
        return [{"nonce": groups[0]["nonce"], "recipients": [r]} for r in groups[0]["recipients"]]

    return _groups(change, "local:a+local:b")


@scenario("CannotUnlock", "Two shares of a group changed places.", signature_only="ok")
def recipients_reordered() -> Files:
    def change(groups: list[Any]) -> Any:
        return [groups[0] | {"recipients": groups[0]["recipients"][::-1]}]

    return _groups(change, "local:a+local:b")


@scenario("CannotUnlock", "A member of one group stands in another.", signature_only="ok")
def recipient_moved_between_groups() -> Files:
    def change(groups: list[Any]) -> Any:
        left, right = groups
        mixed = left | {"recipients": [left["recipients"][0], right["recipients"][1]]}
        return [mixed]

    return _groups(change, "local:a+local:b", "local:c+local:b")


@scenario("IntegrityError", "A group was taken out.", signature_only="ok")
def group_removed() -> Files:
    return _groups(lambda groups: groups[:1], "local:a", "local:b")


@scenario("IntegrityError", "Somebody without the data key added a recipient.", signature_only="ok")
def recipient_added() -> Files:
    files = build()
    policy = UnlockPolicy.from_bytes(files[KEYS])
    with Dek.generate() as other:
        more = wrap_group(other, policy.manifest, resolve_group("local:b", CONFIG))
    forged = dataclasses.replace(policy, groups=(*policy.groups, more))
    return files | {KEYS: forged.to_bytes()}


@scenario(
    "CannotUnlock",
    "Who holds one share of two wraps it to himself as the data key.",
    signature_only="ok",
)
def share_as_data_key() -> Files:
    files = build(to=("local:a+local:gone",))
    policy = UnlockPolicy.from_bytes(files[KEYS])
    context = policy.groups[0].context(policy.manifest, 0)
    share = CONFIG.provider("local").unwrap(policy.groups[0].recipients[0], context)
    group = wrap_group(share, policy.manifest, resolve_group("local:a", CONFIG))
    return files | {
        KEYS: UnlockPolicy.make(
            share, _lenient(files[MANIFEST]), policy.manifest, [group]
        ).to_bytes()
    }


def _recipient(change: Callable[[dict[str, Any]], None]) -> Files:
    files = build()
    value = json.loads(files[KEYS])
    change(value["groups"][0]["recipients"][0])
    return files | {KEYS: dump_json(value)}


def _bad_recipient(name: str, expect: str, comment: str, **members: Any) -> None:
    def make() -> Files:
        return _recipient(lambda r: r.update(members))

    make.__name__ = f"recipient_{name}"
    only = "ok" if expect == "CannotUnlock" else expect
    scenario(expect, comment, signature_only=only)(make)


_bad_recipient(
    "key_climbs",
    "FormatError",
    "A key name that leaves its place.",
    key="../../auth/token/revoke-self",
)
_bad_recipient("key_dots", "FormatError", "Two dots in a key name.", key="a..b")
_bad_recipient("key_percent", "FormatError", "A percent escape.", key="a%2fb")
_bad_recipient("key_line_end", "FormatError", "A line end.", key="a\n")
_bad_recipient("backend_path", "FormatError", "A path as backend.", backend="../file")
_bad_recipient("unknown_backend", "CannotUnlock", "A backend that is not here.", backend="acme")
_bad_recipient("version_unknown", "CannotUnlock", "A version that the key never had.", version="9")
_bad_recipient(
    "mechanism_downgrade",
    "CannotUnlock",
    "A weaker mechanism than the key allows.",
    mechanism="none",
)
_bad_recipient(
    "mechanism_of_another_kind",
    "CannotUnlock",
    "Another kind of key's mechanism.",
    mechanism="hpke-p256",
)
_bad_recipient(
    "params_place",
    "FormatError",
    "A parameter that would name a place.",
    params={"address": "https://evil.example:8200/?a=b"},
)
_bad_recipient(
    "recogniser_missing", "CannotUnlock", "A key that is not marked as anybody's.", params={}
)
_bad_recipient(
    "recogniser_of_another_key",
    "CannotUnlock",
    "Marked as another key's of that name.",
    params={"recogniser": "00" * 8},
)
_bad_recipient(
    "params_many", "FormatError", "Nine parameters.", params={f"p{i}": "" for i in range(9)}
)
_bad_recipient("blob_empty", "FormatError", "No blob.", blob="")
_bad_recipient(
    "blob_too_long",
    "FormatError",
    "A blob of 8193 bytes.",
    blob=base64.b64encode(bytes(8193)).decode(),
)
_bad_recipient("blob_short", "CannotUnlock", "A blob of 3 bytes.", blob="AAAA")
_bad_recipient("blob_no_base64", "FormatError", "A blob in URL-safe base64.", blob="-_-_")
_bad_recipient("blob_odd_base64", "FormatError", "Base64 with bits to spare.", blob="AB==")
_bad_recipient("version_dots", "FormatError", "Two dots in a version.", version="1..2")
_bad_recipient("mechanism_slash", "FormatError", "A slash in a mechanism.", mechanism="a/b")
_bad_recipient("unknown_member", "FormatError", "An address.", address="https://evil.example")


def _bad_keys(name: str, comment: str, change: Callable[[dict[str, Any]], None]) -> None:
    def make() -> Files:
        return edited(KEYS, change)

    make.__name__ = f"keys_{name}"
    scenario("FormatError", comment)(make)


_bad_keys("newer_format", "A version to come.", lambda k: k.update(format="keymgmt-keys/2"))
_bad_keys("unknown_member", "A member nobody knows.", lambda k: k.update(extra=1))
_bad_keys("mac_in_capitals", "Hex.", lambda k: k.update(mac=k["mac"].upper()))
_bad_keys("manifest_in_capitals", "Hex.", lambda k: k.update(manifest=k["manifest"].upper()))
_bad_keys("nonce_in_capitals", "Hex.", lambda k: k["groups"][0].update(nonce="A" * 32))


def _first(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["groups"][0]["recipients"][0]
    return found


@scenario(
    "CannotUnlock",
    "A parameter that the mechanism does not have; the MAC is right.",
    signature_only="ok",
)
def recipient_params_extra() -> Files:
    return remade(lambda k: _first(k)["params"].update(more="1"))


@scenario("CannotUnlock", "The recogniser of another key; the MAC is right.", signature_only="ok")
def recipient_recogniser_of_another() -> Files:
    return remade(lambda k: _first(k)["params"].update(recogniser="00" * 8))


@scenario(
    "CannotUnlock", "The public key of another device; the MAC is right.", signature_only="ok"
)
def recipient_pk_of_another() -> Files:
    return remade(lambda k: _first(k)["params"].update(pk="00" * 16), "local:x25519")


@scenario("FormatError", "16 385 recipients.", make=f"groups {KEYS} 16385")
def recipients_too_many() -> Files:
    return build()


@scenario("FormatError", "Params with a byte that is none of UTF-8.")
def recipient_params_not_utf8() -> Files:
    return raw(KEYS, lambda d: d.replace(b'"params":{"', b'"params":{"\xff'))


@scenario("FormatError", "No group at all.")
def no_groups() -> Files:
    return edited(KEYS, lambda k: k.update(groups=[]))


@scenario("FormatError", "A group of 17.")
def group_of_seventeen() -> Files:
    def change(k: dict[str, Any]) -> None:
        k["groups"][0]["recipients"] *= 17

    return edited(KEYS, change)


# --- signatures -------------------------------------------------------------------------------


@scenario("UntrustedPublisher", "The signatures were taken away.")
def signatures_stripped() -> Files:
    return edited(SIGNATURES, lambda s: s.update(signatures=[]))


@scenario("UntrustedPublisher", "Signed by somebody whom nobody here trusts.")
def signature_of_a_stranger() -> Files:
    return build(sign="local:stranger")


@scenario("UntrustedPublisher", "The publisher's signature of another manifest.")
def signature_of_another_manifest() -> Files:
    other = build()
    return build() | {SIGNATURES: other[SIGNATURES]}


@scenario("UntrustedPublisher", "A stranger's signature under the publisher's id.")
def signature_under_a_false_id() -> Files:
    files = build()
    foreign = json.loads(build(sign="local:stranger")[SIGNATURES])
    mine = json.loads(files[SIGNATURES])
    mine["signatures"][0]["sig"] = foreign["signatures"][0]["sig"]
    return files | {SIGNATURES: dump_json(mine)}


@scenario("FormatError", "Two signatures of one key.")
def signature_twice() -> Files:
    return edited(SIGNATURES, lambda s: s["signatures"].append(s["signatures"][0]))


@scenario("FormatError", "Signatures of something else.")
def signature_of_another_type() -> Files:
    return edited(SIGNATURES, lambda s: s.update(payloadType="application/json"))


@scenario("FormatError", "A signature that names its algorithm.")
def signature_with_an_algorithm() -> Files:
    return edited(SIGNATURES, lambda s: s["signatures"][0].update(alg="none"))


def _signed(change: Callable[[dict[str, Any]], None], expires: str = "") -> Files:
    """With an expiry by the publisher, if so; then edited by anybody."""
    files = build()
    signatures = Signatures.from_bytes(files[SIGNATURES])
    if expires:
        made = signer().sign_expiry(manifest_hash(files[MANIFEST]), expires)
        signatures = signatures.with_expiry(*made, expires)
    value = json.loads(signatures.to_bytes())
    change(value)
    return files | {SIGNATURES: dump_json(value)}


def _stranger(number: int = 0, **members: str) -> dict[str, str]:
    return {"keyid": f"{number:096x}", "sig": "AAAA"} | members


def _bad_signatures(
    name: str, comment: str, *added: dict[str, str], to: str = "signatures"
) -> None:
    def make() -> Files:
        return _signed(lambda s: s[to].extend(added))

    make.__name__ = name
    scenario("FormatError", comment)(make)


_bad_signatures("signatures_17", "17 of them.", *map(_stranger, range(16)))
_bad_signatures("signature_keyid", "Another's id in capitals.", _stranger(keyid="A" * 96))
_bad_signatures("signature_base64", "Another's with bits to spare.", _stranger(sig="AB=="))
_bad_signatures(
    "signature_long",
    "Another's of 8193 bytes.",
    _stranger(sig=base64.b64encode(bytes(8193)).decode()),
)
_bad_signatures(
    "expiry_no_time", "Another's without a time.", _stranger(expires="tomorrow"), to="expiries"
)


@scenario("FormatError", "Over 256 KiB, each member within its bounds.", make="strangers 15")
def signatures_too_large() -> Files:
    return build()


@scenario("ok", "The publisher vouches until 2999.")
def expiry() -> Files:
    return _signed(lambda _: None, "2999-12-31T23:59:59Z")


@scenario("ModelExpired", "The publisher vouched until 2026-01-02.")
def expired() -> Files:
    return _signed(lambda _: None, "2026-01-02T00:00:00Z")


@scenario("UntrustedPublisher", "The time that the publisher stated was changed.")
def expiry_forged() -> Files:
    return _signed(
        lambda s: s["expiries"][0].update(expires="2999-12-31T23:59:59Z"), "2026-01-02T00:00:00Z"
    )


@scenario("ok", "A stranger states a time that has passed.")
def expiry_of_a_stranger() -> Files:
    return _signed(lambda s: s["expiries"].append(_stranger(expires="2026-01-02T00:00:00Z")))


# --- the folder -------------------------------------------------------------------------------


@scenario("FormatError", "A file in payload/ that nobody listed.")
def payload_unlisted() -> Files:
    return build() | {"payload/extra.floe": b"x"}


@scenario("FormatError", "A folder in payload/ that nobody listed.", make="mkdir payload/extra")
def payload_unlisted_folder() -> Files:
    return build()


@scenario("FormatError", "There is no payload folder.", make="remove payload")
def payload_folder_missing() -> Files:
    return build()


@scenario("FormatError", "Signatures that are a fifo.", make=f"fifo {SIGNATURES}")
def signatures_fifo() -> Files:
    return build()


@scenario("FormatError", "A payload file that is a link to one.", make=f"link {PAYLOAD}")
def payload_link() -> Files:
    return build()


@scenario("FormatError", "payload/ itself is a link.", make="link payload")
def payload_folder_link() -> Files:
    return build()


@scenario("FormatError", "A payload file that is a fifo.", make=f"fifo {PAYLOAD}")
def payload_fifo() -> Files:
    return build()


@scenario("FormatError", "A payload file that is a folder.", make=f"folder {PAYLOAD}")
def payload_folder() -> Files:
    return build()


@scenario("FormatError", "A payload file that is a socket.", make=f"socket {PAYLOAD}")
def payload_socket() -> Files:
    return build()


@scenario("FormatError", "A manifest that is a link.", make=f"link {MANIFEST}")
def manifest_link() -> Files:
    return build()


@scenario("FormatError", "A manifest that is a fifo.", make=f"fifo {MANIFEST}")
def manifest_fifo() -> Files:
    return build()


@scenario("FormatError", "A manifest that is a device without an end.", make=f"zero {MANIFEST}")
def manifest_device() -> Files:
    return build()


@scenario("FormatError", "A manifest of 17 MiB.", make=f"large {MANIFEST} 17825792")
def manifest_too_large() -> Files:
    return build()


@scenario("FormatError", "A keys.json of 65 MiB.", make=f"large {KEYS} 68157440")
def keys_too_large() -> Files:
    return build()


def main() -> None:
    global WORK, CONFIG
    shutil.rmtree(HERE, ignore_errors=True)
    (SITE / "keys").mkdir(parents=True, mode=0o700)
    seed("site")
    provider = site().provider("local")
    for key in ("a", "b", "c", "gone"):
        provider.create_key(key, "aes256", {})
    for key, kind in (
        ("p256", "hpke-p256"),
        ("p384", "hpke-p384"),
        ("x25519", "hpke-x25519"),
        ("hybrid", "hpke-mlkem768-x25519"),
        ("mlkem", "hpke-mlkem1024"),
    ):
        provider.create_key(key, kind, {})
    for key, kind in (
        ("publisher", "ed25519"),
        ("stranger", "ed25519"),
        ("pq", "ml-dsa-65"),
        ("pq5", "ml-dsa-87"),
    ):
        provider.create_key(key, kind, {})
        pem = PublicKey(provider.public_key(key)).to_pem()
        if key != "stranger":
            (SITE / f"{key}.pem").write_bytes(pem)
    (SITE / "keymgmt.toml").write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n\n'
        '[policy]\npublishers = { "publisher.pem" = ["*"], "pq.pem" = ["*"], "pq5.pem" = ["*"] }\n'
    )
    CONFIG = site()
    with tempfile.TemporaryDirectory() as work:
        WORK = Path(work)
        for name, expect, comment, extra, make in SCENARIOS:
            seed(name)
            folder = HERE / name / "model.sealed"
            for path, data in (make() or {}).items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
            header = f"expect: {expect}\n{extra}comment: {comment}\n"
            (HERE / name / "vector.txt").write_text(header)
    # The site of those who open has not all keys of those who sealed.
    for file in (SITE / "keys").iterdir():
        if file.name.startswith(("gone", "stranger", "versions", ".")):
            file.unlink()
    print(f"{len(SCENARIOS)} vectors")  # noqa: T201


if __name__ == "__main__":
    main()
