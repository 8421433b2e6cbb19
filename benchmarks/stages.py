"""Where the time goes: seconds of CPU that each step takes for one GiB, one thread.

    python benchmarks/stages.py [--segment 1M]

CPU time and the best of many passes, so that a busy machine shows as little as can be.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from measure import Run, add_json, finish, machine, table

from keymgmt._system.pages import FreshMemory

SIZE = 256 << 20
MADV_POPULATE_WRITE = 23
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def stages(fd: int, segment: int) -> dict[str, Callable[[], object]]:
    """``fd``: a file of SIZE bytes made of one segment, over and over."""
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    private = memoryview(bytearray(segment))
    target = memoryview(mmap.mmap(-1, SIZE, flags=PRIVATE))
    mapped = memoryview(mmap.mmap(fd, SIZE, prot=mmap.PROT_READ))
    os.preadv(fd, [private], 0)

    def each(work: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for offset in range(0, SIZE, segment):
                work(offset)

        return run

    def read(offset: int) -> None:
        os.preadv(fd, [private], offset)

    def decrypt(source: memoryview, offset: int) -> None:
        cipher.decrypt_into(nonce, source[16:], None, target[offset : offset + segment - 32])

    def read_decrypt(offset: int) -> None:
        read(offset)
        decrypt(private, offset)

    def read_digest_decrypt(offset: int) -> None:
        read(offset)
        blake3(private).digest()
        decrypt(private, offset)

    def fresh(advice: int | None) -> None:
        memory = mmap.mmap(-1, SIZE, flags=PRIVATE)
        if advice is None:
            tried = FreshMemory(memoryview(memory))
            for offset in range(0, SIZE, segment):
                tried.part(offset, segment)
        else:
            memory.madvise(advice)
            memory.madvise(MADV_POPULATE_WRITE)

    return {
        "read into a private buffer": each(read),
        "decrypt from it": each(lambda offset: decrypt(private, offset)),
        "read and decrypt": each(read_decrypt),
        "decrypt from the mapped file": each(lambda o: decrypt(mapped[o : o + segment], o)),
        "BLAKE3": each(lambda _: blake3(private).digest()),
        "SHA-256": each(lambda _: hashlib.sha256(private).digest()),
        "read, BLAKE3 and decrypt": each(read_digest_decrypt),
        "fresh memory, 4 KiB pages": lambda: fresh(mmap.MADV_NOHUGEPAGE),
        "fresh memory, huge pages": lambda: fresh(mmap.MADV_HUGEPAGE),
        "fresh memory, tried": lambda: fresh(None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segment", choices=["64K", "256K", "1M", "4M"], default="1M")
    parser.add_argument("--passes", type=int, default=9)
    add_json(parser)
    options = parser.parse_args()
    segment = int(options.segment[:-1]) << {"K": 10, "M": 20}[options.segment[-1]]
    one = bytearray(struct.pack(">I12s", 0xFFFFFFFF, bytes(12)) + bytes(segment - 16))
    plain = os.urandom(segment - 32)
    AESGCM(bytes(32)).encrypt_into(bytes(12), plain, None, memoryview(one)[16:])
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(SIZE // segment):
            file.write(one)
        file.flush()
        work = stages(file.fileno(), segment)
        runs: dict[str, list[Run]] = {name: [] for name in work}
        for _ in range(options.passes):
            for name, run in work.items():
                started = time.process_time()
                run()
                spent = time.process_time() - started
                runs[name].append({"cpu_per_gib": spent * (1 << 30) / SIZE})
    best = {name: min(run["cpu_per_gib"] for run in each) for name, each in runs.items()}
    rows = [[name, f"{cpu:.3f}", f"{(1 << 30) / 1e9 / cpu:.1f}"] for name, cpu in best.items()]
    print(table(["step", "CPU s/GiB", "GB/s"], rows))
    finish(options.json, machine("cryptography", "blake3") | {"segment": segment}, runs)


if __name__ == "__main__":
    main()
