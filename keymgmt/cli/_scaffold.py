"""What ``keymgmt plugin new`` writes: templates beside this file, with the names filled in."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

import keymgmt
from keymgmt.errors import ConfigError

__all__ = ["write_scaffold"]

_FILES: Final = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "tox.ini": "tox.ini",
    "gitignore": ".gitignore",
    "init.py": "$package/__init__.py",
    "provider.py": "$package/provider.py",
    "client.py": "$package/client.py",
    "test_contract.py": "tests/test_contract.py",
}
# What is there in the place of a toy file, and beside it.
_HTTP: Final = {
    "client_http.py": "$package/client.py",
    "test_contract_http.py": "tests/test_contract.py",
    "service.py": "tests/service.py",
}
_FILE_WORDS: Final = {"toy": "a toy file", "settings": 'path = "keys.json"'}
_HTTP_WORDS: Final = {
    "toy": "a toy service",
    "settings": 'address = "https://keys.example:8443"\n'
    'ca_file = "service.pem"\ntoken = { file = "token" }',
}


def write_scaffold(name: str, directory: Path, *, http: bool = False) -> list[Path]:
    """Write the files of a new backend into a directory that is new or empty.

    Args:
        name: the backend's name, checked by the caller.
        directory: where to write.
        http: for a service that is asked over HTTPS.

    Returns:
        The files, relative to the directory.

    Raises:
        ConfigError: there is something in the directory already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty", hint="name another directory")
    words = {
        "backend": name,
        "distribution": f"keymgmt-{name}",
        "package": f"keymgmt_{name.replace('-', '_')}",
        "kind": "".join(part.capitalize() for part in name.replace("-", "_").split("_")),
        "version": keymgmt.__version__,
        **(_HTTP_WORDS if http else _FILE_WORDS),
    }
    wanted = {target: template for template, target in _FILES.items()}
    if http:
        wanted |= {target: template for template, target in _HTTP.items()}
    templates = files("keymgmt.cli").joinpath("scaffold")
    written: list[Path] = []
    for target, template in wanted.items():
        path = Path(Template(target).substitute(words))
        content = templates.joinpath(f"{template}.txt").read_text("utf-8")
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(Template(content).substitute(words), "utf-8")
        written.append(path)
    marker = Path(words["package"], "py.typed")
    (directory / marker).touch()
    return [*written, marker]
