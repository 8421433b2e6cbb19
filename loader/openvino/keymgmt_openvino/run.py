"""Run a sealed model once and show its answer."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import openvino as ov
import typer

import keymgmt
from keymgmt.console import clean, console, print_json, table
from keymgmt.errors import ConfigError
from keymgmt_openvino import load

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["app"]

app = typer.Typer(help=__doc__, add_completion=False)

DYNAMIC = 8  # the length of an open dimension of a random input; the first dimension becomes 1


@app.command()
def run(
    context: typer.Context,
    # With a parser it is known as a path, and stays a str: pathlib would spoil a location.
    path: Annotated[
        str, typer.Argument(metavar="OUT.sealed", help="The sealed model.", parser=str)
    ],
    device: Annotated[str, typer.Option(help="OpenVINO device.")] = "CPU",
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="[NAME=]FILE",
            help="A .npy for one input, or a .npz with arrays named as the inputs. "
            "Inputs that are not given are random.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the outputs to this .npz; they are not encrypted.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Refuse a model of another name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs.")] = 0,
    file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Which graph, if the sealed folder has several."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the compiled model here, sealed to this device; not for language models.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="For a language model; without it, stdin is read."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="For a language model: the longest answer.")
    ] = 128,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest values to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load a sealed model, run it, and show the answer.

    An OpenVINO GenAI folder gets a prompt and streams its answer; any other model infers with
    .npy, .npz or random inputs.

    Examples:
        keymgmt run resnet50.sealed --input image.npy
        keymgmt run llama.sealed --prompt "Once upon a time"
    """
    # The kind is not verified yet. It only chooses between two loaders, and both verify.
    if (
        file is None
        and keymgmt.inspect(path, keys=context.obj.config()).manifest.kind == "openvino-genai"
    ):
        from keymgmt_openvino._run_llm import run_llm

        for option, value in (("--cache", cache), ("--input", given), ("--output", output)):
            if value:
                raise ConfigError(f"{option} is not for language models", hint="leave it out")
        run_llm(
            path,
            device,
            context.obj.config(),
            name=name,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            as_json=as_json,
        )
        return
    if prompt is not None:
        raise ConfigError("--prompt is only for language models", hint="leave it out")
    arrays = _read_arrays(given or [])
    started = time.perf_counter()
    with load(path, device, name=name, keys=context.obj.config(), cache=cache, file=file) as model:
        loaded = time.perf_counter()
        inputs, sources = _inputs(model.inputs, arrays, np.random.default_rng(seed))
        began = time.perf_counter()
        result = model(inputs)
        first = time.perf_counter()
        result = model(inputs)
        second = time.perf_counter()
        outputs = {_name(port, n): np.asarray(result[n]) for n, port in enumerate(model.outputs)}
        title = model.name
    seconds = {"load": loaded - started, "first": first - began, "second": second - first}
    if output is not None:
        np.savez(output, **outputs)  # type: ignore[arg-type]
    if as_json:
        report = {
            "format": "keymgmt-run/1",
            "model": title,
            "device": device,
            "seconds": {key: round(value, 6) for key, value in seconds.items()},
            "inputs": {
                key: {**_shape(value), "from": sources[key]} for key, value in inputs.items()
            },
            "outputs": {
                key: {
                    **_shape(value),
                    "top": [(at, _json_number(number)) for at, number in _top(value, top)],
                }
                for key, value in outputs.items()
            },
        }
        print_json(report)
        return
    out = console()
    out.print(f"{clean(title)} on {device}")
    out.print(
        table(
            ["input", "type", "shape", "from"],
            [(key, value.dtype, list(value.shape), sources[key]) for key, value in inputs.items()],
        )
    )
    out.print()
    out.print(
        table(
            ["output", "type", "shape", f"largest {top}"],
            [
                (
                    key,
                    value.dtype,
                    list(value.shape),
                    "  ".join(f"{at}: {number:.6g}" for at, number in _top(value, top)),
                )
                for key, value in outputs.items()
            ],
        )
    )
    out.print()
    out.print(
        f"load {seconds['load']:.3f} s, first inference {seconds['first']:.3f} s, "
        f"second {seconds['second']:.3f} s"
    )


