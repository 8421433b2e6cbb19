"""``keymgmt.mount``: files by path that are on no disk and in no other process's reach.

A mount makes its process non-dumpable for good, so each test has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bits import flip_in
from forks import NOBODY, nobody_can


def python(program: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def lines(program: str, *arguments: object, **options) -> list[str]:
    done = python(program, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory, seal) -> tuple[Path, Path]:
    """A folder with subfolders, an empty and a larger file; and its sealed copy."""
    plain = tmp_path_factory.mktemp("tree") / "tree"
    (plain / "sub" / "deeper").mkdir(parents=True)
    (plain / "config.json").write_text('{"a": 1}')
    (plain / "sub" / "empty").write_bytes(b"")
    (plain / "sub" / "deeper" / "large.bin").write_bytes(os.urandom(3_000_001))
    return plain, seal(plain, "tree")


def test_the_files_are_those_of_the_model_and_read_only(tree, site):
    plain, sealed = tree
    found = lines(
        """
        import hashlib, os, sys
        import keymgmt
        with keymgmt.mount(sys.argv[1], name="tree", keys=sys.argv[2]) as folder:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    print(path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest())
                    for flags in (os.O_WRONLY, os.O_RDWR):
                        try:
                            os.write(os.open(path, flags), b"x")
                            print("written")
                        except OSError:
                            pass
        """,
        sealed,
        site.path,
    )
    import hashlib

    expected = [
        f"{path.relative_to(plain)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(plain.rglob("*"))
        if path.is_file()
    ]
    assert found == expected


def test_nothing_stays_after_the_block(tree, site):
    folder, exists, opened = lines(
        """
        import os, sys
        import keymgmt
        keymgmt.mount  # imported by now, and ctypes: libffi keeps its own file open
        before = len(os.listdir("/proc/self/fd"))
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
            pass
        print(folder)
        print(folder.exists())
        print(len(os.listdir("/proc/self/fd")) - before)
        """,
        tree[1],
        site.path,
    )
    assert exists == "False"
    assert opened == "0"
    assert not Path(folder).exists()


def test_an_exception_in_the_block_cleans_up_alike(tree, site):
    done = python(
        """
        import sys
        import keymgmt
        try:
            with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
                raise ZeroDivisionError
        except ZeroDivisionError:
            print(folder.exists())
        """,
        tree[1],
        site.path,
    )
    assert done.stdout == "False\n", done.stderr


def test_what_stays_open_is_not_inherited_by_programs(tree, site):
    inside, after, content = lines(
        """
        import os, subprocess, sys
        import keymgmt
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
            kept = os.open(folder / "config.json", os.O_RDONLY)
            os.set_inheritable(kept, True)  # as OpenVINO opens
            inside = os.get_inheritable(kept)
        print(inside)
        print(os.get_inheritable(kept))
        print(os.read(kept, 100).decode())
        """,
        tree[1],
        site.path,
    )
    assert (inside, after, content) == ("True", "False", '{"a": 1}')


CHILD = f"""
import ctypes, os, sys
import keymgmt, keymgmt_file
libc = ctypes.CDLL(None)
with keymgmt.load_config(sys.argv[2]) as config:
    with keymgmt.mount(sys.argv[1], keys=config) as folder:
        target = os.readlink(folder / "config.json")
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid({NOBODY})
            os.setuid({NOBODY})
        libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER
        if sys.argv[3] == "dumpable":
            libc.prctl(4, 1, 0, 0, 0)
        print(target, flush=True)
        sys.stdin.readline()
        os._exit(0)
"""


@pytest.mark.parametrize(("how", "readable"), [("as it is", False), ("dumpable", True)])
def test_another_process_of_the_same_user_cannot_follow(how, readable, tree, site):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, tree[1], site.path, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        target = process.stdout.readline().strip()
        path = target.replace("self", str(process.pid))
        found = nobody_can(Path(path).stat)
        process.stdin.write("\n")
        process.stdin.flush()
    assert found == readable


LOCKED = """
import mmap, os, resource, sys
from keymgmt._mount.folders import MemfdFolder
def locked():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmLck")).split()[1])
if os.geteuid() == 0:  # root is above the limit
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
seen = []
def fill(memory):
    seen.append(locked())
    memory[:] = bytes(1 << 20)
