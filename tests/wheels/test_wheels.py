"""What ships: each wheel its own modules and no more, one version, installed by pip alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {
    tomllib.loads(path.read_text())["project"]["name"]: path.parent
    for path in [
        ROOT / "pyproject.toml",
        *sorted(ROOT.glob("backends/*/pyproject.toml")),
        *sorted(ROOT.glob("loader/*/pyproject.toml")),
    ]
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of everything built: tox built it already, at a desk it is built here."""
    if built := os.environ.get("KEYMGMT_TEST_DIST"):
        return Path(built)
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([ROOT / ".ci" / "build", folder], check=True, timeout=300)
    return folder


def package_of(project: str) -> str:
    return project.replace("-", "_")


def wheel_of(dist: Path, project: str) -> Path:
    (wheel,) = dist.glob(f"{package_of(project)}-[0-9]*.whl")
    return wheel


def test_everything_is_built(dist):
    assert len(list(dist.glob("*.whl"))) == len(list(dist.glob("*.tar.gz"))) == len(PROJECTS)


@pytest.mark.nightly
def test_the_same_tree_gives_the_same_files(dist, tmp_path):
    """Elsewhere, at another time, by a user with another umask."""
    for name in ("pyproject.toml", "uv.lock", "CHANGELOG.md", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (".ci", "keymgmt", "backends", "loader"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in tmp_path.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (2_000_000_000, 2_000_000_000))
    command = ["sh", "-c", 'umask 077 && exec .ci/build "$0"', tmp_path / "again"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=280)
    built = sorted([*dist.glob("*.whl"), *dist.glob("*.tar.gz")])
    assert len(built) == 2 * len(PROJECTS)
    again = tmp_path / "again"
    assert [
        path.name for path in built if path.read_bytes() != (again / path.name).read_bytes()
    ] == []


def test_what_they_need_is_listed_with_its_hashes(dist):
    """The versions of uv.lock, as a CycloneDX document."""
    (path,) = dist.glob("*.cdx.json")
    listed = json.loads(path.read_bytes())
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.5")
    parts = {part["name"]: part for part in listed["components"]}
    assert set(PROJECTS) <= {*parts, listed["metadata"]["component"]["name"]}
    assert {"cryptography", "hvac", "python-pkcs11", "tpm2-pytss", "openvino"} <= set(parts)
    assert not {"ruff", "mypy", "moto", "tox"} & set(parts), "what a developer needs"
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    versions = {each["name"]: each["version"] for each in lock}
    for name, part in parts.items():
        assert part["version"] == versions[name]
        if name not in PROJECTS:
            assert any(link.get("hashes") for link in part["externalReferences"]), name
    refs = {part["bom-ref"] for part in listed["components"]}
    refs.add(listed["metadata"]["component"]["bom-ref"])
    assert {each["ref"] for each in listed["dependencies"]} <= refs


@pytest.mark.parametrize("project", PROJECTS)
def test_a_wheel_holds_its_own_modules_all_of_them_and_nothing_else(dist, project):
    package = package_of(project)
    with zipfile.ZipFile(wheel_of(dist, project)) as wheel:
        names = wheel.namelist()
    assert f"{package}/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {package}
    source = PROJECTS[project] / package
    modules = {str(path.relative_to(source.parent)) for path in source.rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


@pytest.mark.parametrize("project", PROJECTS)
def test_a_source_distribution_holds_its_package_only(dist, project):
    package = package_of(project)
    (path,) = dist.glob(f"{package}-[0-9]*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2].partition("/")[0] for name in archive.getnames()}
    assert names == {package, "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}


def metadata_of(dist: Path, project: str) -> Message:
    with zipfile.ZipFile(wheel_of(dist, project)) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_one_version_for_all(dist):
    every = [metadata_of(dist, project) for project in PROJECTS]
    (version,) = {metadata["Version"] for metadata in every}
    # Ours go together: a backend of another version was tested with another core.
    for metadata in every:
        for requirement in metadata.get_all("Requires-Dist", []):
            if requirement.startswith("keymgmt"):
                assert f"=={version}" in requirement.replace(" ", ""), requirement


@pytest.mark.parametrize("project", PROJECTS)
def test_what_an_index_shows_of_it(dist, project):
    metadata = metadata_of(dist, project)
    assert metadata["Name"] == project
    assert metadata["Summary"]
    assert metadata["Author"] == "The keymgmt authors"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    links = dict(each.split(", ") for each in metadata.get_all("Project-URL", []))
    assert set(links) == {"Homepage", "Documentation", "Changelog", "Issues", "Security"}
    assert all(link.startswith("https://github.com/keymgmt/keymgmt") for link in links.values())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = str(metadata.get_payload())
    assert f'pip install "{project}' in text or 'pip install "keymgmt[' in text
    # Beside it on an index there is no other file that a link could lead to.
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    assert [each for each in targets if not "".join(each).startswith("https://")] == []
    bare = re.findall(r"`(?:docs|backends|examples)/[\w./-]+\.md`", text)
    assert bare == [], "a page that is not in the wheel is a link"


def test_pip_installs_the_wheels_without_uv(dist, tmp_path):
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    subprocess.run([base, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PYTHON"))
    }
    install = [python, "-m", "pip", "install", "--quiet", "--find-links", dist, "keymgmt[file]"]
    subprocess.run(install, check=True, env=environment, cwd=tmp_path, timeout=280)
    program = python.parent / "keymgmt"
    # Where man looks for what is in a bin beside it.
    manuals = {file.name for file in (tmp_path / "venv" / "share" / "man" / "man1").iterdir()}
    assert {"keymgmt.1", "keymgmt-seal.1", "keymgmt-file.1"} <= manuals
    assert not list(tmp_path.glob("venv/lib/*/site-packages/keymgmt*/man"))
    done = programs.run(program, "--version", check=True, env=environment)
    assert done.stdout.startswith("keymgmt 0.")


def test_an_office_enrols_devices_without_the_tpm_library(dist, tmp_path):
    """With wheels alone: no compiler, no libtss2, and no sources that would ask for them.

    office/ holds what one swtpm was asked and answered; its maker's certificate ends in 2067.
    """
    folder = tmp_path / "devices"
    shutil.copytree(Path(__file__).parent / "office", folder)
    (folder / "d1.state").chmod(0o600)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PYTHON"))
    }
    environment |= {"KEYMGMT_CONFIG": str(tmp_path / "keymgmt.toml")}
    (tmp_path / "keymgmt.toml").write_text('[providers.local]\nbackend = "file"\npath = "keys"\n')
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    subprocess.run([base, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    scripts = tmp_path / "venv" / "bin"

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    install = [scripts / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    run(*install, "--find-links", dist, "keymgmt[file]", "keymgmt-tpm2")
    found = "import importlib.util; print(importlib.util.find_spec('tpm2_pytss'))"
    assert run(scripts / "python", "-c", found) == "None\n"
    keymgmt, enroll = scripts / "keymgmt", ["tpm", "enroll"]
    run(keymgmt, "keys", "create", "local:enrolment", "--sign")
    decided = ["--key", "dev", "--any-device", "--any-policy", "--sign", "local:enrolment"]
    said = run(keymgmt, *enroll, "accept", folder, "--ca", folder / "maker.pem", *decided, "--json")
    first, summary = map(json.loads, said.splitlines())
    assert summary["accepted"] == 1
    assert first["attributes"]["attested"] == "tpm2"
    assert (folder / "d1.recipient.sig").exists()
    (folder / "d2.request").write_bytes((folder / "d1.request").read_bytes())
    said = run(keymgmt, *enroll, "challenge", folder, "--ca", folder / "maker.pem", "--json")
    assert json.loads(said.splitlines()[-1])["challenged"] == 1