def _read_arrays(given: list[str]) -> dict[str, NDArray[Any]]:
    """Input name -> array; the key "" is an array without the name of an input."""
    arrays: dict[str, NDArray[Any]] = {}
    for option in given:
        name, equals, file = option.partition("=")
        if not equals or Path(option).exists():
            name, file = "", option
        try:
            loaded = np.load(file, allow_pickle=False)
            named = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {name: loaded}
        except (OSError, ValueError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot read the input {file}: {reason}", hint="numpy.save writes such a file"
            ) from error
        if repeated := arrays.keys() & named.keys():
            raise ConfigError(
                f"{option}: the input {min(repeated)!r} is given twice",
                hint="say which input it is: --input NAME=FILE",
            )
        arrays |= named
    return arrays


def _inputs(
    ports: list[ov.ConstOutput], arrays: dict[str, NDArray[Any]], random: np.random.Generator
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """An array for every input, and its source: file or random."""
    names = {_name(port, number): port for number, port in enumerate(ports)}
    arrays = dict(arrays)
    if "" in arrays:
        missing = [name for name in names if name not in arrays]
        if len(missing) != 1:
            raise ConfigError(
                "it is not clear which input the .npy file is for",
                hint=f"say --input NAME=FILE; the inputs are {', '.join(names)}",
            )
        arrays[missing[0]] = arrays.pop("")
    if unknown := arrays.keys() - names.keys():
        raise ConfigError(
            f"the model has no input {min(unknown)!r}", hint=f"its inputs are {', '.join(names)}"
        )
    inputs: dict[str, NDArray[Any]] = {}
    for name, port in names.items():
        kind = port.element_type.to_dtype()
        if name in arrays:
            array = arrays[name]
            if not np.can_cast(array.dtype, kind, "same_kind"):
                raise ConfigError(
                    f"the input {name} takes {kind}, and the file has {array.dtype}",
                    hint=f"save it as {kind}: numpy.save(file, array.astype({str(kind)!r}))",
                )
            if not port.partial_shape.compatible(_partial(array)):
                raise ConfigError(
                    f"the input {name} has the shape {port.partial_shape}, "
                    f"and the file {list(array.shape)}",
                    hint="a '?' in a shape takes any length; the number of dimensions is fixed",
                )
            inputs[name] = array.astype(kind, copy=False)
        else:
            inputs[name] = _random(port, kind, random)
    return inputs, {name: "file" if name in arrays else "random" for name in names}


def _partial(array: NDArray[Any]) -> ov.PartialShape:
    return ov.PartialShape(list(array.shape))


def _random(port: ov.ConstOutput, kind: Any, random: np.random.Generator) -> NDArray[Any]:
    shape = [_length(dimension, axis) for axis, dimension in enumerate(port.partial_shape)]
    if np.issubdtype(kind, np.floating):
        return random.standard_normal(shape).astype(kind)
    # Most likely these are indices of a vocabulary, or a mask: 0 and 1 are valid for both.
    return random.integers(0, 2, shape).astype(kind)


def _length(dimension: ov.Dimension, axis: int) -> int:
    if dimension.is_static:
        return int(dimension.get_length())
    length = DYNAMIC if axis else 1
    limit = dimension.max_length  # -1 for no limit
    return max(int(dimension.min_length), min(length, limit) if limit > 0 else length)


def _name(port: ov.ConstOutput, number: int) -> str:
    return str(port.any_name) if port.names else str(number)


def _shape(array: NDArray[Any]) -> dict[str, Any]:
    return {"type": str(array.dtype), "shape": list(array.shape)}


def _json_number(number: float) -> float | str:
    """A number, or the text "NaN", "Infinity" or "-Infinity", which JSON has no numbers for."""
    return number if math.isfinite(number) else json.dumps(number)


def _top(array: NDArray[Any], count: int) -> list[tuple[str, float]]:
    """The largest values, each with its index as text."""
    if array.dtype.kind not in "fiub" or not array.size:
        return []
    flat = array.ravel()
    order = np.argsort(-flat.astype(np.float64), kind="stable")[:count]
    indices = [np.unravel_index(int(at), array.shape) for at in order]
    return [
        (",".join(str(int(part)) for part in index), float(flat[at]))
        for index, at in zip(indices, order, strict=True)
    ]
