"""An interrupt before any line of a load leaves no weights and no open file behind."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import numpy as np
import openvino as ov
import pytest
from keymgmt_openvino import _load, _read, load
from waiting import until

WEIGHTS = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory, seal) -> Path:
    from openvino import opset13 as op

    x = op.parameter([-1, 64], np.float32, name="x")
    node = op.result(op.matmul(x, op.constant(WEIGHTS), False, True))
    plain = tmp_path_factory.mktemp("small") / "small.xml"
    ov.save_model(ov.Model([node], [x], "small"), plain, compress_to_fp16=False)
    assert WEIGHTS.tobytes() in plain.with_suffix(".bin").read_bytes()
    return seal(plain, "small")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Interrupt:
    """A trace function: Ctrl-C when one of the loader's modules comes to its line number ``at``."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen: set[int] = set()

    def __call__(self, frame: FrameType, event: str, argument: object):
        if frame.f_code.co_filename not in (_load.__file__, _read.__file__):
            return None
        # Not where a line is left again: Python itself may be interrupted between a block and the
        # end of its ``with``.
        if event == "line" and frame.f_lineno not in self.seen:
            self.seen.add(frame.f_lineno)
            if len(self.seen) == self.at:
                raise KeyboardInterrupt
        return self


def test_an_interrupt_before_any_line(small, site, watched, core):
    with load(small, keys=site, core=core) as model:  # imports and caches what is made once
        expected = model(np.ones((1, 64), np.float32))[0].tobytes()

    def work(interrupt):
        sys.settrace(interrupt)
        try:
            return load(small, keys=site, core=core)
        except KeyboardInterrupt:
            return None

    files, at, had_weights = descriptors(), 0, 0
    while True:
        interrupt = Interrupt(at := at + 1)
        # A thread each: tracing, and what it may upset in Python, ends with it.
        with ThreadPoolExecutor(1) as pool:
            model = pool.submit(work, interrupt).result()
        if model:
            break
        storages = [memory.bytes for memory in watched]
        watched.clear()  # the last that holds them: the loader's frames are gone
        for storage in storages:
            until(lambda storage=storage: WEIGHTS.tobytes() not in storage.tobytes())
            had_weights += not storage.any()
        assert descriptors() == files, f"line {max(interrupt.seen)}"
    assert at > 40
    assert had_weights > 8
    with model:
        assert model(np.ones((1, 64), np.float32))[0].tobytes() == expected