folder = MemfdFolder(lock=True)
folder.write("weights.bin", 1 << 20, fill)
with open(folder.path / "weights.bin", "rb") as file:
    theirs = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
folder.close()
print(*seen, locked())
theirs.close()
print(locked())
"""


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (4 << 20, ["1024 1024", "0"]),
        (3 << 19, ["1024 1024", "0"]),  # room for one of the two mappings
        (1 << 19, ["0 0", "0"]),
    ],
    ids=["enough", "for one", "too little"],
)
def test_files_are_kept_from_swap_while_somebody_has_them_mapped(limit, expected):
    assert lines(LOCKED, limit) == expected


@pytest.mark.parametrize("swap", ["/dev/sda2", ""])
def test_a_mount_is_locked_where_there_is_swap(swap, tree, site):
    done = python(
        """
        import sys
        import keymgmt, keymgmt._mount.decrypt
        keymgmt._mount.decrypt.unencrypted_swap = lambda: (sys.argv[3],) if sys.argv[3] else ()
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
            lines = open("/proc/self/status").read().splitlines()
            print(next(int(line.split()[1]) for line in lines if line.startswith("VmLck")))
        """,
        tree[1],
        site.path,
        swap,
    )
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) >= 3_000_001 >> 10) == bool(swap)
    assert ("may be swapped out to /dev/sda2" in done.stderr) == bool(swap)


def test_an_open_model_is_mounted_in_part(tree, site):
    names, again = lines(
        """
        import sys
        import keymgmt
        with keymgmt.open(sys.argv[1], keys=sys.argv[2]) as sealed:
            with keymgmt.mount(sealed, only=lambda path: path.endswith(".json")) as folder:
                print(*(path.relative_to(folder) for path in folder.rglob("*")))
            print(sealed.read("config.json").decode())
        """,
        tree[1],
        site.path,
    )
    assert (names, again) == ("config.json", '{"a": 1}')


def test_more_than_the_machine_has_is_refused_before_work_starts(tree, site):
    done = python(
        """
        import sys
        import keymgmt
        from keymgmt._system import free_memory

        free_memory.free_memory = lambda: 1 << 20
        try:
            with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
                print("mounted")
        except keymgmt.errors.KeymgmtError as error:
            print(error, error.hint)
        """,
        tree[1],
        site.path,
    )
    assert "tree needs 3 MiB of memory and 1 MiB are free nothing was started" in done.stdout


def test_a_payload_shorter_than_its_file_takes_no_memory(tree, site, tmp_path):
    import shutil

    short = Path(shutil.copytree(tree[1], tmp_path / "short.sealed"))
    os.truncate(short / "payload" / "sub" / "deeper" / "large.bin.floe", 1000)
    made, error = lines(
        """
        import os, sys
        import keymgmt
        make, sizes = os.posix_fallocate, []
        os.posix_fallocate = lambda *arguments: sizes.append(arguments[2]) or make(*arguments)
        try:
            with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
                print("handed out")
        except keymgmt.errors.IntegrityError as problem:
            print(sum(sizes))
            print(problem)
        """,
        short,
        site.path,
    )
    assert made == "0"
    assert "large.bin of tree: the payload file has 1000 bytes" in error


def test_too_few_descriptors_are_said_and_nothing_is_left(site, seal, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(100):
        (many / f"{number}.txt").write_text("x")
    folder, error, hint, opened = lines(
        """
        import gc, os, resource, sys, tempfile
        import keymgmt
        keymgmt.mount  # imported by now, and ctypes: libffi keeps its own file open
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(7)[1]))
        make = tempfile.mkdtemp
        def noted(*arguments, **options):
            made.append(make(*arguments, **options))
            return made[-1]
        made, tempfile.mkdtemp = [], noted
        try:
            with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
                print("handed out")
        except keymgmt.errors.KeymgmtError as problem:
            print(os.path.exists(made[0]), problem, problem.hint, sep="\\n")
        gc.collect()
        print(len(os.listdir("/proc/self/fd")) - before)
        """,
        seal(many, "many"),
        site.path,
    )
    assert (folder, opened) == ("False", "0")
    assert "Too many open files" in error
    assert "ulimit -n" in hint


def test_an_exchanged_link_is_noticed(tree, site):
    done = python(
        """
        import sys
        import keymgmt
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
            link = folder / "config.json"
            link.unlink()
            link.symlink_to("/etc/hostname")
        """,
        tree[1],
        site.path,
    )
    assert done.returncode == 1
    assert "was exchanged while the model was mounted" in done.stderr


def test_a_damaged_file_is_refused_and_nothing_is_left(tree, site, tmp_path):
    import shutil

    damaged = tmp_path / "damaged.sealed"
    shutil.copytree(tree[1], damaged)
    payload = damaged / "payload" / "sub" / "deeper" / "large.bin.floe"
    flip_in(payload, 2_000_000)
    error, opened = lines(
        """
        import gc, os, sys
        import keymgmt
        keymgmt.mount  # imported by now, and ctypes: libffi keeps its own file open
        before = len(os.listdir("/proc/self/fd"))
        try:
            with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
                print("handed out")
        except keymgmt.errors.IntegrityError as error:
            print(error)
        gc.collect()
        print(len(os.listdir("/proc/self/fd")) - before)
        """,
        damaged,
        site.path,
    )
    assert "large.bin" in error
    assert opened == "0"


NO_MEMFD = """
import errno, os, sys
import keymgmt
def refused(*arguments):
    raise PermissionError(errno.EPERM, "Operation not permitted")
