"""The cache of ``[remote]``: it saves fetching, and nobody relies on it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from webserver import files_of

import keymgmt
from keymgmt._remote.cache import CachedStorage
from keymgmt._remote.storage import Part
from keymgmt.errors import ConfigError, IntegrityError, KeymgmtError

HEAD = 1 << 16


def fetched(web: Any) -> list[str]:
    """The ranges of payload that were asked for, but the first of each file."""
    ranges = [seen.headers["range"] for seen in web.seen if seen.path.endswith(".floe")]
    web.seen.clear()
    return [text for text in ranges if not text.startswith("bytes=0-")]


def read(where: str, keys: Any) -> bytes:
    with keymgmt.open(where, keys=keys) as model:
        return bytes(model.read("model.bin"))


def test_what_was_fetched_is_not_fetched_again(site, sealed, serve, config):
    web = serve(files_of(site.root))
    where, keys = f"{web.url}/m.sealed", config(cache=str(site.root / "cache"))
    plain = (site.plain / "model.bin").read_bytes()
    assert read(where, keys) == plain
    assert fetched(web)
    assert read(where, keys) == plain
    assert fetched(web) == []
    cache = site.root / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    kept = [(file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) for file in cache.iterdir()]
    assert {mode for _, mode in kept} == {0o600}
    assert not any(plain[:64] in content for content, _ in kept)


def test_what_is_damaged_is_fetched_again(site, sealed, serve, config):
    web = serve(files_of(site.root))
    where, keys = f"{web.url}/m.sealed", config(cache=str(site.root / "cache"))
    plain = read(where, keys)
    first, second, *_ = (site.root / "cache").iterdir()
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"")
    fetched(web)
    assert read(where, keys) == plain
    assert len(fetched(web)) == 2
    assert read(where, keys) == plain
    assert fetched(web) == []


def test_what_was_forged_is_refused(site, sealed, serve, config):
    web = serve(files_of(site.root))
    where, keys = f"{web.url}/m.sealed", config(cache=str(site.root / "cache"))
    read(where, keys)
    for file in (site.root / "cache").iterdir():
        content = bytearray(file.read_bytes()[:-32])
        content[100] ^= 1
        file.write_bytes(content + blake3(content).digest())
    with pytest.raises(KeymgmtError) as refused:
        read(where, keys)
    assert isinstance(refused.value, IntegrityError)


def test_another_file_in_its_place_is_another_part(site, sealed, serve, config):
    web = serve(files_of(site.root))
    where, keys = f"{web.url}/m.sealed", config(cache=str(site.root / "cache"))
    read(where, keys)
    fetched(web)
    keymgmt.reseal(sealed, to=["local:a"], keys=site.config())
    assert read(where, keys) == (site.plain / "model.bin").read_bytes()
    assert fetched(web)


def test_others_may_not_look_into_it(site, sealed, serve, config):
    (site.root / "cache").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="cache"):
        read("http://127.0.0.1:9/m", config(cache=str(site.root / "cache")))
    with pytest.raises(ConfigError, match="cannot make the folder"):
        read("http://127.0.0.1:9/m", config(cache=str(site.root / "no" / "cache")))


def test_without_a_place_for_it_models_open(site, sealed, serve, config, caplog):
    web = serve(files_of(site.root))
    keys = config(cache=str(site.root / "cache"))
    with keymgmt.open(f"{web.url}/m.sealed", keys=keys) as model:
        (site.root / "cache").rmdir()
        assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
    assert "keeps nothing" in caplog.text


class Numbers:
    """A storage of one file, each of whose parts is 1000 bytes."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part:
        self.asked.append(start)
        return Part(memoryview(bytes([start]) * 1000), 10_000, pin or '"1"')

    def replace(self, name: str, content: bytes, pin: str) -> str:
        return pin


def test_what_was_used_longest_ago_goes_first(tmp_path):
    numbers = Numbers()
    cache = CachedStorage(numbers, "https://models.example/m", tmp_path / "cache", 3500)

    def ask(start: int) -> bool:
        """Whether it was fetched."""
        numbers.asked.clear()
        part = cache.part("file", start, start + 1, '"1"')
        assert part == Part(memoryview(bytes([start]) * 1000), 10_000, '"1"')
        for number, file in enumerate(sorted((tmp_path / "cache").iterdir(), key=_age)):
            os.utime(file, ns=(number, number))  # a clock that is coarse would make them equal
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= 3500
        return bool(numbers.asked)

    assert [ask(start) for start in (1, 2, 3)] == [True, True, True]
    assert not ask(1)
    assert ask(4)
    assert not ask(1)
    assert not ask(3)
    assert ask(2)


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns


def test_without_a_pin_nothing_is_kept(tmp_path):
    cache = CachedStorage(Numbers(), "https://models.example/m", tmp_path / "cache", 1 << 20)
    for pin in ("", 'W/"1"', "Wed, 21 Oct 2015 07:28:00 GMT"):
        cache.part("file", 1, 2, pin)
    assert list((tmp_path / "cache").iterdir()) == []
