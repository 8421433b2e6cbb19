"""The two files that Gramine makes of SGX, without SGX: their quotes are of a root of our own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


class Gramine:
    """A folder with ``user_report_data`` and ``quote``, for one reader at a time.

    ``quote`` is a FIFO, whose reader waits until somebody writes: then report data has been
    written. Each FIFO serves once, so that a slow reader never gets two quotes in one.
    """

    def __init__(self, folder: Path, quote: Callable[[bytes], bytes]) -> None:
        folder.mkdir()
        self.report_data, self.quote = folder / "user_report_data", folder / "quote"
        self.report_data.touch()
        self._make, self._new = quote, folder / "new"
        os.mkfifo(self.quote)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def toml(self) -> str:
        """What stands for ``"sgx"`` in a config."""
        return (
            f'{{ kind = "sgx", user_report_data = "{self.report_data}", quote = "{self.quote}" }}'
        )

    def _serve(self) -> None:
        while True:
            with self.quote.open("wb") as file:
                os.mkfifo(self._new)
                self._new.rename(self.quote)
                file.write(self._make(self.report_data.read_bytes()))
