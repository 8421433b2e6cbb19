"""The payload engine: whole files, any part of them, and every way that a file can be wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import random
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import whole_floe
from programs import PEAK_KIB, run_python

from keymgmt import floe
from keymgmt.errors import ConfigError, FormatError, IntegrityError, SealedModelError
from keymgmt.floe import FloeParameters
from keymgmt.sealed.ciphertext import FileCiphertext
from keymgmt.sealed.digests import leaf_hash, tree_root
from keymgmt.sealed.payload import PayloadReader, digest_payload, seal_payload

L = 1024
STEP = L - 32
KEY = bytes(range(32))
AAD = b"files/weights.bin"
seal = partial(seal_payload, key=KEY, aad=AAD, segment_length=L)
SIZES = [0, 1, STEP - 1, STEP, STEP + 1, 2 * STEP, 2 * STEP + 1, 7 * STEP - 1, 7 * STEP + 13]
Digest = Literal["blake3", "sha256"]


class Sealed:
    """A file, its ciphertext and its root; both files stay open while the test runs."""

    def __init__(self, directory: Path, size: int, digest: Digest = "blake3") -> None:
        self.plaintext = random.Random(size).randbytes(size)
        self.digest: Digest = digest
        self.path = directory / f"{size}.floe"
        source = directory / f"{size}.bin"
        source.write_bytes(self.plaintext)
        self.source_fd = os.open(source, os.O_RDONLY)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        self.root = seal(self.source_fd, size, self.fd, digest=digest)

    @property
    def size(self) -> int:
        return len(self.plaintext)

    def ciphertext(self) -> FileCiphertext:
        return FileCiphertext(os.dup(self.fd))

    def digested(self) -> bytes:
        with contextlib.closing(self.ciphertext()) as source:
            return digest_payload(source, self.size, segment_length=L, digest=self.digest)

    def reader(self, *, checked: bool = True, aad: bytes = AAD, key: bytes = KEY) -> PayloadReader:
        root = self.root if checked else None
        return PayloadReader(
            self.ciphertext(),
            self.size,
            key=key,
            aad=aad,
            segment_length=L,
            digest=self.digest,
            root=root,
        )

    def flip(self, offset: int) -> None:
        (byte,) = os.pread(self.fd, 1, offset)
        os.pwrite(self.fd, bytes([byte ^ 0x10]), offset)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.source_fd)


@pytest.fixture(params=SIZES)
def sealed(request, tmp_path) -> Iterator[Sealed]:
    sealed = Sealed(tmp_path, request.param)
    yield sealed
    sealed.close()


@pytest.fixture
def seven(tmp_path) -> Iterator[Sealed]:
    sealed = Sealed(tmp_path, 7 * STEP - 5)
    yield sealed
    sealed.close()


def test_what_is_sealed_is_a_floe_ciphertext(sealed):
    ciphertext = sealed.path.read_bytes()
    assert len(ciphertext) == floe.ciphertext_length(sealed.size, L)
    assert whole_floe.decrypt(KEY, AAD, ciphertext, FloeParameters(L)) == sealed.plaintext


def test_all_is_read(sealed):
    for checked in (True, False):
        buffer = bytearray(sealed.size)
        with sealed.reader(checked=checked) as reader:
            reader.read_into(buffer)
            reader.verify()
            reader.read_into(buffer)
        assert buffer == sealed.plaintext


def test_a_small_file_opens_no_file_of_the_system(seven):
    """Asking for the processors' quota for each took two thirds of the time of a small file."""
    watching = False
    opened: list[object] = []

    def note(event: str, values: tuple[object, ...]) -> None:  # a hook stays: hence the switch
        if watching and event == "open":
            opened.append(values[0])

    sys.addaudithook(note)
    with seven.reader() as reader:
        watching = True
        reader.read_into(bytearray(seven.size))
        watching = False
    assert opened == []


