"""Plaintext in memory that OpenVINO owns, and when it is wiped.

Rules:
* The bytes are in an ``ov.Tensor`` whose storage OpenVINO allocated. Every graph, compiled model
  and request made from it keeps the storage alive and reads it until its own end. So dropping our
  reference is always safe, and wiping is safe only if our reference is the last one.
* The use count of the storage's shared pointer tells whether it is the last one. Python's own
  reference counts do not: an ``AsyncInferQueue`` or a request of another thread holds the storage
  from C++ alone.
* Where the use count cannot be read (another OpenVINO with another layout) the memory is freed and
  not wiped: a wipe too early gives silently wrong answers, which is the greater harm.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

import openvino as ov

from keymgmt.errors import KeymgmtError
from keymgmt.loading import check_free_memory, guard, libc, unguard, wipe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Memory", "filled", "release"]

log = logging.getLogger("keymgmt.openvino")

_WORD: Final = ctypes.sizeof(ctypes.c_void_p)


class Memory:
    """A buffer of ``size`` bytes for plaintext, in storage that OpenVINO owns.

    It is out of core dumps (MADV_DONTDUMP) and, within the limit of the process, kept from swap.

    Attributes:
        tensor: u8 tensor of shape [size]; hand it to OpenVINO, and keep no reference to it.
        size: bytes.
        address: address of the first byte.
        locked: whether it is kept from swap (mlock2).
        gone: whether our reference was dropped.
    """

    gone = True  # until __init__ has succeeded

    def __init__(self, size: int) -> None:
        """Allocate, without touching the pages yet.

        Raises:
            KeymgmtError: the system does not give that much memory.
        """
        try:
            self.tensor = ov.Tensor(ov.Type.u8, ov.Shape([size]))
        except (RuntimeError, MemoryError):
            raise KeymgmtError(
                f"the system gives no {size:,} bytes of memory for the weights",
                hint="nothing was started; look at ulimit -v and the limits of the container",
            ) from None
        self.size = size
        self.address: int = self.tensor.data.ctypes.data
        self.locked = guard(self.address, size)
        self.gone = False

    def view(self) -> memoryview:
        """The storage, writable; drop the view before the memory is released."""
        return memoryview(self.tensor.data)

    def in_use(self) -> bool:
        """Whether anything but this object holds the storage; True if that cannot be known."""
        if self.gone:
            return False
        try:
            return not _counting_works() or _use_count(self.tensor) != 1
        except OSError:  # such as no free descriptor: the caller asks again later
            return True

    def wipe(self) -> None:
        """Overwrite with zeros and drop our reference; only while ``in_use`` is false.

        May be called again.
        """
        if self.gone:
            return
        self.gone = True
        if self.size:
            wipe(self.view())
            unguard(self.address, self.size)
        del self.tensor

    def drop(self) -> None:
        """Drop our reference without overwriting; readers of the storage keep it alive."""
        if not self.gone:
            self.gone = True
            del self.tensor

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # A memory may be dropped without ``release``, as by an interrupt between two lines; the
        # rules hold all the same. At the end of the interpreter nothing is waited for.
        if not self.gone and not ending():
            release(self)


def filled(size: int, name: str, fill: Callable[[memoryview], object]) -> Memory:
    """New memory, which ``fill`` writes as a whole; wiped if ``fill`` fails.

    Raises:
        KeymgmtError: too little memory is free for ``name``.
    """
    check_free_memory(size, name)
    memory = Memory(size)
    try:
        if size:
            fill(memory.view())
    except BaseException:
        release(memory)
        raise
    return memory


def _read_word(address: int) -> int:
    # The kernel reads the address: if the layout is not as expected, that is an error and no crash.
    reader, writer = os.pipe()
    try:
        if libc.write(writer, address, _WORD) != _WORD:
            raise OSError(ctypes.get_errno(), "not an address")
        return int.from_bytes(os.read(reader, _WORD), sys.byteorder)
    finally:
        os.close(reader)
        os.close(writer)


def _use_count(tensor: ov.Tensor) -> int:
    # PyObject of pybind11 -> ov::Tensor -> its std::shared_ptr<ITensor> (pointer, control block)
    # -> use count of libstdc++'s control block, an int after the vtable.
    block = _read_word(_read_word(id(tensor) + object.__basicsize__) + _WORD)
    return _read_word(block + _WORD) & 0xFFFFFFFF


@functools.cache
def _counting_works() -> bool:
    try:
        tensor = ov.Tensor(ov.Type.u8, ov.Shape([64]))
        alone = _use_count(tensor)
        part = ov.Tensor(tensor, ov.Coordinate([0]), ov.Coordinate([1]))
        shared = _use_count(tensor)
        del part
        works = (alone, shared, _use_count(tensor)) == (1, 2, 1)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # so that functools.cache does not remember a result
        works = False
    if not works:
        log.warning(
            "the use count of a model's memory cannot be read in OpenVINO %s: "
            "the memory is freed at the end, but not overwritten",
            ov.__version__,
        )
    return works


class _Wiper:
    """Wipes released memories as soon as the last user of each is gone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Memory] = []
        self._thread: threading.Thread | None = None

    def add(self, memory: Memory) -> None:
        with self._changed:
            self._waiting.append(memory)
            if self.sweep():
                return
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="keymgmt wipe", daemon=True)
                self._thread.start()

    def sweep(self) -> bool:
        """Wipe memories without users; True if none is left."""
        with self._changed:
            # The list is changed in place: anywhere in here the garbage collector may end another
            # memory and so add it.
            for memory in tuple(self._waiting):
                if not memory.in_use():
                    memory.wipe()
                if memory.gone and memory in self._waiting:
                    self._waiting.remove(memory)
            return not self._waiting

    def _run(self) -> None:
        # There is no notice when a C++ owner ends, so the use counts are polled: often at first,
        # then once a second.
        pause = 0.01
        with self._changed:
            while not self.sweep():
                pause = 0.01 if self._changed.wait(pause) else min(pause * 1.5, 1.0)
            self._thread = None


_wiper = _Wiper()


def _forget() -> None:
    # A forked child does not have the thread; and to wipe its pages, the kernel would copy them.
    global _wiper
    _wiper = _Wiper()


atexit.register(lambda: _wiper.sweep())
os.register_at_fork(after_in_child=_forget)


def release(memory: Memory) -> None:
    """Wipe ``memory`` now, or, if anything made from it is alive, when the last user is gone."""
    try:
        works = _counting_works()
    except OSError:  # such as no free descriptor: the wiper asks again
        works = True
    if works:
        _wiper.add(memory)
    else:
        memory.drop()
