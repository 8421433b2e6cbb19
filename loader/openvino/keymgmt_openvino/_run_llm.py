"""``keymgmt run`` on a sealed language model: a prompt in, tokens streamed out."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from keymgmt.console import console, print_json
from keymgmt.errors import ConfigError
from keymgmt_openvino._ask import ask
from keymgmt_openvino.genai import load_llm

if TYPE_CHECKING:
    from keymgmt import Config

__all__ = ["run_llm"]


def run_llm(
    path: str,
    device: str,
    config: Config,
    *,
    name: str | None,
    prompt: str | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Load, generate greedily, and print: the text on stdout as it comes, timings on stderr."""
    text = prompt if prompt is not None else _read_prompt()
    pieces: list[tuple[float, str]] = []

    def show(piece: str) -> None:
        pieces.append((time.perf_counter(), piece))
        if not as_json:
            # The model's own words; whatever control characters they have are the terminal's risk,
            # so only what is printable goes there.
            shown = "".join(c for c in piece if c.isprintable() or c in "\n\t")
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(shown.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()

    started = time.perf_counter()
    with load_llm(path, device, name=name, keys=config) as llm:
        loaded = time.perf_counter()
        # An embedder's folder looks like a language model's, until it is asked something.
        result = ask(
            f"{llm.name} answers no prompt",
            llm.generate,
            [text],
            streamer=show,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        done = time.perf_counter()
        count = result.perf_metrics.get_num_generated_tokens()
        title = llm.name
    first = pieces[0][0] if pieces else done
    seconds = {"load": loaded - started, "first_token": first - loaded, "all": done - loaded}
    if as_json:
        print_json(
            {
                "format": "keymgmt-run-llm/1",
                "model": title,
                "device": device,
                "prompt": text,
                "text": result.texts[0],
                "tokens": count,
                "seconds": {key: round(value, 6) for key, value in seconds.items()},
            }
        )
        return
    sys.stdout.write("\n")
    console(stderr=True).print(
        f"load {seconds['load']:.3f} s, first token {seconds['first_token']:.3f} s, "
        f"{count} tokens in {seconds['all']:.3f} s"
    )


def _read_prompt() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("prompt, ended by Ctrl-D:\n")
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("the prompt is empty", hint='say --prompt "TEXT", or pipe it in')
    return text
