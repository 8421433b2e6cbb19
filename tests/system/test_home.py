"""Files below a user's home."""

import pytest

from keymgmt._system.home import expand_home
from keymgmt.errors import StorageDenied


def test_a_home_is_an_absolute_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/.aws/config") == tmp_path / ".aws" / "config"
    assert not expand_home("keys").is_absolute()
    for relative in (".", "user"):
        monkeypatch.setenv("HOME", relative)
        with pytest.raises(StorageDenied, match=r"no home directory for '~/\.aws/config'"):
            expand_home("~/.aws/config", StorageDenied)
    with pytest.raises(ValueError, match="no home directory"):
        expand_home("~nobody-of-that-name/keys")