os.memfd_create = refused
"""


def test_a_system_without_memfds_is_refused_clearly(tree, site):
    program = """
try:
    with keymgmt.mount(sys.argv[1], keys=sys.argv[2]):
        print("handed out")
except keymgmt.errors.KeymgmtError as error:
    print(error, "|", error.hint)
"""
    (said,) = lines(NO_MEMFD + program, tree[1], site.path)
    assert "memfd: Operation not permitted" in said
    assert "a disk is not used instead" in said
    assert "seccomp" in said
    assert "keymgmt.private_folder" in said


def test_an_old_kernel_without_noexec_works(tree, site):
    (content,) = lines(
        """
        import errno, os, sys
        import keymgmt
        make = os.memfd_create
        def old(name, flags):
            if flags & 8:
                raise OSError(errno.EINVAL, "Invalid argument")
            return make(name, flags)
        os.memfd_create = old
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
            print((folder / "config.json").read_text())
        """,
        tree[1],
        site.path,
    )
    assert content == '{"a": 1}'


def test_openvino_reads_a_mounted_model(magika_sealed, magika_ir, site):
    same, kept = lines(
        """
        import os, sys
        sys.modules["openvino_telemetry"] = None
        import numpy as np, openvino as ov
        import keymgmt
        core = ov.Core()
        inputs = np.full((1, 2048), 65, np.int32)
        with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
            model = core.compile_model(folder / "magika.xml", "CPU")
        plain = core.compile_model(sys.argv[3], "CPU")
        print((model(inputs)[0] == plain(inputs)[0]).all())
        kept = [fd for fd in os.listdir("/proc/self/fd")
                if os.path.exists("/proc/self/fd/" + fd)
                and "memfd:keymgmt" in os.readlink("/proc/self/fd/" + fd)]
        print(any(os.get_inheritable(int(fd)) for fd in kept))
        """,
        magika_sealed,
        site.path,
        magika_ir,
    )
    assert (same, kept) == ("True", "False")


def test_no_file_on_a_disk_is_written(tree, site, require_tool, tmp_path):
    strace = require_tool("strace", package="strace")
    trace = tmp_path / "trace"
    # A traced process is refused, so this one is not hardened.
    program = """
import sys
import keymgmt, keymgmt._mount.mount
keymgmt._mount.mount.harden = lambda: None
with keymgmt.mount(sys.argv[1], keys=sys.argv[2]) as folder:
    (folder / "config.json").read_bytes()
"""
    subprocess.run(
        [
            *(strace, "-f", "-qq", "-y", "-o", trace, "-e", "trace=%file,pwrite64,write"),
            *(sys.executable, "-B", "-c", program, tree[1], site.path),
        ],
        check=True,
        timeout=120,
    )
    calls = trace.read_text().splitlines()
    made = [call for call in calls if " mkdir(" in call or " symlink" in call]
    assert made
    assert all("keymgmt-" in call for call in made)
    opened = [
        call
        for call in calls
        if ("O_WRONLY" in call or "O_RDWR" in call or "O_CREAT" in call) and "/dev/null" not in call
    ]
    assert opened == []
    assert [call for call in calls if " write(" in call or " pwrite64(" in call] == []
