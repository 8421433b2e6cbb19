"""``keymgmt exec``: what the program gets, who else gets it, and what is left: nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from bits import flip_in
from waiting import until

OTHER = 1234  # a user of no account
PYTHON = "/usr/bin/python3"  # a program outside of our environment, without keymgmt
STRANGER = 4321

# Every unshare(2) and mount(2) answers EPERM, as the default profile of Docker has it.
NO_NAMESPACES = """
import ctypes, os, platform, struct, sys
numbers = {"x86_64": (272, 165), "aarch64": (97, 40)}[platform.machine()]
code = [(0x20, 0, 0, 0)]
for number in numbers:
    code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
code.append((0x06, 0, 0, 0x7FFF0000))
packed = b"".join(struct.pack("HBBI", *each) for each in code)
buffer = ctypes.create_string_buffer(packed)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code), ctypes.addressof(buffer)))) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def without_namespaces(command: list[str]) -> list[str]:
    return [sys.executable, "-c", NO_NAMESPACES, *command]


def run(command: list[str], site: Any, **options) -> subprocess.CompletedProcess[str]:
    options = {"env": site.env(), "cwd": "/", "timeout": 60} | options
    return subprocess.run(command, capture_output=True, text=True, **options)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextlib.contextmanager
def running(site: Any, *arguments: object, user: int | None = None) -> Iterator[subprocess.Popen]:
    """A program that has printed its first line, and ends with the block."""
    with subprocess.Popen(
        site.command(*arguments, user=user),
        env=site.env(),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.first = process.stdout.readline()  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            process.kill()


def as_user(user: int, *command: str) -> subprocess.CompletedProcess[str]:
    return programs.run("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command)


def test_the_program_sees_the_files_and_nobody_else_does(needs_root, site):
    script = (
        "cd {sealed} && find . -type f | sort && cat a.txt && sha256sum sub/w.bin "
        "&& echo $KEYMGMT_MODEL {sealed}"
    )
    found = lines(site.run("--", "sh", "-c", script))
    plain = lines(run(["sha256sum", "sub/w.bin"], site, cwd=site.plain))
    assert found[:5] == ["./a.txt", "./empty", "./sub/w.bin", "hello", *plain]
    assert found[5] == "/tmp/keymgmt/m /tmp/keymgmt/m"
    assert not Path("/tmp/keymgmt/m").exists()


def test_the_folder_is_read_only_private_and_cannot_be_swapped(needs_root, site):
    script = (
        "touch {sealed}/new; echo x >> {sealed}/a.txt; rm {sealed}/a.txt; stat -c %a {sealed} "
        "{sealed}/a.txt {sealed}/sub; grep ' {sealed} ' /proc/self/mounts"
    )
    done = site.run("--", "sh", "-c", script)
    found = lines(done)
    assert done.stderr.count("Read-only file system") == 3
    assert found[:3] == ["700", "400", "700"]
    options = found[-1].split()
    assert options[2] == "tmpfs"
    assert {"ro", "nosuid", "nodev", "noexec", "noswap", "mode=700"} <= set(options[3].split(","))
    assert any(each.startswith("size=") for each in options[3].split(","))


@pytest.mark.parametrize("user", [None, OTHER])
@pytest.mark.parametrize("via", ["mount", "memfd"])
def test_exit_codes_and_signals_are_the_programs(needs_root, site, user, via):
    if user:
        site.own(user)
    assert site.run("--via", via, "--", "sh", "-c", "exit 77", user=user).returncode == 77
    killed = site.run("--via", via, "--", "sh", "-c", "kill -KILL $$", user=user)
    assert killed.returncode == -signal.SIGKILL


def test_the_program_is_the_process_that_was_started(needs_root, site):
    with running(site, "--", "sh", "-c", "echo $$; exec sleep 60") as process:
        assert int(process.first) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def test_no_signal_is_ignored_that_the_caller_did_not_ignore(needs_root, site):
    # Python ignores SIGPIPE and SIGXFSZ; `yes | head` would go on for ever.
    def ignored(status: str) -> int:
        (line,) = (each for each in status.splitlines() if each.startswith("SigIgn:"))
        return int(line.split()[1], 16)

    pythons = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    callers = ignored(Path("/proc/self/status").read_text()) & ~pythons
    assert ignored(site.run("--", "cat", "/proc/self/status").stdout) == callers


def test_options_after_the_program_are_its_own(needs_root, site):
    found = lines(site.run("--", "echo", "--json", "-v", "--help", "--", "--at", "x"))
    assert found == ["--json -v --help -- --at x"]


def test_in_a_user_namespace_it_keeps_its_user_and_has_no_capabilities(needs_root, site):
    site.own(OTHER)
    script = (
        "id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; "
        "grep ' {sealed} ' /proc/self/mounts | tail -1; cat {sealed}/a.txt; cat /proc/self/uid_map"
    )
    found = lines(site.run("--via", "mount", "--", "sh", "-c", script, user=OTHER))
    assert found[:3] == [str(OTHER), str(OTHER), str(OTHER)]
    status = dict(line.split() for line in found[3:9])
    assert status.pop("NoNewPrivs:") == "1"
    assert set(status.values()) == {"0" * 16}
    # There tmpfs has no `noswap` (the kernel answers EINVAL), so it is a ramfs, which has no swap.
    assert found[9].split()[2] == "ramfs"
    assert "ro" in found[9].split()[3].split(",")
    assert found[10] == "hello"
    assert found[11].split() == [str(OTHER), str(OTHER), "1"]


def test_the_kernel_refuses_noswap_in_a_user_namespace(needs_root):
    program = "mount -t tmpfs -o noswap x /mnt; echo $?; mount -t ramfs x /mnt; echo $?"
    command = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
    done = programs.run(*command, "unshare", "-Urm", "sh", "-c", program)
    refused, taken = done.stdout.split()
    assert refused != "0"
    assert taken == "0"


def test_a_device_that_only_its_group_may_open(needs_root, site):
    device, group = site.root / "device", 4444
    if os.statvfs(site.root).f_flag & os.ST_NODEV:
        pytest.skip(f"{site.root} is mounted nodev")
    os.mknod(device, 0o060 | 0o020000, os.makedev(1, 3))
    site.own(OTHER)
    os.chown(device, 0, group)
    device.chmod(0o060)
    program = ["--via", "mount", "--", "sh", "-c", f"echo x > {device} && echo opened"]
    assert site.run(*program, user=OTHER, group=group).stdout == "opened\n"
    assert site.run(*program, user=OTHER).returncode != 0


def test_without_namespaces_memfds_serve_and_it_is_said(needs_root, site):
    script = (
        "cat {sealed}/a.txt; sha256sum < {sealed}/sub/w.bin; "
        f"{PYTHON} -c 'import os; print(os.popen(\"cat $KEYMGMT_MODEL/a.txt\").read())'"
    )
    done = run(without_namespaces(site.command("--", "sh", "-c", script)), site)
    assert lines(done)[0] == "hello"
    assert lines(done)[2] == "hello"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert any("memfds behind links are used instead" in line for line in warnings)
    assert "that of Docker and Kubernetes forbids it" in done.stderr
    asked = run(without_namespaces(site.command("--via", "memfd", "--", "true")), site)
    assert "memfds" not in asked.stderr


def test_where_only_a_mount_will_do_it_is_refused(needs_root, site):
    refused = run(without_namespaces(site.command("--via", "mount", "--", "true")), site)
    assert refused.returncode == 1
    assert "permits no private file system" in refused.stderr
    assert "seccomp" in refused.stderr
    (site.root / "at").mkdir()
    for option in (["--at", site.root / "at"], ["--drop-when-ready", "port:80"]):
        refused = run(without_namespaces(site.command(*option, "--", "true")), site)
        assert refused.returncode == 3
        assert "needs a private mount" in refused.stderr


def test_namespaces_turned_off_by_a_sysctl(needs_root, site):
    # In a user namespace of the test's own, whose limit is nobody else's.
    script = (
        "echo 0 > /proc/sys/user/max_user_namespaces && "
        'exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$@"'
    )
    command = [
        "unshare",
        "-r",
        "sh",
        "-c",
        script,
        "sh",
        *site.command("--", "cat", "{sealed}/a.txt"),
    ]
    done = run(command, site)
    assert lines(done) == ["hello"]
    assert "sysctl user.max_user_namespaces" in done.stderr


def test_a_read_only_proc(needs_root, site):
    site.own(OTHER)
    script = 'mount --bind /proc /proc && mount -o remount,bind,ro /proc && exec "$@"'
    inner = site.command("--", "cat", "{sealed}/a.txt", user=OTHER)
    done = run(["unshare", "-m", "sh", "-c", script, "sh", *inner], site)
    assert lines(done) == ["hello"]
    assert "Read-only file system" in done.stderr
    assert "memfds behind links" in done.stderr


def test_a_user_of_its_own(needs_root, site):
    script = (
        "id -u; id -g; id -G; echo $HOME $USER; cat {sealed}/a.txt; "
        "grep -E '^(CapEff|CapPrm|NoNew)' /proc/self/status"
    )
    for via in ("mount", "memfd"):
        done = site.run("--user", "nobody", "--via", via, "--", "sh", "-c", script)
        found = lines(done)
        assert found[:3] == ["65534"] * 3
        assert found[3].endswith(" nobody")
        assert found[4] == "hello"
        assert [line.split()[1] for line in found[5:]] == ["0" * 16, "0" * 16, "1"]
        assert "runs as root" not in done.stderr
    assert "runs as root" in site.run("--", "true").stderr


def test_a_number_without_an_account_is_a_user_too(needs_root, site):
    assert lines(site.run("--user", "4567", "--", "id", "-u")) == ["4567"]


def test_who_can_read_it(needs_root, site):
    where = "readlink {sealed}/a.txt || echo /proc/$$/root{sealed}/a.txt"
    program = ["sh", "-c", f"{where}; exec sleep 60"]
    for via in ("mount", "memfd"):
        with running(site, "--user", str(OTHER), "--via", via, "--", *program) as process:
            inside = process.first.strip()
            assert inside.startswith(f"/proc/{process.pid}/")
            assert as_user(STRANGER, "cat", inside).returncode != 0
            assert "Permission denied" in as_user(STRANGER, "cat", inside).stderr
            # The wall is the user: this is what docs/exec.md says of another process of the same.
            assert as_user(OTHER, "cat", inside).returncode == 0


def test_another_user_is_for_root_alone(needs_root, site):
    site.own(OTHER)
    done = site.run("--user", "nobody", "--", "true", user=OTHER)
    assert done.returncode == 3
    assert "only root may run a program as another user" in done.stderr
    assert site.run("--user", "no-such-user", "--", "true").returncode == 3


def test_its_own_tmp_and_the_shared_one(needs_root, site, tmp_path):
    env = site.env() | {"TMPDIR": str(site.root)}
    script = "ls -A /tmp /var/tmp; touch /tmp/made; echo ${TMPDIR-unset}"
    assert lines(site.run("--", "sh", "-c", script, env=env)) == [
        "/tmp:",
        "keymgmt",
        "",
        "/var/tmp:",
        "unset",
    ]
    assert not Path("/tmp/made").exists()
    (tmp_path / "at").mkdir()
    shared = ["--shared-tmp", "--at", tmp_path / "at", "--"]
    assert lines(site.run(*shared, "cat", tmp_path / "at" / "a.txt")) == ["hello"]
    assert list((tmp_path / "at").iterdir()) == []
    (tmp_path / "script").write_text("x")
    done = site.run("--", "cat", tmp_path / "script")
    assert done.returncode == 3
    assert "out of the program's sight" in done.stderr


def test_places_that_cannot_be(needs_root, site, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(site.root)
    mounted = next(
        line.split()[1]
        for line in Path("/proc/mounts").read_text().splitlines()
        if "devpts" in line
    )
    for at, said in (
        (tmp_path / "used", "in use"),
        (mounted, "in use"),
        (tmp_path / "missing", "mkdir -p"),
        (tmp_path / "not there", f"mkdir -p '{tmp_path}/not there'"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "link", "is not a folder"),
    ):
        done = site.run("--shared-tmp", "--at", at, "--", "true")
        assert (done.returncode, said in done.stderr) == (3, True), done.stderr
    assert "--at" in site.run("--shared-tmp", "--", "true").stderr
    assert lines(site.run("--at", "/tmp/deep/er", "--", "cat", "/tmp/deep/er/a.txt")) == ["hello"]


def test_programs_that_cannot_be_run(needs_root, site):
    (site.root / "plain").write_text("no program")
    (site.root / "wrong").write_text("no program")
    (site.root / "wrong").chmod(0o755)
    (site.root / "script").write_text("#!/no/such/interpreter")
    (site.root / "script").chmod(0o755)
    for program, code, hint in (
        ("no-such-program", 127, "give its path"),
        ("/no/such/program", 127, "give its path"),
        (site.root / "plain", 126, "chmod a+x"),
        (site.root / "wrong", 126, "a script without a line such as #!/bin/sh"),
        (site.root / "script", 127, "the interpreter in its first line"),
        (site.root, 126, "name a program in it"),
    ):
        done = site.run("--", program)
        assert done.returncode == code, done.stderr
        assert hint in done.stderr
        assert done.stderr.splitlines()[0].startswith(("error:", "warning:"))
        assert "Traceback" not in done.stderr


def test_what_stops_it_before_the_program_starts(needs_root, new_site):
    ran = ["--", "echo", "started"]
    site = new_site()
    assert site.run("--name", "another", *ran).returncode == 4
    payload = site.sealed / "payload" / "sub" / "w.bin.floe"
    flip_in(payload)
    damaged = site.run(*ran)
    assert (damaged.returncode, damaged.stdout) == (4, "")
    assert "sub/w.bin" in damaged.stderr
    site = new_site()
    for key in (site.root / "keys").iterdir():
        if key.name.startswith("a"):
            key.unlink()
    refused = site.run(*ran)
    assert (refused.returncode, refused.stdout) == (6, "")
    missing = site.run(*ran, env=site.env() | {"KEYMGMT_CONFIG": "/no/such/config"})
    assert (missing.returncode, missing.stdout) == (3, "")


def test_the_secrets_of_the_config_are_not_the_programs(needs_root, site):
    config = site.root / "keymgmt.toml"
    config.write_text(
        config.read_text()
        + '[providers.other]\nbackend = "file"\npath = "o"\npassphrase = { env = "SITE_SECRET" }\n'
    )
    env = site.env() | {"SITE_SECRET": "correct horse battery", "OTHER_ONE": "stays"}
    for via in ("mount", "memfd"):
        found = lines(site.run("--via", via, "--", "env", env=env))
        assert "OTHER_ONE=stays" in found
        assert not any(line.startswith("SITE_SECRET=") for line in found)


@pytest.mark.parametrize("via", ["mount", "memfd"])
def test_a_wrong_table_starts_no_program_with_its_secrets(needs_root, site, via):
    config = site.root / "keymgmt.toml"
    wrong = '[providers.other]\nbackend = "file"\npath = "o"\nregoin_typo = "x"\n'
    config.write_text(config.read_text() + wrong)
    done = site.run("--via", via, "--", "env")
    assert done.returncode == 3, done.stderr
    assert "[providers.other]" in done.stderr
    assert done.stdout == ""


def test_nor_are_the_credentials_of_systemd(needs_root, site):
    folder = site.root / "credentials"
    folder.mkdir(mode=0o700)
    (folder / "model-keys").write_text("correct horse battery")
    config = site.root / "keymgmt.toml"
    config.write_text(
        config.read_text() + '[providers.other]\nbackend = "file"\npath = "o"\n'
        'passphrase = { credential = "model-keys" }\n'
    )
    env = site.env() | {"CREDENTIALS_DIRECTORY": str(folder)}
    script = f"ls -A {folder}; echo ${{CREDENTIALS_DIRECTORY-unset}}"
    for user in (None, OTHER):
        if user:
            site.own(user)
        assert lines(site.run("--", "sh", "-c", script, env=env, user=user)) == ["unset"]
    assert (folder / "model-keys").exists()


def test_a_program_that_forks_daemons(needs_root, site):
    out = site.root / "said"
    script = f"(sleep 1; cat {{sealed}}/a.txt > {out}; echo done >> {out}) & exit 3"
    done = subprocess.run(
        site.command("--", "sh", "-c", script),
        env=site.env(),
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 3
    until(lambda: out.exists() and out.read_text() == "hello\ndone\n")


def test_no_core_dump(needs_root, site):
    if not Path("/proc/sys/kernel/core_pattern").read_text().strip().startswith("core"):
        pytest.skip("core dumps do not go to the working directory here (core_pattern)")
    folder = site.root / "cores"
    folder.mkdir()
    crash = ["sh", "-c", "ulimit -c unlimited 2>/dev/null; kill -SEGV $$"]
    # That this machine writes one at all is asked first, without us.
    subprocess.run(crash, cwd=folder, timeout=20)
    if not list(folder.iterdir()):
        pytest.skip("this system writes no core dumps here")
    for core in folder.iterdir():
        core.unlink()
    for user in ([], ["--user", "nobody"]):
        folder.chmod(0o777)
        done = site.run(*user, "--", *crash, cwd=folder)
        assert done.returncode == -signal.SIGSEGV
        assert list(folder.iterdir()) == []


READS = """
import mmap, os, signal, socket, sys, time
folder, ready, kept = os.environ["KEYMGMT_MODEL"], *sys.argv[1:3]
content = open(f"{folder}/sub/w.bin", "rb").read()
if kept == "mapped":
    with open(f"{folder}/a.txt", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"usr1\\n"))
def used():
    info = os.statvfs(folder)
    return (info.f_blocks - info.f_bfree) * info.f_frsize
before = used()
if ready.startswith("port:"):
    server = socket.create_server(("127.0.0.1", int(ready[5:])))
else:
    open("/tmp/ready", "w").close()
while used() > before // 2:
    time.sleep(0.05)
print(sorted(os.listdir(folder)), os.listdir(f"{folder}/sub"), len(content), flush=True)
print("mapped", mapped[:5] if kept == "mapped" else None, flush=True)
sys.stdin.readline()
sys.exit(9)
"""


@pytest.mark.parametrize("kind", ["file", "port", "command"])
def test_what_was_read_is_given_back(needs_root, site, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"file": "file:/tmp/ready", "port": f"port:{port}", "command": "command:ls /tmp/ready"}
    arguments = ["--drop-when-ready", told[kind]]
    program = ["--", PYTHON, "-c", READS, told[kind], "mapped"]
    with running(site, *arguments, *program) as process:
        assert process.first == "['a.txt', 'sub'] [] 3000001\n"
        assert process.stdout.readline() == "mapped b'hello'\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(20) == 9
        said = process.stderr.read()
    assert "3 MiB that it had read were given back; a.txt stays: it is open or mapped" in said


def test_with_a_parent_that_stays_signals_and_their_exit_are_passed_on(needs_root, site):
    arguments = ["--drop-when-ready", "file:/tmp/never", "--user", "nobody", "--"]
    with running(site, *arguments, "sh", "-c", "echo $$; exec sleep 60") as process:
        program = int(process.first)
        assert program != process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    with running(site, *arguments, "sh", "-c", "echo $$; exec sleep 60") as process:
        program = int(process.first)
        process.kill()
        process.wait(20)
        until(lambda: not Path(f"/proc/{program}").exists())
    assert site.run(*arguments, "/no/such/program").returncode == 127
    for wrong in ("port:0", "port:x", "file:relative", "command:", "command:'", "8000", "url:x"):
        assert site.run("--drop-when-ready", wrong, "--", "true").returncode == 3


@pytest.mark.once
def test_killed_at_any_moment_nothing_is_left(needs_root, site):
    def mounts() -> str:
        return Path("/proc/self/mounts").read_text()

    def ours() -> list[str]:
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(site.sealed).encode() in status.read_bytes():
                    found.append(str(status))
        return found

    before = mounts()
    chance = random.Random(26)
    for _ in range(50 if os.environ.get("CI") else 12):
        process = subprocess.Popen(
            site.command("--", "sleep", "60"),
            env=site.env(),
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0, 0.9))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        assert process.wait(20) in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
    until(lambda: not ours())
    assert mounts() == before
    assert not list(Path("/tmp").glob("keymgmt/m"))


def test_a_place_that_another_user_can_rename_is_refused(needs_root, site):
    """What another user puts there instead would be the model, for the program."""
    home = site.root / "home"
    (home / "place").mkdir(parents=True)
    os.chown(home, OTHER, OTHER)
    script = "echo ready; read line; cat {sealed}/a.txt"
    for user in ((), ("--user", OTHER)):
        with subprocess.Popen(
            site.command("--at", home / "place", *user, "--", "sh", "-c", script),
            env=site.env(),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if process.stdout.readline():
                (home / "place").rename(home / "gone")
                (home / "place").mkdir()
                (home / "place" / "a.txt").write_text("of another\n")
            found, said = process.communicate("go\n", timeout=60)
        assert (process.returncode, found) == (3, ""), said
        assert f"{home}" in said
        assert "leave --at out" in said


def test_an_interrupt_of_a_fork_comes_before_the_program_and_not_to_it() -> None:
    """Its timer would end the program with SIGALRM: a timer outlives an exec."""
    program = """
import sys, types
from pathlib import Path
from keymgmt._mount.exec import Launch
from keymgmt.cli import _run

launch = Launch(["sleep", "5"], print)
_run._interrupt_later(types.SimpleNamespace(exc_value=SystemExit(143)))
launch.execute_on_memfds(Path("/nowhere"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr


def test_a_time_limit_of_whoever_started_us_is_the_programs() -> None:
    """As in ``perl -e 'alarm 60; exec @ARGV' keymgmt exec ...``: an alarm outlives an exec."""
    program = """
import signal
from pathlib import Path
from keymgmt._mount.exec import Launch

launch = Launch(["sh", "-c", "echo started; exec sleep 60"], print)
signal.setitimer(signal.ITIMER_REAL, 3)
launch.execute_on_memfds(Path("/nowhere"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "started\n"), done.stderr
