"""``keymgmt push`` and ``pull`` as commands: what they print, and what the shell completes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback import Authority
from registry import RegistryServer, serve_registry

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def server(require_tool, tmp_path_factory) -> Iterator[RegistryServer]:
    pytest.importorskip("urllib3")
    program = require_tool("docker-registry", package="docker-registry")
    authority = Authority(tmp_path_factory.mktemp("authority"))
    made = serve_registry(program, tmp_path_factory.mktemp("registry"), authority)
    yield made
    made.stop()


@pytest.fixture
def place(server, site) -> str:
    with (site / "keymgmt.toml").open("a") as config:
        config.write(f'\n[remote.access."oci://{server.host}"]\n')
        config.write(f'ca_file = "{server.ca_file}"\n')
    return f"oci://{server.host}/{site.parent.name.replace('_', '-').strip('-').lower()}:3"


def test_both_print_what_they_did(cli, place, sealed, check_output):
    pushed = cli("push", sealed, place)
    assert pushed.code == 0, pushed.err
    assert "resnet50, release 3: 1" in pushed.out
    pushed = cli("push", sealed, place, "--json")
    assert check_output(pushed.out) == {"keymgmt-push/1"}
    assert pushed.json()["moved"] is False
    digest = pushed.json()["digest"]
    pulled = cli("pull", place, "pulled", "--json")
    assert pulled.code == 0, pulled.err
    assert check_output(pulled.out) == {"keymgmt-pull/1"}
    assert (pulled.json()["state"], pulled.json()["digest"]) == ("new", digest)
    pulled = cli("pull", place, "pulled")
    assert "release 3: current" in pulled.out
    assert f"{place} is {digest}" in pulled.out


def test_errors_have_exit_codes(cli, place, sealed, monkeypatch):
    from keymgmt._remote.http import Http

    monkeypatch.setattr(Http, "_wait", lambda *_: False)
    assert cli("pull", place, "pulled").code == 3
    assert cli("pull", "oci://127.0.0.1:1/a:1", "pulled", "--json").code == 6
    assert cli("pull", place, "no/such/folder").code == 3
    assert cli("push", sealed, "registry.example/a:1").code == 3


def test_the_shell_completes_registries(place, site, cli, monkeypatch):
    monkeypatch.setenv("_KEYMGMT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "keymgmt push m.sealed oci")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert cli().out.strip() == place.rpartition("/")[0] + "/"