@pytest.mark.parametrize("cache", ["cold", "half", "cannot tell", "broken"])
def test_what_is_not_in_the_page_cache_is_fetched_with_what_comes_after_it(
    seven, cache, monkeypatch
):
    asked: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT and cache == "cold":
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        if flags == os.RWF_NOWAIT and cache == "half":
            return real(fd, [buffers[0][: L // 2]], offset)
        if flags == os.RWF_NOWAIT and cache == "cannot tell":
            raise OSError(errno.EOPNOTSUPP, "no such flag here")
        if len(buffers) > 1:
            asked.append(sum(map(len, buffers)))
            if cache == "broken":
                raise OSError(errno.EIO, "a bad block further on")
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with seven.reader() as reader:
        room = bytearray(seven.size)
        reader.read_into(room)
    assert room == seven.plaintext
    assert bool(asked) == (cache != "cannot tell")
    assert not asked or max(asked) == 8 * L


def test_offsets_of_the_descriptors_stay(seven):
    with seven.reader() as reader:
        reader.verify()
    assert os.lseek(seven.fd, 0, os.SEEK_CUR) == 0
    assert os.lseek(seven.source_fd, 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("digest", ["blake3", "sha256"])
def test_the_root_is_the_tree_over_header_and_segments(tmp_path, digest):
    sealed = Sealed(tmp_path, 3 * STEP + 1, digest)
    ciphertext = sealed.path.read_bytes()
    parts = [ciphertext[:74]] + [ciphertext[74 + i * L : 74 + (i + 1) * L] for i in range(4)]
    root = tree_root(digest, b"".join(leaf_hash(digest, part) for part in parts))
    assert sealed.root == root
    assert sealed.digested() == root
    with sealed.reader() as reader:
        reader.verify()
    sealed.close()


def check_refused(sealed: Sealed, *, checked: bool) -> None:
    """No way of reading lets it through, and no buffer keeps a byte of it."""
    before = bytes(b"?" * sealed.size)
    buffer = bytearray(before)
    with pytest.raises(SealedModelError), sealed.reader(checked=checked) as reader:
        reader.read_into(buffer)
    assert set(buffer) <= set(b"\0?")
    with pytest.raises(SealedModelError), sealed.reader(checked=checked) as reader:
        reader.verify()
    with (
        pytest.raises(SealedModelError),
        sealed.reader(checked=checked) as reader,
        reader.open() as file,
    ):
        file.read()


@pytest.mark.parametrize("checked", [True, False])
def test_any_flipped_byte_is_refused(tmp_path, checked):
    sealed = Sealed(tmp_path, 2 * STEP + 3)
    length = sealed.path.stat().st_size
    places = {*range(90), *range(90, length, 41), 74 + L - 1, 74 + L, length - 1}
    for offset in sorted(places):
        sealed.flip(offset)
        check_refused(sealed, checked=checked)
        assert sealed.digested() != sealed.root
        sealed.flip(offset)
    with sealed.reader(checked=checked) as reader:
        reader.verify()
    sealed.close()


@pytest.mark.parametrize("checked", [True, False])
def test_another_length_is_refused(sealed, checked):
    length = sealed.path.stat().st_size
    for other in {0, 73, 74, 75, length - L, length - 32, length - 1, length + 1, length + 32}:
        if 0 <= other != length:
            os.truncate(sealed.path, other)
            check_refused(sealed, checked=checked)
            with pytest.raises(IntegrityError, match=f"has {other} bytes"):
                sealed.digested()
            os.truncate(sealed.path, length)


def test_another_size_is_refused(sealed):
    for size in {sealed.size - 1, sealed.size + 1, sealed.size + STEP} - {-1}:
        with pytest.raises(IntegrityError, match="bytes seal to"):
            PayloadReader(sealed.ciphertext(), size, key=KEY, aad=AAD, segment_length=L)


@pytest.mark.parametrize("checked", [True, False])
def test_swapped_and_repeated_segments_are_refused(seven, checked):
    original = seven.path.read_bytes()
    for one, other in [(0, 1), (1, 5), (4, 5)]:
        moved = bytearray(original)
        a, b = (slice(74 + i * L, 74 + (i + 1) * L) for i in (one, other))
        moved[a], moved[b] = original[b], original[a]
        os.pwrite(seven.fd, moved, 0)
        check_refused(seven, checked=checked)
        moved[b] = original[b]
        os.pwrite(seven.fd, moved, 0)
        check_refused(seven, checked=checked)


def test_another_key_context_or_segment_length_is_refused(seven):
    with pytest.raises(IntegrityError):
        seven.reader(key=bytes(32))
    with pytest.raises(IntegrityError):
        seven.reader(aad=b"files/other.bin")
    # A segment length that makes the same number of segments, and so the same length of file.
    with pytest.raises(FormatError, match="parameters"):
        PayloadReader(seven.ciphertext(), seven.size, key=KEY, aad=AAD, segment_length=L + 1)


def test_a_valid_ciphertext_of_another_root_is_refused_and_wiped(seven):
    """Whoever holds the DEK can forge segments; the digest, under the signature, refuses them."""
    root = seven.root
    forged = seal(seven.source_fd, seven.size, seven.fd, digest="blake3")
    assert forged != root
    buffer = bytearray(b"?" * seven.size)
    with seven.reader() as reader:
        with pytest.raises(IntegrityError, match="manifest"):
            reader.read_into(buffer)
        assert buffer == bytes(seven.size)
        with reader.open() as file:
            first = bytearray(10)
            with pytest.raises(IntegrityError, match="manifest"):
                file.readinto(first)
            assert first == bytes(10)


def test_random_access_compares_each_segment_with_the_checked_file(seven):
    with seven.reader() as reader, reader.open() as file:
        assert file.read(10) == seven.plaintext[:10]
        other = seal(seven.source_fd, seven.size, seven.fd, digest="blake3")
        assert other != seven.root
        file.seek(3 * STEP)
        with pytest.raises(IntegrityError):
            file.read(10)


def test_a_damaged_segment_stops_random_access_only_there_without_digests(seven):
    seven.flip(74 + 3 * L + 100)
    with seven.reader(checked=False) as reader, reader.open() as file:
        assert file.read(STEP) == seven.plaintext[:STEP]
        file.seek(3 * STEP)
        with pytest.raises(IntegrityError, match="segment 3"):
            file.read(1)
        file.seek(-5, io.SEEK_END)
        assert file.read() == seven.plaintext[-5:]


def test_random_access_equals_the_plaintext(sealed):
    rng = random.Random(1)
    whole = io.BytesIO(sealed.plaintext)
    with sealed.reader() as reader, reader.open() as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        for _ in range(200):
            offset, length = rng.randrange(sealed.size + 20), rng.randrange(3 * STEP)
            assert file.seek(offset) == whole.seek(offset)
            assert file.read(length) == whole.read(length)
            assert file.tell() == whole.tell()
        assert file.seek(0, io.SEEK_END) == sealed.size
        assert file.read(1) == b""
        file.seek(0)
        assert file.read() == sealed.plaintext
        with pytest.raises(ValueError, match="seek"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_threads_read_one_payload_at_once(seven):
    wrong: list[object] = []
    with seven.reader() as reader:

        def read(seed: int) -> None:
            rng = random.Random(seed)
            try:
                with reader.open() as file:
                    for _ in range(50):
                        offset = rng.randrange(seven.size)
                        file.seek(offset)
                        if file.read(99) != seven.plaintext[offset : offset + 99]:
                            wrong.append(offset)
            except Exception as error:  # noqa: BLE001 - seen by the assertion
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_failure_in_one_segment_wipes_the_whole_buffer(seven):
    seven.flip(74 + 6 * L + 20)
    buffer = bytearray(b"?" * seven.size)
    with seven.reader(checked=False) as reader, pytest.raises(IntegrityError, match="segment 6"):
        reader.read_into(buffer)
    assert buffer == bytes(seven.size)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_wipes_the_buffer(seven, error):
    def progress(done: int) -> None:
        raise error

    buffer = bytearray(b"?" * seven.size)
    with seven.reader() as reader:
        with pytest.raises(error):
            reader.read_into(buffer, progress)
        assert buffer == bytes(seven.size)
        assert not [t for t in threading.enumerate() if t.name.startswith("keymgmt-payload")]
        reader.read_into(buffer)
    assert buffer == seven.plaintext


def test_progress_ends_at_the_size(sealed):
    told: list[int] = []
    with sealed.reader() as reader:
        reader.read_into(bytearray(sealed.size), told.append)
    assert told == sorted(told)
    assert told[-1] == sealed.size


def test_a_buffer_of_another_length_is_refused(seven):
    with seven.reader() as reader:
        for length in (0, seven.size - 1, seven.size + 1):
            with pytest.raises(ValueError, match="buffer"):
                reader.read_into(bytearray(length))
        with pytest.raises(ValueError, match="writable"):
            reader.read_into(bytes(seven.size))


def test_a_closed_reader_reads_nothing(seven):
    reader = seven.reader()
    reader.close()
    reader.close()
    buffer = bytearray(seven.size)
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(buffer)
    assert buffer == bytes(seven.size)


def test_a_source_that_changes_is_refused(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(5 * STEP))
    with source.open("rb") as file, target.open("wb") as out:

        def changing(size: int, change: int | None = None) -> None:
            def progress(done: int) -> None:
                if change is not None:
                    os.truncate(source, change)

            seal(
                file.fileno(),
                size,
                out.fileno(),
                digest="blake3",
                name="weights.bin",
                progress=progress,
            )

        changing(5 * STEP)
        for size in (5 * STEP - 1, 5 * STEP + 1):
            with pytest.raises(ConfigError, match=r"weights\.bin changed"):
                changing(size)
        for change in (STEP, 6 * STEP):
            with pytest.raises(ConfigError, match=r"weights\.bin changed"):
                changing(source.stat().st_size, change)


def test_an_error_of_reading_names_the_source_and_not_the_target(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(STEP))
    # A file that is open for writing alone cannot be read, as a bad disk cannot.
    with (tmp_path / "out").open("wb") as out:
        unreadable = os.open(source, os.O_WRONLY)
        try:
            with pytest.raises(OSError, match=r"Bad file descriptor: 'weights\.bin'"):
                seal(
                    unreadable,
                    STEP,
                    out.fileno(),
                    digest="blake3",
                    name="weights.bin",
                )
        finally:
            os.close(unreadable)


def test_a_full_disk_is_the_systems_error(seven):
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space"):  # noqa: PTH123
        seal_payload(
            seven.source_fd,
            seven.size,
            full.fileno(),
            key=KEY,
            aad=AAD,
            segment_length=L,
            digest="blake3",
        )


SEAL_AND_VERIFY = f"""
{PEAK_KIB}
import os, sys
from keymgmt.sealed.ciphertext import FileCiphertext
from keymgmt.sealed.payload import PayloadReader, seal_payload
source, target, size = os.open(sys.argv[1], os.O_RDONLY), sys.argv[2], int(sys.argv[3])
fd = os.open(target, os.O_RDWR | os.O_CREAT)
common = dict(key=bytes(32), aad=b"", segment_length=1 << 20, digest="blake3")
before = peak_kib()
root = seal_payload(source, size, fd, **common)
with PayloadReader(FileCiphertext(fd), size, root=root, **common) as reader:
    reader.verify()
    with reader.open() as file:
        file.seek(size - 10)
        assert file.read() == bytes(10)
print(peak_kib() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    size = 300 << 20
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    result = run_python(SEAL_AND_VERIFY, tmp_path / "sparse", tmp_path / "out", size, check=True)
    cores = len(os.sched_getaffinity(0))
    assert int(result.stdout) < (16 + 8 * cores) * 1024  # KiB


def test_an_error_holds_nothing_of_its_caller_once_it_was_handled(seven):
    """Or a model whose load failed would stay in memory until the collector comes by."""

    class Held:
        pass

    def attempt() -> weakref.ref[Held]:
        held = Held()
        with seven.reader() as reader, contextlib.suppress(IntegrityError):
            reader.read_into(bytearray(seven.size), progress=lambda _: None)
            pytest.fail("it was read")
        return weakref.ref(held)

    seven.flip(2000)
    gc.collect()
    gc.disable()
    try:
        assert attempt()() is None
    finally:
        gc.enable()
