"""The tree itself: one version, what `make release` makes of it, what git and tox know of it."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMITTER = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
PROJECTS = {
    tomllib.loads(path.read_text())["project"]["name"]: path.parent
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("*/*/pyproject.toml"))]
    if path.parent.parent.name != "examples"
}


def versions(root: Path) -> set[str]:
    """Every version of ours that is written down: of the distributions, their pins, the lock."""
    found = set()
    for project in PROJECTS.values():
        text = (root / project.relative_to(ROOT) / "pyproject.toml").read_text()
        found.add(tomllib.loads(text)["project"]["version"])
        found.update(re.findall(r'"keymgmt[^"=]*==([^"]+)"', text))
    lock = tomllib.loads((root / "uv.lock").read_text())["package"]
    return found | {each["version"] for each in lock if each["name"] in PROJECTS}


def test_there_is_one_version():
    assert len(versions(ROOT)) == 1


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files of the tree, as a repository of their own."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in listed.split("\0"):
        if (ROOT / name).is_file() and not name.startswith("tests/loader/"):  # models
            target = tmp_path / "clone" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    for command in (["init", "-q"], ["add", "-f", "."], [*COMMITTER, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path / "clone")
    return tmp_path / "clone"


def release(clone: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "release", f"VERSION={version}"]
    # As on a machine that has uv in .tools alone.
    uv = Path(shutil.which("uv") or "")
    (clone / ".tools" / "bin").mkdir(parents=True, exist_ok=True)
    (clone / ".tools" / "bin" / "uv").symlink_to(uv)
    path = [folder for folder in os.environ["PATH"].split(":") if Path(folder) != uv.parent]
    return programs.run(*command, cwd=clone, env=os.environ | {"PATH": ":".join(path)}, timeout=280)


def test_a_release_sets_every_version_and_builds_it(clone):
    done = release(clone, "9.8.7")
    assert done.returncode == 0, done.stderr
    assert versions(clone) == {"9.8.7"}
    news = (clone / "CHANGELOG.md").read_text()
    assert re.search(r"## \[Unreleased\]\n\n## \[9.8.7\] - \d{4}-\d\d-\d\d\n\n### Added", news)
    built = {path.name for path in (clone / "dist").iterdir() if path.name != ".gitignore"}
    assert len(built) == 2 * len(PROJECTS) + 1
    assert "keymgmt-9.8.7.cdx.json" in built
    assert all("-9.8.7" in name for name in built)
    with zipfile.ZipFile(clone / "dist" / "keymgmt-9.8.7-py3-none-any.whl") as wheel:
        days = {info.date_time[:3] for info in wheel.infolist()}
    today = datetime.datetime.now(datetime.UTC).date()
    # Or yesterday, when midnight came between.
    assert days <= {(d.year, d.month, d.day) for d in (today, today - datetime.timedelta(days=1))}


@pytest.mark.parametrize(
    ("version", "harm", "said"),
    [
        ("9.8", None, "is no version"),
        ("", None, "which version"),
        ("9.8.7", ("README.md", "changed"), "commit these first"),
        ("9.8.7", ("NEW.md", "new"), "commit these first"),
    ],
)
def test_what_is_no_release_changes_nothing(clone, version, harm, said):
    if harm:
        (clone / harm[0]).write_text(harm[1])
    before = versions(clone)
    done = release(clone, version)
    assert done.returncode != 0
    assert said in done.stderr
    assert versions(clone) == before
    assert not (clone / "dist").exists()


def test_no_file_is_committed_that_git_ignores():
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == ""


def test_every_folder_of_tests_is_run_by_tox():
    settings = (ROOT / "tox.ini").read_text()
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    missing = {name for name in folders if f"{{[run]tests}}/{name}" not in settings}
    assert not missing, f"tox.ini runs nothing of tests/{missing}"


def test_every_distribution_is_installed_anew_by_tox():
    """Or a test would run with the wheel of an earlier run, which has the same version."""
    settings = (ROOT / "tox.ini").read_text()
    assert set(re.findall(r"--reinstall-package (keymgmt\S*)\n", settings)) == set(PROJECTS)


def test_the_pythons_that_are_named_are_those_that_are_tested():
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Python :: (3\.\d+)", text)
    assert named == ["3.11", "3.12", "3.13", "3.14"]
    minors = re.search(r"py3\{([\d,]+)\}-", (ROOT / "tox.ini").read_text())
    assert minors
    assert [f"3.{minor}" for minor in minors[1].split(",")] == named
    (head,) = re.findall(r"^\| `tox -e py3xx-…` \|(.*)\| against \|$", README, re.MULTILINE)
    assert [cell.strip() for cell in head.split("|")] == named


def test_the_table_of_environments_is_that_of_tox():
    (names,) = re.findall(r"py3\{[\d,]+\}-\{(.*)\}", (ROOT / "tox.ini").read_text())
    assert re.findall(r"^\| `([\w-]+)` \|(?: ✓ \|){4}", README, re.MULTILINE) == names.split(",")


def test_the_hooks_find_nothing(clone):
    done = programs.run(
        "uvx", "--quiet", "pre-commit", "run", "--all-files", cwd=clone, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Passed") == 2


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", "workflows/*.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("dependabot", "dependabot.yml"),
    ],
)
def test_github_understands_its_files(schema, files):
    found = sorted((ROOT / ".github").glob(files))
    assert found
    command = ["uvx", "--quiet", "check-jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = programs.run(*command, *found, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_report_brings_what_doctor_says():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(forms) == 3
    assert all(re.search(r"`keymgmt doctor [^`]*--json`", form.read_text()) for form in forms)


def test_a_python_that_is_named_and_not_here_fails_ci_and_is_skipped_at_a_desk(clone):
    """Its classifier is what counts; here one of a Python that no system has."""
    project = clone / "pyproject.toml"
    project.write_text(project.read_text().replace(":: 3.14", ":: 3.99"))
    desk = {name: value for name, value in os.environ.items() if name != "CI"}
    for environment, code in ((desk, 0), (desk | {"CI": "true"}, 1)):
        done = programs.run(clone / ".ci" / "test", "--version", env=environment, timeout=280)
        assert "Python 3.99: not here" in done.stdout
        assert (done.returncode, "tox" in done.stdout) == (code, code == 0), done.stderr


def test_benchmarks_are_compared(tmp_path):
    old = {"a": {"load": [{"seconds": s, "cpu": 1.0} for s in (1.0, 1.1, 1.2)]}, "gone": [{"x": 1}]}
    new = {"a": {"load": [{"seconds": s, "cpu": 1.0} for s in (2.0, 2.2, 2.4)]}}
    for name, runs, cores in (("old.json", old, 2), ("new.json", new, 4)):
        (tmp_path / name).write_text(json.dumps({"about": {"cores": cores}, "runs": runs}))
    said = subprocess.check_output(
        [sys.executable, ROOT / "benchmarks" / "compare.py", "old.json", "new.json"],
        cwd=tmp_path,
        text=True,
    )
    assert "cores: 2 -> 4" in said
    assert "only in the old: gone" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    assert ["a, load", "seconds", "1.1", "2.2", "2.00", "*"] in rows
    assert ["a, load", "cpu", "1", "1", "1.00", ""] in rows


@pytest.fixture
def poor(tmp_path) -> dict[str, str]:
    """The environment of who is neither root nor has sudo, on a machine that lacks all packages."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "apt-get", "grep", "make"):
        if (found := shutil.which(tool)) is None:
            pytest.skip(f"no {tool}")
        (tools / tool).symlink_to(found)
    for name, script in (("id", "echo 1000"), ("python3", "exit 1"), ("dpkg-query", "exit 1")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return {"PATH": str(tools)}


ASK = "neither root nor sudo: ask somebody who may for: apt-get install "


@pytest.mark.parametrize("program", ["uv", "test"])
def test_who_may_not_install_is_told_what_to_ask_for(clone, poor, program):
    done = programs.run(clone / ".ci" / program, env=poor)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{ASK}python3-venv\n"


def test_where_nothing_can_be_built_the_last_line_says_what_is_missing(clone, poor):
    uv = Path(poor["PATH"], "uv")
    uv.write_text("#!/bin/sh\necho fatal error: Python.h >&2; exit 1\n")
    uv.chmod(0o755)
    done = programs.run("make", "venv", cwd=clone, env=poor)
    assert done.returncode == 2
    _, last, end = done.stderr.splitlines()[-3:]
    assert last == f"{ASK}build-essential libtss2-dev pkg-config python3-dev"
    assert end.startswith("make: *** ")


def test_the_packages_that_are_installed_are_named():
    lists = re.findall(r"    set -- ((?:.*\\\n)*.*)\n", (ROOT / ".ci" / "packages").read_text())
    packages = set(" ".join(lists).replace("\\", "").split()) - {'"$@"'}
    assert {"softhsm2", "chromium"} <= packages
    assert packages <= set(re.findall(r"[a-z0-9+-]+", (ROOT / "CONTRIBUTING.md").read_text()))


@pytest.fixture
def make(clone, tmp_path) -> Callable[..., str]:
    """``make``, with a home without any cache, and no more on the path than the system has."""
    (tmp_path / "home").mkdir()
    ours = ("UV_", "PYTHON", "VIRTUAL_ENV", "PYENV", "TOX_", "KEYMGMT_", "XDG_")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "HOME": str(tmp_path / "home"),
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    environment.pop("CI", None)

    def run(*arguments: str) -> str:
        done = programs.run("make", *arguments, cwd=clone, env=environment, timeout=2400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_the_commands_of_contributing_work_on_a_fresh_machine(clone, make):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\$ make (\w+)  ", page, re.MULTILINE)[:2] == ["venv", "check"]
    make("venv")
    command = [clone / ".venv" / "bin" / "pytest", "-q", "tests/sealed", "-k", "digest"]
    done = programs.run(*command, cwd=clone, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check: OK" in make("check")


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_the_two_commands_of_the_readme_work_on_a_fresh_machine(make):
    assert "make demo" in README
    assert "make test" in README
    assert make("demo")
    assert "py311-core: OK" in make("test", "TOX=-e py311-core")
