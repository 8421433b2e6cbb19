"""How fast the payload engine is, against its limit, over segment lengths, digests and threads.

    python benchmarks/payload.py                # decrypt 1 GiB in segments of 64 KiB to 4 MiB
    python benchmarks/payload.py --seal         # seal
    python benchmarks/payload.py --size 256M --rounds 3 --segments 1M

Decrypting: *limit* is a bare loop of ``AESGCM.decrypt_into`` over the same segments, mapped from
the page cache, into the same kind of memory. It reads no file, checks no length and no digest.
*reading* is that loop with a ``preadv`` of each segment into a private buffer before.
*fresh* is a new process writing to new anonymous memory; *cold* is the same, the file not in the
page cache; *repeated* is the median of five loads into the same memory.

Sealing: *limit* is a bare loop of read, ``encrypt_into``, BLAKE3 and write.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import statistics
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
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

from keymgmt import floe
from keymgmt.floe import HEADER_LENGTH, OVERHEAD
from keymgmt.sealed.ciphertext import FileCiphertext
from keymgmt.sealed.digests import DigestName
from keymgmt.sealed.payload import PayloadReader, digest_payload, seal_payload

KEY = bytes(32)
DIGESTS: tuple[DigestName, ...] = ("blake3", "sha256")


def short(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def make_source(path: Path, size: int) -> None:
    block = os.urandom(min(size, 16 << 20))
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(block[:left])


def seal(source: Path, target: Path, segment: int, digest: DigestName) -> bytes:
    read, write_to = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        return seal_payload(
            read,
            source.stat().st_size,
            write_to,
            key=KEY,
            aad=b"",
            segment_length=segment,
            digest=digest,
        )
    finally:
        os.close(read)
        os.close(write_to)


def on_threads(threads: int, work: Callable[[], None]) -> None:
    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# What the engine cannot be faster than, with none of its code. Any key does: the speed is the same.


def limit_decrypt(
    path: Path, size: int, segment: int, threads: int, *, reading: bool
) -> Callable[[bytearray], None]:
    cipher, step, count = _cipher(path, segment), segment - OVERHEAD, size // (segment - OVERHEAD)
    fd = os.open(path, os.O_RDONLY)
    mapped = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))

    def work(buffer: bytearray) -> None:
        target, indices = memoryview(buffer), itertools.count()

        def loop() -> None:
            private = memoryview(bytearray(segment))
            while (i := next(indices)) < count:
                start = HEADER_LENGTH + i * segment
                part = private if reading else mapped[start : start + segment]
                if reading:
                    os.preadv(fd, [private], start)
                aad = struct.pack(">QB", i, False)
                cipher.decrypt_into(part[4:16], part[16:], aad, target[i * step : (i + 1) * step])

        on_threads(threads, loop)

    return work


def _cipher(path: Path, segment: int) -> AESGCM:
    with path.open("rb") as file:
        header = file.read(HEADER_LENGTH)
    state = floe.FloeDecryptor(KEY, b"", header, floe.FloeParameters(segment))
    return state._cipher_of(0)


def limit_seal(source: Path, target: Path, segment: int, threads: int) -> None:
    cipher, step = AESGCM(KEY), segment - OVERHEAD
    count, indices = source.stat().st_size // step, itertools.count()
    read, write_to = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)

    def loop() -> None:
        plain, sealed = bytearray(step), memoryview(bytearray(segment))
        while (i := next(indices)) < count:
            os.preadv(read, [plain], i * step)
            cipher.encrypt_into(os.urandom(12), plain, None, sealed[16:])
            blake3(sealed).digest()
            os.pwrite(write_to, sealed, HEADER_LENGTH + i * segment)

    on_threads(threads, loop)
    os.close(read)
    os.close(write_to)


def run_case(case: dict[str, str | int]) -> Run:
    directory, size = Path(str(case["directory"])), int(case["size"])
    what, segment, threads = str(case["what"]), int(case["segment"]), int(case["threads"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    source, path = directory / "plain", directory / f"{segment}.floe"
    if case["kind"] == "seal":
        target = directory / "sealing"
        target.unlink(missing_ok=True)
        if what == "limit":
            return timed(lambda: limit_seal(source, target, segment, threads))
        return timed(lambda: seal(source, target, segment, what))  # type: ignore[arg-type]

    fd = os.open(path, os.O_RDONLY)
    if case["kind"] == "cold":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if what in ("limit", "reading"):
        work = limit_decrypt(path, size, segment, threads, reading=what == "reading")
    else:
        roots = json.loads((directory / f"{segment}.json").read_text())
        digest: DigestName = "sha256" if what == "sha256" else "blake3"
        root = None if what == "off" else bytes.fromhex(roots[digest])

        def work(buffer: bytearray) -> None:
            with PayloadReader(
                FileCiphertext(os.dup(fd)),
                size,
                key=KEY,
                aad=b"",
                segment_length=segment,
                digest=digest,
                root=root,
            ) as reader:
                reader.read_into(buffer)

    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if case["kind"] == "huge":
        memory.madvise(mmap.MADV_HUGEPAGE)
    run = timed(lambda: work(memory))  # type: ignore[arg-type]
    if case["kind"] == "repeated":
        runs = [timed(lambda: work(memory)) for _ in range(5)]  # type: ignore[arg-type]
        run = {what: statistics.median(run[what] for run in runs) for what in run}
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=length, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--segments", default="64K,256K,1M,4M")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--kinds", default="fresh,repeated", help="fresh, cold, repeated, huge")
    parser.add_argument("--seal", action="store_true", help="measure sealing, not decrypting")
    add_touch(parser)
    add_json(parser)
    parser.add_argument("--plot", type=Path, help="write a bar chart (SVG)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case)))
        return

    segments = [length(text) for text in options.segments.split(",")]
    threads = [int(text) for text in options.threads.split(",")]
    kinds = ["seal"] if options.seal else options.kinds.split(",")
    columns = ["limit", *([] if options.seal else ["reading", "off"]), *DIGESTS]
    with tempfile.TemporaryDirectory(prefix="payload-", dir=Path.cwd()) as name:
        directory = Path(name)
        make_source(directory / "plain", options.size)
        for segment in segments:
            path = directory / f"{segment}.floe"
            seal(directory / "plain", path, segment, "blake3")
            with contextlib.closing(FileCiphertext(os.open(path, os.O_RDONLY))) as source:
                roots = {
                    digest: digest_payload(
                        source,
                        options.size,
                        segment_length=segment,
                        digest=digest,
                    ).hex()
                    for digest in DIGESTS
                }
            os.sync()  # or its pages cannot leave the cache
            (directory / f"{segment}.json").write_text(json.dumps(roots))
        cases = {
            f"{kind} {segment} {count} {what}": [
                sys.executable,
                __file__,
                "--case",
                json.dumps(
                    {
                        "directory": name,
                        "size": options.size,
                        "kind": kind,
                        "segment": segment,
                        "threads": count,
                        "what": what,
                    }
                ),
            ]
            for kind in kinds
            for segment in segments
            for count in threads
            for what in columns
        }
        runs = interleave(cases, options.rounds, touch=options.touch)

    rows = []
    for kind, segment, count in itertools.product(kinds, segments, threads):
        limit = runs[f"{kind} {segment} {count} limit"]
        row = [kind, short(segment), str(count), f"{options.size / 1e9 / median(limit):.2f}"]
        for what in columns[1:]:
            case = runs[f"{kind} {segment} {count} {what}"]
            row.append(
                f"{options.size / 1e9 / median(case):.2f} "
                f"({speedup(case, limit):.2f}, {speedup(case, limit, 'cpu'):.2f})"
            )
        rows.append(row)
    print(f"GB/s (in brackets: part of the limit by time, by CPU), {options.rounds} rounds\n")
    print(table(["memory", "segment", "threads", *columns], rows))
    if options.plot:
        figures = {
            f"{kind}, {count} thread{'s' * (count > 1)}": {
                (f"{short(segment)}, {what}"): options.size
                / 1e9
                / median(runs[f"{kind} {segment} {count} {what}"])
                for segment in segments
                for what in columns
            }
            for kind, count in itertools.product(kinds, threads)
        }
        bare = ["limit", *([] if options.seal else ["reading"])]
        limits = [f"{short(segment)}, {what}" for segment in segments for what in bare]
        bars(options.plot, figures, "GB/s", limits)
    about = machine("cryptography", "blake3") | {"size": options.size, "touch": options.touch}
    finish(options.json, about, runs)


if __name__ == "__main__":
    main()
