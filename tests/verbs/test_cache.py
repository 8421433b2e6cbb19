"""The opt-in cache of data keys: bounded in time and uses, and wiped."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import keymgmt
from keymgmt import Config, errors
from keymgmt._crypto.dek import Dek
from keymgmt._crypto.dek_cache import DekCache
from keymgmt.testing._process import in_fork


@pytest.fixture
def cached(site):
    def make(**cache) -> tuple[Config, list[str]]:
        data = {
            "providers": {"local": {"backend": "file", "path": str(site.root / "keys")}},
            "policy": site.policy,
            "cache": {"seconds": 60, "uses": 3} | cache,
        }
        config = Config(data, path=site.root / "keymgmt.toml")
        provider, calls = config.provider("local"), []
        real = provider.unwrap

        def unwrap(wrapped, context):
            calls.append(wrapped.key)
            return real(wrapped, context)

        provider.unwrap = unwrap
        return config, calls

    return make


def test_uses(site, cached):
    path, (config, calls) = site.seal(), cached(uses=3)
    for _ in range(8):
        with keymgmt.open(path, keys=config) as model:
            assert model.read("model.xml") == (site.plain / "model.xml").read_bytes()
    assert len(calls) == 2


def test_seconds(site, cached):
    path, (config, calls) = site.seal(), cached(seconds=0.2, uses=1000)
    keymgmt.open(path, keys=config).close()
    deadline = time.monotonic() + 10
    while any(config.cache._page[:]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(config.cache._page[:]), "wiped by the timer, with nobody asking"
    keymgmt.open(path, keys=config).close()
    assert len(calls) == 2


def test_no_cache_unless_it_is_asked_for(site):
    assert site.config().cache is None


def test_a_changed_policy_asks_again(site, cached):
    path, (config, calls) = site.seal(), cached(uses=1000)
    keymgmt.open(path, keys=config).close()
    keymgmt.rewrap(path, keys=site.config(), add=["local:b"])
    keymgmt.open(path, keys=config).close()
    assert len(calls) == 2


def test_a_cached_key_lets_nothing_untrusted_in(site, cached):
    path, (config, _) = site.seal(), cached()
    keymgmt.open(path, keys=config).close()
    (path / "signatures.json").unlink()
    with pytest.raises(errors.UntrustedPublisher):
        keymgmt.open(path, keys=config)


def test_close_wipes(site, cached):
    path, (config, _) = site.seal(), cached()
    keymgmt.open(path, keys=config).close()
    assert any(config.cache._page[:])
    config.close()
    assert not any(config.cache._page[:])


def test_a_forked_child_has_none(site):
    cache = DekCache(60, 1000)
    with Dek.generate() as dek:
        cache.put(b"name", dek)
        answer = in_fork(lambda: f"{cache.get(b'name')} {any(cache._page[:])}", 20)
        assert answer == "None False"
        found = cache.get(b"name")
        assert found == dek


def test_what_a_forked_child_keeps_is_locked_in_memory():
    cache = DekCache(60, 1000)

    def keep() -> str:
        with Dek.generate() as dek:
            cache.put(b"name", dek)
            assert cache.get(b"name") == dek
        status = Path("/proc/self/status").read_text()
        return re.search(r"VmLck:\s*(\d+) kB", status)[1]

    assert int(keep()) > 0
    assert int(in_fork(keep, 20)) > 0


def test_more_keys_than_slots():
    cache = DekCache(60, 1000)
    for number in range(200):
        with Dek.generate() as dek:
            cache.put(bytes([number]), dek)
    assert cache.get(bytes([0])) is not None
    assert cache.get(bytes([199])) is None


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"uses": 0}, {"seconds": 100_000}])
def test_bounds(cached, bad):
    with pytest.raises(errors.ConfigError, match=r"\[cache\]"):
        cached(**bad)
