"""From the start of a process until a runtime has the model, sealed and plaintext.

    python benchmarks/exec.py                     # GGUF and ONNX of 512 MiB
    python benchmarks/exec.py --mib 2048 --rounds 5

*plaintext*: the program opens the file by path. *exec*: the same program under ``keymgmt exec``.
*mount* and *private folder*: ``keymgmt.mount`` and ``keymgmt.private_folder`` in the program. *from
memory*: ``keymgmt_onnxruntime.load``. *JWE*: what a first format of KServe's storage step does
before the program: ``jwcrypto`` decrypts each file, one JWE (A256GCM) of all of it, to a folder on
the disk. All is counted: the start of Python, imports, config, signature and digests.

*cpu* is that of all its processes, until they have ended. The peak is the largest RSS of any one
process of the way, which counts what it has mapped; *in files* is what the system's memory files
(tmpfs, memfd) grew by until it was ready, mapped or not. The ONNX model has its tensors in another
file, which ``mount`` does not serve. The page cache is warm.

It needs the loader for ONNX Runtime, the demo, ik-llama-cpp-python, gguf, onnx and jwcrypto, and to
be root.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from measure import Run, add_json, finish, interleave, machine, median, site, speedup, table

import keymgmt

LLAMA = Path(__file__).parent.parent / "tests" / "shared" / "llama.py"
WIDTH = 1024
READY = "print('ready', flush=True); sys.stdin.read()"

LOADS = {
    "gguf": "from ik_llama_cpp import IkLlama\n"
    "model = IkLlama(f'{folder}/m.gguf', n_ctx=64, n_threads=1, flash_attn=False, verbose=False)",
    "onnx": "import onnxruntime\nmodel = onnxruntime.InferenceSession(f'{folder}/m.onnx')",
}
FROM_MEMORY = "import keymgmt_onnxruntime\nmodel = keymgmt_onnxruntime.load(sys.argv[1], name='m')"
DECRYPT = """
import sys
from pathlib import Path
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK
source, target = map(Path, sys.argv[1:])
target.mkdir()
key = JWK.from_json((source / "key").read_text())
for file in source.glob("*.jwe"):
    sealed = JWE()
    sealed.deserialize(file.read_text(), key)
    (target / file.stem).write_bytes(sealed.payload)
"""


def program(kind: str, way: str = "plaintext") -> str:
    """Python that loads the model at its argument, says that it is ready, and waits."""
    if way == "from memory":
        return f"import sys\n{FROM_MEMORY}\n{READY}"
    if way == "plaintext":
        return f"import sys\nfolder = sys.argv[1]\n{LOADS[kind]}\n{READY}"
    opened = f"keymgmt.{way.replace(' ', '_')}(sys.argv[1], name='m')"
    # What is loaded inside of the block stays, as in an application.
    return (
        f"import sys, keymgmt\nwith {opened} as folder:\n"
        f"{textwrap.indent(LOADS[kind], '    ')}\n{READY}"
    )


def ways(kind: str) -> list[str]:
    only = "mount" if kind == "gguf" else "from memory"
    return ["plaintext", "exec", "private folder", only, "JWE"]


def run(kind: str, way: str, home: Path) -> Run:
    """One start, until the program says that it is ready."""
    plain, sealed, jwe = (home / f"{kind}{end}" for end in ("", ".sealed", ".jwe"))
    python = [sys.executable, "-c"]
    with tempfile.TemporaryDirectory(dir=home) as volume:
        before, begin = shmem(), time.perf_counter()
        peak = spent = 0.0
        if way == "JWE":
            source, plain = jwe, Path(volume) / "plain"
            peak, spent, _ = wait(subprocess.Popen([*python, DECRYPT, source, plain]))
        if way in ("plaintext", "JWE"):
            line = [*python, program(kind), plain]
        elif way == "exec":
            line = [sys.executable, "-m", "keymgmt.cli", "exec", sealed, "--name", "m", "--"]
            line += [*python, program(kind), "{sealed}"]
        else:
            line = [*python, program(kind, way), sealed]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds, files = time.perf_counter() - begin, shmem() - before
        process.stdin.close()
        largest, cpu, code = wait(process)
        if said != b"ready\n" or code:
            raise SystemExit(f"{kind} {way}: exit code {code}")
    return {
        "seconds": seconds,
        "cpu": spent + cpu,
        "peak_mib": max(peak, largest),
        "files_mib": max(0, files),
    }


def wait(process: subprocess.Popen[bytes]) -> tuple[float, float, int]:
    """Of a process and those that it waited for: largest RSS in MiB, CPU seconds; its exit code."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_maxrss / 1024, used.ru_utime + used.ru_stime, process.returncode


