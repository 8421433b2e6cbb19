"""The payload engine: one file to and from one FLOE ciphertext, on all cores, in little memory.

Works on file descriptors, which stay the caller's, and never moves their offsets, and on whatever
else is a ``Ciphertext``. Each thread has buffers of its own; a segment is read once into private
memory, and the same bytes are hashed and decrypted, so a file that changes underneath cannot pass
one check and fail the other.

Rules: the plaintext's size comes from the caller, who trusts it (the manifest says it), and
decides the file's exact length, the number of segments and which one is final. Nothing is handed
out before the segment it came from, and where a root is given the whole file's digest, was
checked. On any failure or interrupt the caller's buffer is wiped once no thread writes to it.
"""

from __future__ import annotations

import io
import itertools
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

from keymgmt import floe
from keymgmt._crypto.dek import wipe
from keymgmt._system.cgroup import cpus
from keymgmt._system.closing import Closing
from keymgmt._system.files import naming
from keymgmt._system.fork import ForkSafe
from keymgmt._system.pages import BLOCK, FreshMemory, unwritten
from keymgmt.errors import ConfigError, IntegrityError
from keymgmt.floe import HEADER_LENGTH, OVERHEAD, FloeDecryptor, FloeEncryptor, FloeParameters
from keymgmt.sealed.ciphertext import read_exactly, write_exactly
from keymgmt.sealed.digests import DigestName, digest_length, leaf_hash, tree_root

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from keymgmt.sealed.ciphertext import Ciphertext

    Progress = Callable[[int], object]  # told how many bytes of plaintext are done, in total

__all__ = ["CheckedLeaves", "PayloadReader", "digest_in_order", "digest_payload", "seal_payload"]

_PROGRESS_INTERVAL = 0.1  # seconds


