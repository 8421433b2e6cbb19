"""Addresses of services, and which hosts are this machine."""

from __future__ import annotations

import pytest

from keymgmt._system.address import is_loopback, split_address


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "127.0.0.1:80", "::1", "[::1]", "[::1]:443"]
)
def test_addresses_of_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "localhost:80", "127.0.0.1.example", "192.0.2.1", "::2", "[::1", "1", "a@b"],
)
def test_a_name_is_not_this_machine_since_others_may_say_what_it_stands_for(host):
    assert not is_loopback(host)


def test_an_address_is_split_and_plain_http_is_for_this_machine():
    assert split_address("https://site.example:8443/path", "no").port == 8443
    assert split_address("http://[::1]:80", "no").hostname == "::1"
    assert split_address("http://169.254.169.254", "no", ["169.254.169.254"]).scheme == "http"
    assert split_address("unix:/run/socket", "no").path == "/run/socket"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://site.example:x", "is not an address"),
        ("https://site.example:99999", "is not an address"),
        ("https://[::1", "is not an address"),
        ("http://site.example", "is not protected"),
        ("http://localhost", "is not protected"),
        ("https://me:SECRET@site.example", "^no login here$"),
        ("http://:SECRET@site.example", "^no login here$"),
    ],
)
def test_an_address_that_cannot_be_used(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        split_address(text, "no login here")
    assert "SECRET" not in str(caught.value)
