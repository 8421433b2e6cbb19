"""A verb that is killed at random moments, again and again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import keymgmt

# One process that forks a child for each round: the imports are paid for once. The child works; the
# parent kills it after the time that it is told.
_SCRIPT = """
import os, signal, sys, time
import keymgmt, keymgmt._verbs.rewrap_tree
work, config, *words = sys.argv[1:]
config = keymgmt.load_config(config)
for line in sys.stdin:
    delay, last = line.rstrip("\\n").split(" ", 1)
    child = os.fork()
    if child == 0:
        try:
            exec(work)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    if float(delay) >= 0:
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, time.monotonic() - start, flush=True)
"""

# In chunks that are small enough for several of them to be under way.
_REWRAP = """
keymgmt._verbs.rewrap_tree.CHUNK = 8
for item in keymgmt.rewrap_tree(words[0], keys=config, resume=last or None):
    if isinstance(item, keymgmt.Failure): raise item.error
    if item.exit_code: raise SystemExit(str(item))
"""


class Rounds:
    """A process that does some work in each round, and may be killed; a context manager."""

    def __init__(self, work: str, config: Path, *words: object) -> None:
        """``work`` is Python that has ``config``, ``words``, and ``last``: the word of a round."""
        self._longest = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, work, str(config), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def whole(self, last: str = "") -> int:
        """The exit code of a round that is let be; the first says how long it takes."""
        status, took = self._run(-1, last)
        self._longest = self._longest or took
        return status

    def killed(self, last: str = "") -> int:
        """The exit code of a round that is killed at some moment, unless it has ended by then."""
        delay = random.uniform(0, self._longest * 1.2)
        status, _ = self._run(delay, last)
        if status == 0:  # it takes no longer than that on this machine by now
            self._longest = min(self._longest, delay)
        return status

    def _run(self, delay: float, last: str) -> tuple[int, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{delay} {last}\n")
        self._process.stdin.flush()
        status, took = self._process.stdout.readline().split()
        return int(status), float(took)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def rewrap_killed(
    tree: Path | str,
    config: Path,
    rotate: Callable[[], Any],
    read: Callable[[str], bytes],
    journal: Path,
    rounds: int,
) -> None:
    """Rotate the only key of a tree, rewrap the tree, and kill that; then go on with it.

    After each kill every model has its old keys.json or the new one and opens. What goes on does
    the rest and nothing twice, whether one or both of the two runs have a journal.

    Args:
        tree: the models, each of which opens with one key alone.
        config: the file of a config.
        rotate: gives the key another version.
        read: the keys.json of a model.
        journal: a file that is not there.
        rounds: how often.
    """
    killed = begun = 0
    with keymgmt.load_config(config) as keys, Rounds(_REWRAP, config, tree) as process:

        def of_versions() -> dict[str, list[str]]:
            found = keymgmt.usage(tree, keys=keys)
            assert not found.failures
            return {use.version: use.only_way_into for use in found.keys}

        [(version, models)] = of_versions().items()
        rotate()
        assert process.whole() == 0
        for number in range(int(version) + 2, int(version) + 2 + rounds):
            rotate()
            old, new = str(number - 1), str(number)
            status = process.killed(random.choice(["", str(journal)]))
            assert status in (0, -signal.SIGKILL)
            killed += status == -signal.SIGKILL
            state = of_versions()
            assert state.keys() <= {old, new}
            assert sorted(path for paths in state.values() for path in paths) == sorted(models)
            tried = keymgmt.rewrap_tree(tree, keys=keys, dry_run=True)
            assert {item.exit_code for item in tried if isinstance(item, keymgmt.Rewrapped)} == {0}
            begun += len(state) == 2
            done = {path: read(path) for path in state.get(new, [])}
            assert process.whole(random.choice(["", str(journal)])) == 0
            assert of_versions().keys() == {new}
            assert all(read(path) == content for path, content in done.items())
        assert killed > rounds // 5
        assert begun or rounds < 20
        verified = list(keymgmt.verify_tree(tree, keys=keys))
        assert [type(item) for item in verified] == [keymgmt.Done] * len(models)
