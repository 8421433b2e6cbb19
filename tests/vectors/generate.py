"""Makes tests/vectors/sealed: one scenario a folder, by the small function named after it.

    python tests/vectors/generate.py            (needs the file backend)

A scenario is `NAME/vector.txt` (what a reader must say, and why) beside `NAME/model.sealed`. All
randomness comes from a counter, so the same code makes the same bytes. The private keys in
`site/` are for these vectors alone.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keymgmt._dek
from keymgmt import Config
from keymgmt._dek import Dek
from keymgmt._recipients import resolve_group
from keymgmt._seal import _FileContent, write_sealed
from keymgmt._sign import Signer
from keymgmt._verify import PublicKey
from keymgmt.sealed import derive
from keymgmt.sealed.canonical import dump
from keymgmt.sealed.keys import UnlockPolicy, wrap_group
from keymgmt.sealed.manifest import Manifest, manifest_hash
from keymgmt.sealed.signatures import Signatures

HERE = Path(__file__).parent / "sealed"
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

    keymgmt._dek.fill_random = fill


SITE = HERE / "site"


def site(root: Path = SITE) -> Config:
    return Config(
        {
            "providers": {"local": {"backend": "file", "path": str(root / "keys")}},
            "policy": {"publishers": {"publisher.pem": ["*"]}},
        },
        path=root / "keymgmt.toml",
    )


WORK: Path
CONFIG: Config
DEK: Dek


def content(size: int, name: str = "x") -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


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
        contents[path] = _FileContent(file)
    base = Manifest(
        id=os.urandom(16),
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
    DEK = Dek.generate()
    write_sealed(
        out,
        contents,
        DEK,
        [resolve_group(text, CONFIG) for text in to],
        Signer(CONFIG, sign) if sign else None,
        template=dataclasses.replace(base, **template),
    )
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def rewrapped(files: Files, manifest: bytes, dek: Dek | None = None) -> Files:
    """The same with another manifest that the publisher signed and the recipients open."""
    digest = manifest_hash(manifest)
    group = wrap_group(dek or DEK, digest, resolve_group("local:a", CONFIG))
    model_id = bytes.fromhex(json.loads(manifest)["id"])
    policy = UnlockPolicy.make(dek or DEK, model_id, digest, [group])
    signed = Signatures().with_signature(*Signer(CONFIG, "local:publisher").sign(manifest))
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
    return rewrapped(files, dump(value))


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Files:
    """Edit a small file as anybody could."""
    files = build()
    value = json.loads(files[name])
    change(value)
    return files | {name: dump(value)}


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
    signed = signed.with_signature(*Signer(CONFIG, "local:publisher").sign(files[MANIFEST]))
    return files | {SIGNATURES: signed.to_bytes()}


@scenario("ok", "A publisher's ML-DSA-65 key.")
def signed_with_ml_dsa() -> Files:
    return build(sign="local:pq")


@scenario("ok", "Public-key recipients of every kind in one group.")
def hpke_recipients() -> Files:
    return build(to=("local:p256+local:x25519+local:hybrid",))


@scenario("ok", "Every member of the manifest at its largest or longest.")
def members_at_their_bounds() -> Files:
    return build(
        name="a" * 64,
        release=(1 << 53) - 1,
        kind="k" * 32,
        metadata={f"{i:064}": "v" * 40 for i in range(64)},
    )


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
    from keymgmt import floe
    from keymgmt.floe import FloeParameters

    model_id = bytes.fromhex(value["id"])
    forged = floe.encrypt(
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
    return with_manifest(lambda m: m.update(commitment="00" * 32))


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


def _files(*paths: str) -> Callable[[dict[str, Any]], None]:
    def change(m: dict[str, Any]) -> None:
        entry = m["files"][0]
        m["files"] = [entry | {"path": path} for path in paths]

    return change


_bad_manifest("newer_format", "A version to come.", lambda m: m.update(format="keymgmt-sealed/2"))
_bad_manifest("older_format", "The version before.", lambda m: m.update(format="keymgmt-sealed/0"))
_bad_manifest("unknown_member", "A member nobody knows.", lambda m: m.update(extra=1))
_bad_manifest("missing_member", "A member is missing.", lambda m: m.pop("release"))
_bad_manifest("wrong_type", "A string where an integer belongs.", lambda m: m.update(release="1"))
_bad_manifest("boolean_release", "true is no integer.", lambda m: m.update(release=True))
_bad_manifest("negative_release", "An integer below zero.", lambda m: m.update(release=-1))
_bad_manifest("unknown_profile", "A profile to come.", lambda m: m.update(profile="fast"))
_bad_manifest("segment_too_small", "Below 4096.", lambda m: m.update(segment_length=2048))
_bad_manifest("segment_too_large", "Over 4 MiB.", lambda m: m.update(segment_length=1 << 23))
_bad_manifest("segment_no_power", "No power of two.", lambda m: m.update(segment_length=4097))
_bad_manifest("no_files", "An empty model.", lambda m: m.update(files=[]))
_bad_manifest("main_unlisted", "main is no file.", lambda m: m.update(main="other"))
_bad_manifest("upper_case_hex", "Hex in capitals.", lambda m: m.update(id=m["id"].upper() + ""))
_bad_manifest("bad_name", "A name with a slash.", lambda m: m.update(name="a/b"))
_bad_manifest("bad_time", "No time of day.", lambda m: m.update(created="2026-01-01T24:00:00Z"))
_bad_manifest("metadata_object", "Metadata in metadata.", lambda m: m.update(metadata={"a": {}}))
_bad_manifest("path_parent", "A path that climbs.", _files("../../etc/passwd"))
_bad_manifest("path_absolute", "An absolute path.", _files("/etc/passwd"))
_bad_manifest("path_empty_part", "Two slashes.", _files("a//b"))
_bad_manifest("path_backslash", "A Windows path.", _files("a\\..\\b"))
_bad_manifest("path_device", "The name of a device.", _files("aux.bin"))
_bad_manifest("path_drive", "A drive.", _files("c:model"))
_bad_manifest("path_control", "A line end in a path.", _files("a\nb"))
_bad_manifest("path_bidi", "A character that turns the direction.", _files("a\u202eb"))
_bad_manifest("path_not_nfc", "Two code points for one letter.", _files("gru\u0308n"))
_bad_manifest("path_trailing_dot", "A dot that Windows drops.", _files("a."))
_bad_manifest("paths_case", "Two names for one file.", _files("M.bin", "m.bin"))
_bad_manifest("paths_casefold", "Two names after full case folding.", _files("STRASSE", "straße"))
_bad_manifest("paths_unsorted", "Not in order.", _files("b", "a"))
_bad_manifest("paths_twice", "One path twice.", _files("a", "a"))
_bad_manifest("path_file_and_folder", "A file that is a folder.", _files("a", "a/b"))
_bad_manifest("path_floe_folder", "A folder where a ciphertext lies.", _files("a", "a.floe/b"))
_bad_manifest("path_too_deep", "33 folders.", _files("/".join("a" * 33)))
_bad_manifest("path_too_long", "A part of 251 bytes.", _files("a" * 251))


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
    return files | {KEYS: dump(value)}


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
    model_id = bytes.fromhex(json.loads(files[MANIFEST])["id"])
    return files | {KEYS: UnlockPolicy.make(share, model_id, policy.manifest, [group]).to_bytes()}


def _recipient(change: Callable[[dict[str, Any]], None]) -> Files:
    files = build()
    value = json.loads(files[KEYS])
    change(value["groups"][0]["recipients"][0])
    return files | {KEYS: dump(value)}


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
_bad_recipient("unknown_member", "FormatError", "An address.", address="https://evil.example")


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
    return files | {SIGNATURES: dump(mine)}


@scenario("FormatError", "Two signatures of one key.")
def signature_twice() -> Files:
    return edited(SIGNATURES, lambda s: s["signatures"].append(s["signatures"][0]))


@scenario("FormatError", "Signatures of something else.")
def signature_of_another_type() -> Files:
    return edited(SIGNATURES, lambda s: s.update(payloadType="application/json"))


@scenario("FormatError", "A signature that names its algorithm.")
def signature_with_an_algorithm() -> Files:
    return edited(SIGNATURES, lambda s: s["signatures"][0].update(alg="none"))


# --- the folder -------------------------------------------------------------------------------


@scenario("FormatError", "A file in payload/ that nobody listed.")
def payload_unlisted() -> Files:
    return build() | {"payload/extra.floe": b"x"}


@scenario("FormatError", "A folder in payload/ that nobody listed.", make="mkdir payload/extra")
def payload_unlisted_folder() -> Files:
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
        ("x25519", "hpke-x25519"),
        ("hybrid", "hpke-mlkem768-x25519"),
    ):
        provider.create_key(key, kind, {})
    for key, kind in (("publisher", "ed25519"), ("stranger", "ed25519"), ("pq", "ml-dsa-65")):
        provider.create_key(key, kind, {})
        pem = PublicKey(provider.public_key(key)).to_pem()
        if key != "stranger":
            (SITE / f"{key}.pem").write_bytes(pem)
    (SITE / "keymgmt.toml").write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n\n'
        '[policy]\npublishers = { "publisher.pem" = ["*"], "pq.pem" = ["*"] }\n'
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
        if file.name.startswith(("gone", "stranger", ".")):
            file.unlink()
    print(f"{len(SCENARIOS)} vectors")  # noqa: T201


if __name__ == "__main__":
    main()
