"""Seal a real model, load it from its sealed copy, and see what is refused; needs no server."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import openvino as ov
import typer
from keymgmt_openvino import load
from rich import box
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

import keymgmt
from keymgmt.console import clean, console
from keymgmt.errors import KeymgmtError
from keymgmt_openvino_demo import _magika
from keymgmt_openvino_demo._throwaway_keys import make_throwaway_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from keymgmt import Config

__all__ = ["app"]

app = typer.Typer(help=__doc__, add_completion=False)

_WIDTH: Final = 100


@app.command()
def demo() -> None:
    """Seal a real model, load it from its sealed copy, and see what is refused.

    Everything happens in a new folder below the temporary directory, which is removed at the end.
    No server, no network and no config of yours is used.

    Example:
        keymgmt demo
    """
    started = time.perf_counter()
    # What is refused below is on the screen; its audit events would only repeat it.
    logging.getLogger("keymgmt.audit").addHandler(logging.NullHandler())
    out = console()
    out.width = min(out.width, _WIDTH)
    _title(out)
    with tempfile.TemporaryDirectory(prefix="keymgmt-demo-") as name:
        _Demo(out, Path(name)).run()
    out.print(
        Text.assemble(
            (f"\nDone in {time.perf_counter() - started:.1f} s; the folder is removed. ", "bold"),
            "Your own: ",
            ("keymgmt init", "cyan"),
            ", then ",
            ("keymgmt seal MODEL OUT.sealed", "cyan"),
            ".",
        )
    )


def _title(out: Console) -> None:
    out.print(
        Panel(
            Text.assemble(
                ("A model on somebody else's disk\n", "bold"),
                "sealed with a key that stays home, opened in memory, never on a disk",
            ),
            box=box.HEAVY,
            style="cyan",
        )
    )


class _Demo:
    def __init__(self, out: Console, base: Path) -> None:
        self.out, self.base = out, base
        self.home = base / "site"
        self.sealed = base / "magika.sealed"

    def run(self) -> None:
        self._heading(1, "Keys", "a config, a key that wraps (KEK) and a publisher's signing key")
        self._keymgmt("init", "site")
        config = keymgmt.load_config(self.home / "keymgmt.toml")
        shown = (self.home / "keymgmt.toml").read_text().strip()
        self.out.print(Syntax(shown, "toml", background_color="default"))

        self._heading(2, "Model", "magika's classifier of file types (Apache-2.0), ONNX to IR")
        plain = self.base / "plain" / "magika.xml"
        plain.parent.mkdir(mode=0o700)
        _magika.convert(plain)
        weights = plain.with_suffix(".bin")
        self.out.print(
            f"{_size(_magika.model_directory() / 'model.onnx')} of ONNX became "
            f"{_size(plain)} of graph and {_size(weights)} of weights"
        )

        self._heading(3, "Seal", "encrypt, wrap the data key, sign")
        named = ("--name", "magika", "--release", "1")
        keys = ("--to", "local:models", "--sign", "local:publisher")
        self._keymgmt("seal", "plain/magika.xml", self.sealed.name, *named, *keys)
        self._show_folder()
        self._show_bytes(weights)

        self._heading(4, "Run", "the sealed copy beside the plaintext one, on CPU")
        line = 'with load("magika.sealed", name="magika") as model: model(inputs)'
        self.out.print(Text.assemble(("> ", "dim"), line))
        self._compare(plain, config)

        self._heading(5, "Refuse", "the same model, after somebody had a hand in it")
        self._show_refusals(self._refusals(config))

    def _heading(self, number: int, title: str, what: str) -> None:
        self.out.print()
        self.out.rule(
            Text.assemble((f"{number}  {title}", "bold cyan"), (f"  {what}", "dim")),
            align="left",
            style="dim",
        )

    def _keymgmt(self, *words: str) -> None:
        """Show a command and run it, in the demo's folder and with its config."""
        self.out.print(Text.assemble(("$ ", "dim"), f"keymgmt {shlex.join(words)}"))
        settings = {"KEYMGMT_CONFIG": str(self.home / "keymgmt.toml")}
        command = [sys.executable, "-m", "keymgmt.cli", *words]
        done = subprocess.run(
            command,
            cwd=self.base,
            env=os.environ | settings | {"COLUMNS": str(self.out.width)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        self.out.print(Text.from_ansi(done.stdout.decode().rstrip()))
        done.check_returncode()

    def _show_folder(self) -> None:
        said = {
            "manifest.json": "what it is: name, release, files and their digests",
            "keys.json": "who opens it: the data key, wrapped",
            "signatures.json": "who made it",
            "payload": "the model, encrypted (FLOE, AES-256-GCM)",
        }
        tree = Tree(Text(f"{self.sealed.name}/", style="bold"), guide_style="dim")
        for path in sorted(self.sealed.iterdir(), key=lambda each: list(said).index(each.name)):
            note = (f"  {said[path.name]}", "dim")
            if path.is_dir():
                branch = tree.add(Text.assemble(f"{path.name}/", note))
                for file in sorted(path.iterdir()):
                    branch.add(f"{file.name}  {_size(file)}")
            else:
                tree.add(Text.assemble(f"{path.name}  {_size(path)}", note))
        self.out.print(tree)

    def _show_bytes(self, weights: Path) -> None:
        offset = 4096
        table = Table(box=None, pad_edge=False)
        table.add_column("the same weights at 4096", style="dim")
        table.add_column()
        for title, file in (
            ("magika.bin", weights),
            ("payload/magika.bin.floe", self.sealed / "payload" / "magika.bin.floe"),
        ):
            with file.open("rb") as stream:
                stream.seek(offset)
                table.add_row(title, stream.read(16).hex(" "))
        self.out.print(table)

    def _compare(self, plain: Path, config: Config) -> None:
        files = self._samples()
        names = _magika.labels()
        began = time.perf_counter()
        reference = ov.Core().compile_model(plain, "CPU")
        plain_time = time.perf_counter() - began
        began = time.perf_counter()
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("file", "sealed says", "plaintext says", "same bits"):
            table.add_column(column)
        with load(self.sealed, name="magika", keys=config) as model:
            sealed_time = time.perf_counter() - began
            for file in files:
                inputs = _magika.features(file)
                ours = model(inputs)[0]
                theirs = reference(inputs, share_inputs=False)[0]
                same = np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
                table.add_row(
                    clean(file.name),
                    _answer(ours, names),
                    _answer(theirs, names),
                    Text("yes", "green") if same else Text("NO", "bold red"),
                )
                if not same:
                    raise KeymgmtError(f"the sealed model answered differently for {file}")
        self.out.print(table)
        self.out.print(
            f"read and compiled: sealed {sealed_time:.2f} s, plaintext {plain_time:.2f} s; "
            "its memory is wiped"
        )

    def _samples(self) -> list[Path]:
        """Real files that every machine has: this program's own, and those made just now."""
        model = _magika.model_directory()
        return [
            Path(keymgmt.errors.__file__),
            Path(ov._pyopenvino.__file__),
            model / "model.onnx",
            model / "README.md",
            self.sealed / "manifest.json",
            self.home / "publisher.pem",
            self.home / "keymgmt.toml",
        ]

    def _refusals(self, config: Config) -> Iterator[tuple[str, KeymgmtError | None]]:
        weights = Path("payload") / "magika.bin.floe"

        with self._copy() as copy:
            with (copy / weights).open("r+b") as file:
                file.seek(1_000_000)
                byte = file.read(1)[0]
                file.seek(1_000_000)
                file.write(bytes([byte ^ 1]))
            yield "one bit of the weights flipped", self._try(copy, config)

        with self._copy() as copy:
            os.truncate(copy / weights, (copy / weights).stat().st_size - 1000)
            yield "the last 1000 bytes cut off", self._try(copy, config)

        thief = self.base / "thief"
        with make_throwaway_keys(thief) as strict:
            yield "signed by a publisher not trusted", self._try(self.sealed, strict)
        # The thief trusts the real publisher; what is missing is the key.
        shutil.copy(self.home / "publisher.pem", thief)
        with keymgmt.load_config(thief / "keymgmt.toml") as stolen:
            yield "the folder stolen, another key", self._try(self.sealed, stolen)

        cache = {"CACHE_DIR": str(self.base / "cache")}
        yield (
            "OpenVINO's plaintext cache switched on",
            self._try(self.sealed, config, ov_config=cache),
        )

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        copy = self.base / "copy.sealed"
        shutil.copytree(self.sealed, copy)
        try:
            yield copy
        finally:
            shutil.rmtree(copy)

    def _try(self, path: Path, config: Config, **options: Any) -> KeymgmtError | None:
        try:
            load(path, name="magika", keys=config, **options).close()
        except KeymgmtError as error:
            return error
        return None

    def _show_refusals(self, refusals: Iterator[tuple[str, KeymgmtError | None]]) -> None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("what was done", max_width=24)
        table.add_column("what load() says")
        for what, error in refusals:
            if error is None:
                raise KeymgmtError(f"it was not refused: {what}")
            said = Text.assemble((type(error).__name__, "bold red"), ": ", clean(error))
            for attempt in getattr(error, "attempts", ()):
                why = f"{attempt.recipient}: {type(attempt.error).__name__}: {attempt.error}"
                said.append(f"\n  {clean(why)}", style="dim")
            if error.hint:
                said.append(f"\nhint: {clean(error.hint)}", style="cyan")
            table.add_row(what, said)
            table.add_row()
        self.out.print(table)


def _answer(scores: Any, names: list[str]) -> str:
    best = int(scores[0].argmax())
    return f"{names[best]} {scores[0][best]:.4f}"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size:,} bytes"