class _Layout:
    """The positions of the segments of ``size`` bytes of plaintext."""

    def __init__(self, size: int, segment_length: int) -> None:
        self.size, self.segment_length = size, segment_length
        self.step = segment_length - OVERHEAD
        self.count = floe.segment_count(size, segment_length)
        # A thread takes as many as fill a huge page: two threads in one would clear it twice.
        self.run = max(1, BLOCK // segment_length)

    def plaintext_of(self, index: int) -> tuple[int, int]:
        """Offset and length of a segment in the plaintext."""
        start = index * self.step
        return start, min(self.step, self.size - start)

    def segment_of(self, index: int) -> tuple[int, int]:
        """Offset and length of an encrypted segment in the file."""
        return HEADER_LENGTH + index * self.segment_length, self.plaintext_of(index)[1] + OVERHEAD

    def end_of_run(self, index: int) -> int:
        """Where the segments end, in the file, that one thread takes together with this one."""
        last = min(index - index % self.run + self.run, self.count) - 1
        return sum(self.segment_of(last))

    def check_file(self, source: Ciphertext) -> None:
        expected = floe.ciphertext_length(self.size, self.segment_length)
        found = source.length()
        if found != expected:
            raise IntegrityError(
                f"the payload file has {found} bytes, and {self.size} bytes seal to {expected}",
                hint="it was cut off or changed; fetch it again",
            )


class _Worker(Protocol):
    """The work of one thread; created in it, called for each segment, closed at the end."""

    def __call__(self, index: int) -> int:
        """Process one segment; returns its bytes of plaintext."""

    def close(self) -> None:
        """Wipe the private buffers."""


def _in_parallel(
    threads: int | None,
    layout: _Layout,
    make_worker: Callable[[], _Worker],
    progress: Progress | None,
) -> None:
    """Give each segment's index to a worker of ``threads``, or of one for each processor.

    On return no thread is running any more. The first error ends it, and so does an interrupt or an
    error of ``progress``.
    """
    count = layout.count
    run = layout.run
    runs = -(-count // run)
    threads = min(runs, threads or cpus()) if runs > 1 else 1
    starts = itertools.count(0, run)  # next() of it is one step under the GIL: none comes twice
    stop = threading.Event()
    done: list[int] = []

    def work() -> None:
        worker = make_worker()
        try:
            while not stop.is_set() and (start := next(starts)) < count:
                for index in range(start, min(start + run, count)):
                    done.append(worker(index))
        except BaseException:
            stop.set()
            raise
        finally:
            worker.close()

    others = threads if progress else threads - 1  # this thread works too, or tells the progress
    if not others:
        work()
        return
    pool = ThreadPoolExecutor(others, thread_name_prefix="keymgmt-payload")
    futures: list[Future[None]] = []
    pending: set[Future[None]] | None
    future: Future[None] | None
    try:
        futures += [pool.submit(work) for _ in range(others)]
        if not progress:
            work()
        pending = set(futures)
        while pending:
            timeout = _PROGRESS_INTERVAL if progress else None
            pending = wait(pending, timeout, FIRST_EXCEPTION).not_done
            if progress:
                progress(sum(done))
        for future in futures:
            future.result()
    finally:
        stop.set()
        _join(pool)
        # An error's traceback holds this frame, which must not hold the error: only the collector
        # would let go of what the caller's frames hold.
        pending = future = None
        futures.clear()


def _join(pool: ThreadPoolExecutor) -> None:
    """Wait for the threads, even after a second interrupt: the caller wipes what they write to."""
    interrupt: BaseException | None = None
    while True:
        try:
            pool.shutdown(wait=True)
        except KeyboardInterrupt as error:
            interrupt = error
        else:
            break
    if interrupt:
        raise interrupt


class _Leaves:
    """The leaf hashes of one file as threads compute them: the header's, then each segment's."""

    def __init__(self, digest: DigestName, header: bytes, count: int) -> None:
        self.digest: DigestName = digest
        self._length = digest_length(digest)
        self._hashes = bytearray(self._length * (1 + count))
        self._hashes[: self._length] = leaf_hash(digest, header)

    def add(self, index: int, segment: Buffer) -> None:
        self._hashes[self._place(index)] = leaf_hash(self.digest, segment)

    def check(self, index: int, segment: Buffer) -> None:
        if leaf_hash(self.digest, segment) != self._hashes[self._place(index)]:
            raise IntegrityError(f"segment {index} changed since the file was checked")

    def _place(self, index: int) -> slice:
        return slice(self._length * (1 + index), self._length * (2 + index))

    def root(self) -> bytes:
        return tree_root(self.digest, self._hashes)


class _Sealer:
    def __init__(
        self,
        source: int | PayloadReader | memoryview,
        target_fd: int,
        layout: _Layout,
        encryptor: FloeEncryptor,
        leaves: _Leaves,
        name: str,
    ) -> None:
        self._source, self._target_fd, self._name = source, target_fd, name
        self._layout, self._encryptor, self._leaves = layout, encryptor, leaves
        length = layout.segment_of(0)[1]
        self._plaintext = memoryview(unwritten(length - OVERHEAD))
        self._segment = memoryview(unwritten(length))

    def __call__(self, index: int) -> int:
        start, length = self._layout.plaintext_of(index)
        plaintext = self._plaintext[:length]
        segment = self._segment[: length + OVERHEAD]
        if isinstance(self._source, memoryview):
            plaintext = self._source[start : start + length]
        elif isinstance(self._source, PayloadReader):
            self._source.read_segment_into(index, plaintext)
        else:
            with naming(self._name):  # else it would be taken for an error of the target
                whole = read_exactly(self._source, plaintext, start)
            if not whole:
                raise _changed(self._name)
        final = index == self._layout.count - 1
        self._encryptor.encrypt_segment_into(index, final, plaintext, segment)
        self._leaves.add(index, segment)
        write_exactly(self._target_fd, segment, self._layout.segment_of(index)[0])
        return length

    def close(self) -> None:
        wipe(self._plaintext)


def _changed(name: str) -> ConfigError:
    return ConfigError(
        f"{name} changed while it was being sealed", hint="seal it when nothing writes to it"
    )


def seal_payload(
    source: int | PayloadReader | memoryview,
    size: int,
    target_fd: int,
    *,
    key: Buffer,
    aad: bytes,
    segment_length: int,
    digest: DigestName,
    name: str = "the file",
    progress: Progress | None = None,
) -> bytes:
    """Encrypt a file of exactly ``size`` bytes to an empty file; the root of its digest tree.

    Memory is two segments per core, whatever the size. The target is not synced.

    Args:
        source: a regular file open for reading, or a payload of the same segment length, whose
            plaintext then never leaves this function's buffers; or bytes in memory.
        size: of the source in bytes, as the caller will write it down.
        target_fd: open for writing; left half-written if this raises.
        key: 32 bytes, of this one file.
        aad: what the ciphertext is bound to.
        segment_length: bytes of one encrypted segment.
        digest: the hash of the tree.
        name: of the source, for messages.
        progress: called in this thread with the bytes done so far; what it raises ends the work.

    Raises:
        ConfigError: the source does not have ``size`` bytes, or changed meanwhile.
        OSError: reading or writing failed.
    """
    layout = _Layout(size, segment_length)
    before = _state(source)
    if before is not None and before[0] != size:
        raise _changed(name)
    with FloeEncryptor(key, aad, FloeParameters(segment_length)) as encryptor:
        leaves = _Leaves(digest, encryptor.header, layout.count)
        write_exactly(target_fd, memoryview(encryptor.header), 0)
        _in_parallel(
            None,
            layout,
            lambda: _Sealer(source, target_fd, layout, encryptor, leaves, name),
            progress,
        )
    if _state(source) != before:
        raise _changed(name)
    return leaves.root()


def _state(source: int | PayloadReader | memoryview) -> tuple[int, int] | None:
    """Size and time of change of a plain file; a payload authenticates itself instead."""
    if not isinstance(source, int):
        return None
    info = os.fstat(source)
    return info.st_size, info.st_mtime_ns


class _Reader:
    """Reads segments into private memory, and hashes or decrypts them as requested."""

    def __init__(
        self,
        source: Ciphertext,
        layout: _Layout,
        leaves: _Leaves | None,
        decryptor: FloeDecryptor | None = None,
        target: FreshMemory | None = None,
        begun: list[int] | None = None,
    ) -> None:
        self._parts, self._layout, self._leaves = source.parts(), layout, leaves
        self._decryptor, self._target, self._begun = decryptor, target, begun
        needs_scratch = decryptor is not None and target is None
        self._scratch = memoryview(unwritten(layout.plaintext_of(0)[1] if needs_scratch else 0))

    def __call__(self, index: int) -> int:
        start, length = self._layout.plaintext_of(index)
        segment = self._parts.read(
            *self._layout.segment_of(index), until=self._layout.end_of_run(index)
        )
        if self._leaves is not None:
            self._leaves.add(index, segment)
        if self._decryptor is not None:
            if self._target is None:
                target = self._scratch[:length]
            else:
                if self._begun is not None:
                    self._begun.append(index)
                target = self._target.part(start, length)
            final = index == self._layout.count - 1
            self._decryptor.decrypt_segment_into(index, final, segment, target)
        return length

    def close(self) -> None:
        wipe(self._scratch)


def _read_header(source: Ciphertext) -> bytes:
    return bytes(source.parts().read(0, HEADER_LENGTH))


def digest_payload(
    source: Ciphertext,
    size: int,
    *,
    segment_length: int,
    digest: DigestName,
    progress: Progress | None = None,
) -> bytes:
    """The root of a payload file's digest tree, without any key.

    Args:
        source: the ciphertext; it stays open.
        size: bytes of the plaintext, as the manifest says.
        segment_length: bytes of one encrypted segment.
        digest: the hash of the tree.
        progress: called in this thread with the bytes done so far.

    Raises:
        IntegrityError: the file does not have the length that ``size`` makes.
        OSError: reading failed.
    """
    return _hash_leaves(source, _Layout(size, segment_length), digest, progress).root()


def digest_in_order(
    source: Ciphertext,
    size: int,
    each: Callable[[memoryview], object],
    *,
    segment_length: int,
    digest: DigestName,
) -> bytes:
    """The root as ``digest_payload`` gives it, of a file that is read from its start to its end.

    ``each`` is called with every part of the file, in their order; what it raises ends the work.
    """
    layout, parts = _Layout(size, segment_length), source.parts()
    layout.check_file(source)
    header = bytes(parts.read(0, HEADER_LENGTH))
    leaves = _Leaves(digest, header, layout.count)
    each(memoryview(header))
    for index in range(layout.count):
        segment = parts.read(*layout.segment_of(index), until=source.length())
        leaves.add(index, segment)
        each(segment)
    return leaves.root()


def _hash_leaves(
    source: Ciphertext, layout: _Layout, digest: DigestName, progress: Progress | None
) -> _Leaves:
    layout.check_file(source)
    leaves = _Leaves(digest, _read_header(source), layout.count)
    _in_parallel(source.threads, layout, lambda: _Reader(source, layout, leaves), progress)
    return leaves


class CheckedLeaves(ForkSafe):
    """The leaf hashes of one file whose root was checked; readers of that file may share it."""

    leaves: _Leaves | None = None

    def _renew(self) -> None:
        self.lock = threading.Lock()


class PayloadReader(Closing):
    """Decrypts one payload file: all of it in parallel, or any part.

    A context manager that wipes the derived keys. Any thread may call any method, except ``close``
    while another call runs.
    """

    def __init__(
        self,
        source: Ciphertext,
        size: int,
        *,
        key: Buffer,
        aad: bytes,
        segment_length: int,
        digest: DigestName = "blake3",
        root: bytes | None = None,
        checked_leaves: CheckedLeaves | None = None,
    ) -> None:
        """Check the file's length and its header; nothing else is read yet.

        Args:
            source: the ciphertext, which is closed with this reader, and if this raises.
            size: bytes of the plaintext, as the manifest says.
            key: 32 bytes, of this one file.
            aad: what the ciphertext is bound to.
            segment_length: bytes of one encrypted segment.
            digest: the hash of the tree.
            root: of the digest tree; None where digests are not to be checked.
            checked_leaves: of an earlier reader of the same file with the same root.

        Raises:
            FormatError: no FLOE header of these parameters.
            IntegrityError: the file has another length, or its header is of another key or AAD.
            OSError: reading failed.
        """
        self.size = size
        self._source = source
        self._digest, self._root = digest, root
        try:
            self._layout = _Layout(size, segment_length)
            self._layout.check_file(self._source)
            self._header = _read_header(self._source)
            self._decryptor = FloeDecryptor(key, aad, self._header, FloeParameters(segment_length))
        except BaseException:
            self._source.close()
            raise
        self._checked_leaves = checked_leaves or CheckedLeaves()

    def read_into(self, buffer: Buffer, progress: Progress | None = None) -> None:
        """Decrypt all of it into ``buffer``, which is writable and has exactly ``size`` bytes.

        Args:
            buffer: filled if this returns; if it raises, what was written of it is zeros.
            progress: called in this thread with the bytes done so far; what it raises ends it.

        Raises:
            FormatError, IntegrityError: the file is damaged or forged.
            OSError: reading failed.
            ValueError: ``buffer`` has another length.
        """
        view = memoryview(buffer).cast("B")
        if len(view) != self.size or view.readonly:
            raise ValueError(f"{self.size} bytes go into a writable buffer of that length")
        begun: list[int] = []
        try:
            self._prove(view, progress, begun)
        except BaseException:
            # Not all of it: of a file with holes, gigabytes were never written to and cost nothing.
            for index in begun:
                start, length = self._layout.plaintext_of(index)
                wipe(view[start : start + length])
            raise

    def verify(self, progress: Progress | None = None) -> None:
        """Decrypt every segment and keep nothing; raises as ``read_into`` does."""
        self._prove(None, progress)

    def _prove(
        self, target: memoryview | None, progress: Progress | None, begun: list[int] | None = None
    ) -> None:
        layout, leaves = self._layout, None
        layout.check_file(self._source)
        memory = None if target is None else FreshMemory(target)
        if self._root is not None:
            leaves = _Leaves(self._digest, self._header, layout.count)
        _in_parallel(
            self._source.threads,
            layout,
            lambda: _Reader(self._source, layout, leaves, self._decryptor, memory, begun),
            progress,
        )
        if leaves is not None:
            self._accept(leaves)

    def _accept(self, leaves: _Leaves) -> None:
        if leaves.root() != self._root:
            raise IntegrityError("the payload file is not the one that the manifest lists")
        self._checked_leaves.leaves = leaves

    def read_segment_into(self, index: int, target: Buffer) -> int:
        """Decrypt segment ``index`` into the start of ``target``; its bytes of plaintext.

        Where a root is given, the first call hashes the whole file and later ones compare.
        """
        with self._checked_leaves.lock:
            if self._root is not None and self._checked_leaves.leaves is None:
                self._accept(_hash_leaves(self._source, self._layout, self._digest, None))
        _, length = self._layout.plaintext_of(index)
        segment = self._source.parts().read(*self._layout.segment_of(index))
        if self._checked_leaves.leaves is not None:
            self._checked_leaves.leaves.check(index, segment)
        self._decryptor.decrypt_segment_into(
            index, index == self._layout.count - 1, segment, memoryview(target).cast("B")[:length]
        )
        return length

    def open(self, *, owned: bool = False) -> io.RawIOBase:
        """A read-only, seekable file of the plaintext.

        ``owned`` closes this reader with the file; else it must stay open meanwhile.
        """
        return _PayloadFile(self, self._layout, owned=owned)

    def close(self) -> None:
        """Wipe the derived keys; may be called again."""
        self._decryptor.close()
        self._source.close()


class _PayloadFile(io.RawIOBase, ForkSafe):
    """The plaintext as a file. Holds one decrypted segment, wiped when another is needed."""

    def __init__(self, reader: PayloadReader, layout: _Layout, *, owned: bool) -> None:
        io.RawIOBase.__init__(self)
        ForkSafe.__init__(self)
        self._reader, self._layout, self._owned = reader, layout, owned
        self._position = 0
        self._segment = bytearray(layout.plaintext_of(0)[1])
        self._held: int | None = None  # index of the segment in the buffer

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._layout.size}
        if whence not in base or base[whence] + offset < 0:
            raise ValueError(f"cannot seek to {offset} (whence {whence})")
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill ``buffer`` up to the end of the file; fewer bytes only there."""
        view = memoryview(buffer).cast("B")
        done = 0
        with self._lock:
            if self.closed:
                raise ValueError("I/O operation on closed file")
            try:
                if self._position == 0 and len(view) >= self._layout.size:
                    # All of it at once is checked while it is read, and need not be read twice.
                    self._reader.read_into(view[: self._layout.size])
                    self._position = done = self._layout.size
                while done < len(view) and self._position < self._layout.size:
                    index, skip = divmod(self._position, self._layout.step)
                    if self._held != index:
                        self._held = None
                        self._reader.read_segment_into(index, self._segment)
                        self._held = index
                    end = self._layout.plaintext_of(index)[1]
                    part = memoryview(self._segment)[skip : min(end, skip + len(view) - done)]
                    view[done : done + len(part)] = part
                    done += len(part)
                    self._position += len(part)
            except BaseException:
                wipe(view)
                raise
        return done

    def readall(self) -> bytes:
        """The rest of the plaintext, in one buffer of its length."""
        content = bytearray(max(0, self._layout.size - self._position))
        try:
            return bytes(memoryview(content)[: self.readinto(content)])
        finally:
            wipe(content)

    def close(self) -> None:
        with self._lock:
            if not self.closed:
                wipe(self._segment)
                self._held = None
                if self._owned:
                    self._reader.close()
            super().close()
