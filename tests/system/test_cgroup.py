"""Memory and processors, as real control groups of this machine limit them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import run, run_python

from keymgmt._system.cgroup import groups

MIB = 1 << 20
FILE = 200 * MIB


@pytest.fixture
def new_group(request) -> Iterator[Path]:
    """A new group of a controller with a group in it, both removed at the end."""
    # Where both versions are mounted, version 1 has the controller.
    root = [folder for version, folder in sorted(groups(request.param)) if version == 1] or [
        folder for _, folder in groups(request.param)
    ]
    if not root:
        pytest.skip("no control groups here")
    group = min(root, key=lambda path: len(path.parts)) / f"keymgmt-test-{os.getpid()}"
    try:
        (group / "inner").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no group can be made here: {error.strerror}")
    try:
        yield group
    finally:
        for each in (group / "inner", group):
            with contextlib.suppress(OSError):
                each.rmdir()


def run_in(group: Path, program: str, *arguments: object) -> list[int]:
    enter = "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
    command = [sys.executable, "-c", enter + program, str(group), *map(str, arguments)]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def limit(group: Path, **files: object) -> None:
    for name, value in files.items():
        for path in group.glob(name.replace("_", "[._]", 1)):
            path.write_text(str(value))


READ = """
from keymgmt._system.free_memory import free_memory
before = free_memory()
with open(sys.argv[2], "rb", 0) as file:
    while file.read(1 << 20):
        pass
print(before, free_memory())
"""


@pytest.mark.parametrize("new_group", ["memory"], indirect=True)
@pytest.mark.parametrize("inner", ["", "inner"])
def test_page_cache_is_free_and_a_parents_limit_is_ours(inner, new_group, tmp_path):
    limit(new_group, memory_limit_in_bytes=400 * MIB, memory_max=400 * MIB)
    content = tmp_path / "content"
    content.write_bytes(bytes(FILE))
    descriptor = os.open(content, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the reader is charged
    os.close(descriptor)
    before, after = run_in(new_group / inner, READ, content)
    assert before < 400 * MIB
    assert after > before - FILE // 2  # without the cache it would be 200 MiB less


QUOTA = "from keymgmt._system.cgroup import cpus; print(cpus())"


@pytest.mark.parametrize("new_group", ["cpu"], indirect=True)
@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_quota_of_processors(inner, new_group):
    limit(new_group, cpu_cfs_quota_us=50_000, cpu_max="50000 100000")
    assert run_in(new_group / inner, QUOTA) == [1]


def test_the_quota_is_read_once_in_each_process():
    program = """
import os, sys
from keymgmt._system.cgroup import cpus

opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(args[0]))

def reads():
    cpus(), cpus(), cpus()
    count = opened.count("/proc/self/cgroup")
    opened.clear()
    return count

print(reads(), reads(), flush=True)
if not os.fork():
    print(reads(), flush=True)
    os._exit(0)
os.wait()
"""
    done = run_python(program)
    assert done.stdout.split() == ["1", "0", "1"], done.stderr
