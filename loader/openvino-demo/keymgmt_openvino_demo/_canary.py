"""A model whose weights are easy to recognise, and the search for them.

``python -m keymgmt_openvino_demo._canary SEALED CONFIG DEVICE`` loads and runs it, prints ``ready``
and waits for the end of its input. ``keymgmt leakcheck`` watches this program unless it is given
another command.
"""

from __future__ import annotations

import io
import secrets
import sys
from typing import TYPE_CHECKING, Final

import numpy as np
import openvino as ov
from openvino import opset13 as op

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Canary"]

_PIECE: Final = 16 << 20
WIDTH: Final = 1024


class Canary:
    """One fully connected layer of f32 [1024, 1024]; each row repeats 16 random numbers.

    Attributes:
        needles: name of a part -> bytes by which it is recognised.
    """

    def __init__(self) -> None:
        pattern = np.random.default_rng(secrets.randbits(128)).standard_normal(16)
        self._row = pattern.astype(np.float32)
        self._token = f"canary-{secrets.token_hex(16)}"
        self.needles: Final = {
            "the weights": self._row.tobytes(),
            "the weights as f16": self._row.astype(np.float16).tobytes(),
            "the weights, repacked": np.repeat(self._row[:1], 16).tobytes(),
            "the graph": self._token.encode(),
        }

    def save(self, path: Path) -> None:
        """Write it as IR, .xml and .bin; the plaintext of a canary does no harm."""
        x = op.parameter([-1, WIDTH], np.float32, name="x")
        x.output(0).get_tensor().set_names({"x"})
        weights = op.constant(np.tile(self._row, (WIDTH, WIDTH // len(self._row))))
        node = op.matmul(x, weights, transpose_a=False, transpose_b=True)
        node.set_friendly_name(self._token)
        ov.save_model(ov.Model([op.result(node)], [x], "canary"), path, compress_to_fp16=False)

    def search(self, file: io.RawIOBase, size: int) -> str | None:
        """The part of the canary that is in the first ``size`` bytes of ``file``, or None."""
        overlap = max(map(len, self.needles.values()))
        tail = b""
        while size > 0 and (piece := file.read(min(size, _PIECE))):
            size -= len(piece)
            data = tail + piece
            for part, needle in self.needles.items():
                if needle in data:
                    return part
            tail = data[-overlap:]
        return None


def main(path: str, config: str, device: str) -> None:
    """Load and run the model at ``path``, then wait."""
    from keymgmt_openvino import load

    with load(path, device, keys=config) as model:
        model(np.ones((1, WIDTH), np.float32))
        sys.stdout.write(f"ready {int(model.locked)}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
