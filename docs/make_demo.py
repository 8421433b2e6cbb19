"""Draw the end of what ``keymgmt demo`` prints into docs/demo.svg: ``python docs/make_demo.py``."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

PICTURE: Final = Path(__file__).with_name("demo.svg")
WIDTH: Final = 100

# Rich's own names a font of another host. Each line says how long it is, so the reader's will do.
FORMAT: Final = re.sub(
    r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
).replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")


def picture() -> str:
    """Run the demo, and draw its output from where the model runs."""
    program = Path(sys.executable).with_name("keymgmt")
    terminal = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    done = subprocess.run(
        [program, "demo"],
        env=os.environ | terminal | {"COLUMNS": str(WIDTH)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = Text.from_ansi(done.stdout.rstrip())
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(text[text.plain.index("4  Run") :])
    return console.export_svg(title="keymgmt demo", code_format=FORMAT, unique_id="demo")


def words(drawn: str) -> list[str]:
    """The words of a picture, without what differs from run to run: times, keys, a key's type."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    text = unescape(" ".join(texts)).replace("\xa0", " ")
    return re.sub(r"\b[0-9a-f]{16}\b|\w+ [01]\.\d{4}|[\d.,]+", "#", text).split()


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
