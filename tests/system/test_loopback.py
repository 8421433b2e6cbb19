"""Which hosts are this machine."""

from __future__ import annotations

import pytest

from keymgmt._system.loopback import is_loopback


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "127.0.0.1:80", "::1", "[::1]", "[::1]:443"]
)
def test_addresses_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "localhost:80", "127.0.0.1.example", "192.0.2.1", "::2", "[::1", "1", "a@b"],
)
def test_a_name_is_not_this_machine_since_others_may_say_what_it_stands_for(host: str) -> None:
    assert not is_loopback(host)