def shmem() -> float:
    return int(Path("/proc/meminfo").read_text().split("Shmem:")[1].split()[0]) / 1024


def make(kind: str, folder: Path, mib: int) -> None:
    folder.mkdir()
    if kind == "gguf":
        blocks = round(mib * (1 << 20) / (20 * WIDTH**2))
        target = folder / "m.gguf"
        command = [sys.executable, LLAMA, target, str(WIDTH), str(blocks)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return
    import numpy as np
    import onnx

    layer = 4 * WIDTH**2
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32) * 0.03
    count = round(mib * (1 << 20) / layer)
    nodes, tensors = [], []
    with (folder / "m.data").open("wb") as file:
        for index in range(count):
            file.write((weights + np.float32(index)).tobytes())
            tensor = onnx.TensorProto(name=f"w{index}", dims=weights.shape, data_type=1)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": "m.data", "offset": str(index * layer), "length": str(layer)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            tensors.append(tensor)
            ends = [f"y{index - 1}" if index else "x", f"w{index}"]
            nodes.append(onnx.helper.make_node("MatMul", ends, [f"y{index}"]))
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, WIDTH])
        for name in ("x", f"y{count - 1}")
    )
    graph = onnx.helper.make_graph(nodes, "m", [x], [y], tensors)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    made.ir_version = 10
    (folder / "m.onnx").write_bytes(made.SerializeToString())


def make_jwe(plain: Path, target: Path) -> None:
    """One JWE of each whole file, with its key beside it."""
    from jwcrypto.jwe import JWE
    from jwcrypto.jwk import JWK

    target.mkdir()
    key = JWK(kty="oct", k=base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("="))
    (target / "key").write_text(key.export())
    for file in plain.iterdir():
        header = json.dumps({"alg": "dir", "enc": "A256GCM"})
        sealed = JWE(file.read_bytes(), header)
        sealed.add_recipient(key)
        (target / f"{file.name}.jwe").write_text(sealed.serialize(compact=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="of weights, 512 if not said")
    parser.add_argument("--kinds", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    add_json(parser)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, way, home = options.case
        print(json.dumps(run(kind, way, Path(home))))
        return
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        home = Path(folder)
        config = site(home / "site")["signed"]
        for kind in options.kinds:
            make(kind, home / kind, options.mib)
            keymgmt.seal(home / kind, home / f"{kind}.sealed", keys=config, name="m")
            # In a process of its own: what it takes is not to be every later one's peak.
            code = "import sys; sys.path.insert(0, sys.argv[1]); import exec as of; from pathlib "
            code += "import Path; of.make_jwe(*map(Path, sys.argv[2:]))"
            where = [Path(__file__).parent, home / kind, home / f"{kind}.jwe"]
            subprocess.run([sys.executable, "-c", code, *where], check=True)
            cases = {
                way: [sys.executable, __file__, "--case", kind, way, folder] for way in ways(kind)
            }
            env = {"KEYMGMT_CONFIG": str(config), "ORT_DISABLE_TELEMETRY": "1"}
            runs = interleave(cases, options.rounds, env)
            results[kind] = runs
            plain = runs["plaintext"]
            for way, of in runs.items():
                more = median(of) - median(plain)
                rows.append(
                    [
                        kind,
                        way,
                        f"{median(of):.2f} s",
                        f"{median(of, 'cpu'):.2f} s",
                        f"{more:+.2f} s" if of is not plain else "",
                        f"{1 / speedup(of, plain):.2f}, {1 / speedup(of, plain, 'cpu'):.2f}",
                        f"{median(of, 'peak_mib'):.0f} MiB",
                        f"{median(of, 'files_mib'):.0f} MiB",
                    ]
                )
    print(
        table(
            ["model", "way", "ready", "cpu", "over plaintext", "ratio, by cpu", "peak", "in files"],
            rows,
        )
    )
    finish(options.json, machine("keymgmt", "cryptography") | {"mib": options.mib}, results)


if __name__ == "__main__":
    main()
