"""What may stand in the place of a folder, and what is refused of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import keymgmt
from keymgmt._config.config import Config
from keymgmt._remote.location import Location, is_location
from keymgmt.errors import ConfigError

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    "text",
    [
        "https://models.example/a/b.sealed",
        "https://models.example:8443/a",
        "http://127.0.0.1:9000/a",
        "http://[::1]:9000/a",
        "s3://bucket/a/b.sealed",
        "oci://registry.example/team/resnet50:7",
        "oci://localhost:5000/resnet50:latest",
        f"oci://registry.example/resnet50@{DIGEST}",
    ],
)
def test_a_location_is_shown_as_it_was_written(text):
    assert is_location(text)
    assert str(Location.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "ftp://models.example/a",
        "http://models.example/a",
        "https://models.example/../a",
        "https://models.example/a?token=x",
        "https:///a",
        "https://models.example:0/a",
        pytest.param(f"https://models.example:{'9' * 5000}/a", id="port"),
        "https://models.example:\u0661/a",
        "s3:///a",
        "oci://registry.example/resnet50",
        "oci://registry.example/ResNet:1",
        "oci://registry.example/../resnet50:1",
        "oci://registry.example/resnet50@sha256:abc",
        "oci://registry.example/resnet50:a/b",
        "oci://registry.example/resnet50:1\nhost: x",
    ],
)
def test_what_is_none_is_refused(text):
    with pytest.raises(ConfigError):
        Location.parse(text)


def test_a_login_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as refused:
        Location.parse("https://me:27182818@models.example/a")
    assert "27182818" not in f"{refused.value}{refused.value.hint}"


def test_a_slash_that_a_path_lost_is_said():
    with pytest.raises(ConfigError, match="a slash is lost"):
        is_location(Path("s3://bucket/a"))
    assert not is_location(Path("a/b"))
    assert not is_location("a/b")


@pytest.mark.parametrize(
    ("access", "said"),
    [
        ({"registry.example": {}}, "write"),
        ({"s3://bucket": {"auth": "docker"}}, "for registries"),
        ({"oci://registry.example": {"plain_http": True}}, "on this machine"),
        ({"oci://registry.example": {"auth": "docker", "user": "me"}}, "not both"),
        ({"oci://registry.example": {"secret": "27182818"}}, "not written here"),
        ({"oci://registry.example": {"proxy": "socks5://proxy.example"}}, "write https://"),
    ],
)
def test_a_wrong_table_is_refused(access, said):
    with pytest.raises(ConfigError, match=said) as refused:
        Config({"remote": {"access": access}})
    assert "27182818" not in str(refused.value)


def test_certificates_and_proxy_hold_for_all(tmp_path):
    table = {"ca_file": "ca.pem", "access": {"oci://a.example": {"ca_file": "other.pem"}}}
    remote = Config({"remote": table}, path=tmp_path / "keymgmt.toml").remote
    assert remote.access_to("oci://a.example").ca_file == tmp_path / "other.pem"
    assert remote.access_to("oci://b.example").ca_file == tmp_path / "ca.pem"


def test_a_program_does_not_get_the_variables_of_logins():
    secret = {"user": "me", "secret": {"env": "REGISTRY_PASSWORD"}}
    config = Config({"remote": {"access": {"oci://a.example": secret}}})
    assert "REGISTRY_PASSWORD" in config.secret_variables


@pytest.mark.parametrize("target", ["s3://bucket/a", "oci://h/a:1", Path("s3://bucket/a")])
def test_what_makes_a_folder_makes_it_on_this_machine(site, sealed, monkeypatch, target):
    """Else it was said to make the folder ``s3:``."""
    monkeypatch.chdir(site.root)
    makers: list[Callable[[], object]] = [
        lambda: keymgmt.seal(site.plain, target, to=["local:a"], keys=site.config()),
        lambda: keymgmt.unseal(sealed, target, keys=site.config()),
        lambda: keymgmt.pull("oci://127.0.0.1:1/a:1", target, keys=site.config()),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="not a folder of this machine") as refused:
            make()
        assert "copy" in str(refused.value.hint)
