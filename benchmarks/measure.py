"""Interleaved runs in fresh processes, and what is said of them.

Every case is a command that does its work once and prints one JSON object: ``seconds`` (the work
alone), ``cpu`` (seconds of CPU, all threads) and ``peak_mib`` (the process's largest RSS). Rounds
run all cases, in a new random order each, so that what else the machine does falls on all alike.
A ratio of two cases is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

Run = dict[str, float]


def timed(work: Callable[[], object]) -> Run:
    """Do it once; what a case prints."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    seconds, spent = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "cpu": spent, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """The largest RSS of this process until now."""
    # Not ru_maxrss: a child begins with its parent's.
    return _status("VmHWM:")


def resident_mib() -> float:
    """The RSS of this process."""
    return _status("VmRSS:")


def _status(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024


def length(text: str) -> int:
    """Bytes: 64K, 1M, 4G."""
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)


def add_touch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--touch",
        type=length,
        default=0,
        metavar="SIZE",
        help="before each run, a process writes to that much memory and ends: the host of a "
        "virtual machine, which takes free memory back, then has it again, as a physical one has",
    )


_TOUCH = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))
"""


def interleave(
    cases: Mapping[str, list[str]],
    rounds: int,
    env: Mapping[str, str] | None = None,
    touch: int = 0,
) -> dict[str, list[Run]]:
    """Run every case once a round; an interrupt (Ctrl-C) ends it after the last whole round."""
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        order = list(cases)
        shuffle(order)
        try:
            whole = {name: _run(cases[name], env, touch) for name in order}
        except KeyboardInterrupt:
            if not number:
                raise
            break
        for name, run in whole.items():
            runs[name].append(run)
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return runs


def _run(command: list[str], env: Mapping[str, str] | None, touch: int) -> Run:
    if touch:
        subprocess.run([sys.executable, "-c", _TOUCH, str(touch)], check=True)
    # As installed: with this set, every process would compile our modules within its timed work.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(env or {})}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    run: Run = json.loads(output.splitlines()[-1])
    return run


def median(runs: list[Run], what: str = "seconds") -> float:
    return statistics.median(run[what] for run in runs)


def speedup(runs: list[Run], over: list[Run], what: str = "seconds") -> float:
    """How many times faster ``runs`` is than ``over``."""
    return statistics.median(b[what] / a[what] for a, b in zip(runs, over, strict=True))


def site(home: Path) -> dict[str, Path]:
    """Make a site whose publisher may publish anything; its configs ``signed`` and ``unsigned``."""
    from keymgmt_openvino_demo._throwaway_keys import make_throwaway_keys

    make_throwaway_keys(home)
    signed, unsigned = home / "keymgmt.toml", home / "unsigned.toml"
    before, _, after = signed.read_text().partition("publishers")
    unsigned.write_text(f"{before}require_signature = false\n{after.partition(chr(10))[2]}")
    unsigned.chmod(0o600)
    return {"signed": signed, "unsigned": unsigned}


def pyplot() -> Any:
    """Matplotlib's pyplot, for SVG of text that is the same from the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "keymgmt"
    mpl.rcParams["svg.fonttype"] = "none"  # text, not outlines of it: smaller
    from matplotlib import pyplot as plt

    return plt


def bars(
    path: Path, axes: Mapping[str, Mapping[str, float]], unit: str, others: Collection[str] = ()
) -> None:
    """Draw a bar chart (SVG): for each title its figures, those of ``others`` in grey."""
    plt = pyplot()
    longest = max(len(figures) for figures in axes.values())
    size = (max(6, 3.3 * len(axes)), 1.2 + 0.28 * longest)
    figure, grid = plt.subplots(
        1, len(axes), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for axis, (title, figures) in zip(grid[0], axes.items(), strict=True):
        colors = ["#adb5bd" if name in others else "#2a6f97" for name in figures]
        drawn = axis.barh(list(figures), list(figures.values()), color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def machine(*packages: str) -> dict[str, object]:
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    program = Path(sys.argv[0]).stem
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(f"{program}.json"),
        metavar="FILE",
        help=f"where every run is written ({program}.json); what it holds is compared with first",
    )


def finish(path: Path, about: Mapping[str, object], runs: Mapping[str, Any]) -> None:
    """Compare with what an earlier run left in ``path``, and replace it.

    Args:
        path: what ``--json`` names.
        about: the machine, and what else a later run must share to be comparable.
        runs: the name of a case -> its runs, or -> more cases.
    """
    found = {"about": dict(about), "runs": runs}
    if path.exists():
        print(
            f"\nCompared with the last, {path}:\n\n{compare(json.loads(path.read_text()), found)}"
        )
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nall runs: {path}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A table of medians, new over old; what ``finish`` wrote.

    Medians of a busy machine differ without a reason. A star is where the middle halves of the
    runs, between their quartiles, lie apart; three runs of each are the fewest that can say so.
    """
    lines = [
        f"{name}: {old['about'].get(name)} -> {new['about'].get(name)}"
        for name in sorted(old["about"] | new["about"])
        if old["about"].get(name) != new["about"].get(name)
    ]
    before, after = _cases(old["runs"]), _cases(new["runs"])
    rows = []
    for case in before.keys() | after.keys():
        if case not in before or case not in after:
            lines.append(f"only in the {'old' if case in before else 'new'}: {case}")
    for case in [case for case in before if case in after]:
        for what in before[case][0]:
            was, now = (_quartiles([run[what] for run in of[case]]) for of in (before, after))
            enough = min(len(before[case]), len(after[case])) >= 3
            apart = enough and (was[2] < now[0] or now[2] < was[0])
            ratio = f"{now[1] / was[1]:.2f}" if was[1] else "-"
            rows.append([case, what, f"{was[1]:.4g}", f"{now[1]:.4g}", ratio, "*" if apart else ""])
    head = ["case", "what", "old", "new", "new / old", "apart"]
    return "\n".join([*sorted(lines), *([""] if lines else []), table(head, rows)])


def _cases(runs: Mapping[str, Any], within: str = "") -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for name, of in runs.items():
        full = f"{within}{name}"
        found |= {full: of} if isinstance(of, list) else _cases(of, f"{full}, ")
    return found


def _quartiles(numbers: list[float]) -> tuple[float, float, float]:
    if len(numbers) == 1:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def rate(make: Callable[[], Callable[[], int]], seconds: float, threads: int = 1) -> Run:
    """How many a second ``threads`` do in ``seconds``, and this process's CPU for each in µs.

    ``make`` gives each thread its call, and the call says how many it did.
    """
    calls = [make() for _ in range(threads)]
    spent, begin = time.process_time(), time.perf_counter()

    def run(call: Callable[[], int]) -> int:
        done = 0
        while time.perf_counter() < begin + seconds:
            done += call()
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(run, calls))
    return {
        "per_second": done / (time.perf_counter() - begin),
        "cpu_us": (time.process_time() - spent) / done * 1e6,
    }


def in_turns(
    cases: Mapping[str, Callable[[], Callable[[], int]]], turns: int, seconds: float, threads: int
) -> dict[str, list[Run]]:
    """``rate`` of each in short turns, so that a busy machine slows all alike."""
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, make in cases.items():
            runs[name].append(rate(make, seconds / turns, threads))
    return runs


def spread(runs: list[Run], what: str = "per_second") -> str:
    """Median, and the quartiles around it."""
    low, middle, high = _quartiles([run[what] for run in runs])
    return f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well on a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
