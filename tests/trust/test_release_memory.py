"""What remembers releases, bound to an anchor: files that were put back, and power cuts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from keymgmt import Config, errors
from keymgmt._system.locks import lock_file
from keymgmt._system.strict_json import dump_json
from keymgmt._trust import release_memory
from keymgmt._trust.release_memory import ReleaseMemory
from keymgmt.backend import ANCHOR_START
from keymgmt.testing.fakes import MemoryProvider, MemoryService, MemorySettings

NUMBERS = itertools.count()


@pytest.fixture
def provider() -> Iterator[MemoryProvider]:
    with MemoryProvider("safe", MemorySettings(service=f"anchor-{next(NUMBERS)}")) as made:
        yield made


@pytest.fixture
def memory(provider, tmp_path) -> ReleaseMemory:
    return ReleaseMemory(tmp_path / "releases.json", lambda call: call(provider), "safe")


def cut(memory: ReleaseMemory, *, moved: bool) -> ReleaseMemory:
    """The same memory on a machine whose power fails before or after its anchor moves."""

    def ask(call: Callable[[Any], Any]) -> Any:
        assert memory.anchor is not None

        class Dies:
            def anchor(self) -> Any:
                return memory.anchor(lambda provider: provider.anchor())  # type: ignore[misc]

            def move_anchor(self, value: bytes, step: bytes) -> None:
                if moved:
                    memory.anchor(lambda p: p.move_anchor(value, step))  # type: ignore[misc]
                raise KeyboardInterrupt

        return call(Dies())

    return ReleaseMemory(memory.path, ask, memory.provider)


def test_an_older_file_and_none_are_noticed(memory):
    memory.remember("a", 1)
    old = memory.path.read_bytes()
    memory.remember("a", 2)
    memory.remember("b", 1)
    assert memory.recall().releases == {"a": 2, "b": 1}
    newest = memory.path.read_bytes()
    memory.path.write_bytes(old)
    with pytest.raises(errors.RollbackError, match="not the newest") as caught:
        memory.recall()
    assert "restore the newest" in str(caught.value.hint)
    with pytest.raises(errors.RollbackError, match="not the newest"):
        memory.remember("a", 3)
    memory.path.unlink()
    with pytest.raises(errors.RollbackError, match="gone"):
        memory.recall()
    memory.path.write_bytes(newest)
    assert memory.recall().releases == {"a": 2, "b": 1}


def test_a_file_that_somebody_wrote_is_noticed(memory):
    """Without moving the anchor nobody makes a file that counts, whatever he knows."""
    memory.remember("a", 1)
    memory.remember("a", 2)
    data = json.loads(memory.path.read_bytes())
    for number in range(2):
        changed = json.loads(json.dumps(data))
        changed["states"][number]["releases"]["a"] = 0
        memory.path.write_bytes(dump_json({**changed, "states": [changed["states"][number]]}))
        with pytest.raises(errors.RollbackError):
            memory.recall()
    # As the next state, and as a plain file.
    after = memory.anchor(lambda provider: provider.anchor().hex())  # type: ignore[misc]
    forged = {"before": after, "releases": {}, "time": None}
    memory.path.write_bytes(dump_json({**data, "states": [forged]}))
    with pytest.raises(errors.RollbackError):
        memory.recall()
    memory.path.write_bytes(
        dump_json({"format": "keymgmt-releases/1", "releases": {}, "time": None})
    )
    with pytest.raises(errors.RollbackError):
        memory.recall()


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("moved", [False, True])
def test_a_power_cut_leaves_one_that_counts(memory, before, *, moved):
    for release in range(before):
        memory.remember("a", release)
    held = memory.recall().releases
    with pytest.raises(KeyboardInterrupt):
        cut(memory, moved=moved).remember("a", 9)
    # Before the first move nothing is bound, and the file counts as a plain one does.
    assert memory.recall().releases == ({"a": 9} if moved or not before else held)
    memory.remember("b", 1)
    memory.remember("a", 10)
    assert memory.recall().releases == {"a": 10, "b": 1}


def test_what_a_power_cut_left_cannot_be_put_back_later(memory):
    """A file that was written and not yet bound is no second newest file."""
    memory.remember("a", 1)
    good = memory.path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        cut(memory, moved=False).remember("b", 5)
    prepared = memory.path.read_bytes()
    memory.path.write_bytes(good)
    memory.remember("a", 7)
    memory.path.write_bytes(prepared)
    with pytest.raises(errors.RollbackError):
        memory.recall()


def test_a_plain_file_is_taken_over(memory):
    ReleaseMemory(memory.path).remember("a", 3)
    assert memory.recall().releases == {"a": 3}
    memory.remember("b", 1)
    assert memory.recall().releases == {"a": 3, "b": 1}
    with pytest.raises(errors.ConfigError, match="bound to an anchor") as caught:
        ReleaseMemory(memory.path).recall()
    assert "anchor =" in str(caught.value.hint)


def test_an_anchor_that_is_set_up_again_takes_the_file_that_is_there(memory, provider):
    memory.remember("a", 3)
    memory.remember("a", 4)
    provider.service.anchor = MemoryService("another").anchor
    assert memory.recall().releases == {"a": 4}
    memory.remember("a", 5)
    assert memory.recall().releases == {"a": 5}


@pytest.mark.parametrize("how", ["a plain file", "set up again", "a cut at the first"])
def test_the_next_open_binds_what_is_there(memory, provider, how):
    """Also where it says nothing new: until it is bound, an old file and none would be taken."""
    plain = ReleaseMemory(memory.path)
    if how == "a cut at the first":
        with pytest.raises(KeyboardInterrupt):
            cut(memory, moved=False).remember("a", 5)
        old = dump_json({"format": "keymgmt-releases/1", "releases": {"a": 3}, "time": None})
    else:
        before = plain if how == "a plain file" else memory
        before.remember("a", 3)
        old = memory.path.read_bytes()
        before.remember("a", 5)
    if how == "set up again":
        provider.service.anchor = ANCHOR_START
    memory.remember("a", 5, known=memory.recall())
    assert provider.anchor() != ANCHOR_START
    assert memory.recall().releases == {"a": 5}
    bound = provider.anchor()
    memory.remember("a", 5, known=memory.recall())
    assert provider.anchor() == bound
    memory.path.write_bytes(old)
    with pytest.raises(errors.RollbackError, match="not the newest"):
        memory.recall()
    memory.path.unlink()
    with pytest.raises(errors.RollbackError, match="gone"):
        memory.recall()


def test_one_who_waited_for_the_lock_in_vain_says_no_rollback(memory, monkeypatch):
    memory.remember("a", 1)
    memory.remember("a", 2)
    provider_value = memory.anchor(lambda provider: provider.anchor())  # type: ignore[misc]
    memory.remember("a", 3)
    memory.remember("a", 4)

    class Earlier:
        def anchor(self) -> bytes:
            return bytes(provider_value)

    late = ReleaseMemory(memory.path, lambda call: call(Earlier()), "safe")  # type: ignore[arg-type]
    monkeypatch.setattr(release_memory, "_WAIT", 0.0)
    lock = lock_file(memory.path.with_name(".releases.json.lock"), 1.0)
    with lock, pytest.raises(errors.ConfigError, match="held its lock") as caught:
        late.recall()
    assert "can write" not in str(caught.value.hint)


def test_one_that_could_not_be_read_again_is_not_written(memory, provider, monkeypatch):
    memory.remember("a", 1)
    memory.remember("a", 2)
    monkeypatch.setattr(release_memory, "MAX_FILE", memory.path.stat().st_size + 100)
    value = provider.anchor()
    with pytest.raises(errors.ConfigError, match="at most"):
        memory.remember("b" * 100, 1)
    assert provider.anchor() == value
    assert memory.recall().releases == {"a": 2}


def test_an_anchor_that_is_not_reached_is_no_empty_memory(memory, provider):
    memory.remember("a", 3)
    provider.service.up = False
    with pytest.raises(errors.ProviderUnavailable):
        memory.recall()
    with pytest.raises(errors.ProviderUnavailable):
        memory.remember("a", 4)


def test_one_that_moves_twice_while_it_is_looked_at(memory, provider):
    """Whoever saw the anchor before and the file after looks again."""
    memory.remember("a", 1)
    others = iter((8, 9))

    def ask(call: Callable[[Any], Any]) -> Any:
        value = call(provider)
        for release in others:
            memory.remember("a", release)
        return value

    assert ReleaseMemory(memory.path, ask, "safe").recall().releases == {"a": 9}


def test_many_at_once(memory):
    """Nobody takes another one's step for a file that was put back."""

    def work(number: int) -> None:
        for release in range(8):
            memory.remember(f"model-{number}", release)
            assert memory.recall().releases[f"model-{number}"] == release

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert memory.recall().releases == {f"model-{number}": 7 for number in range(4)}


def test_a_time_moves_the_anchor_once_a_day(memory, provider, monkeypatch):
    def at(text: str) -> bytes:
        monkeypatch.setattr(release_memory, "utc_text", lambda _: text)
        memory.remember("a", 1, time=True)
        return provider.anchor()

    first = at("2026-05-01T08:00:00Z")
    assert at("2026-05-01T23:00:00Z") == first != at("2026-05-02T00:00:00Z")
    assert memory.recall().time == "2026-05-02T00:00:00Z"


@pytest.mark.parametrize(
    ("anchor", "says"), [("nobody", "no provider named"), ("local", "keeps no anchor")]
)
def test_an_anchor_that_cannot_be(site, anchor, says):
    import keymgmt

    table = {"file": str(site.root / "releases.json"), "anchor": anchor}
    with pytest.raises(errors.ConfigError, match=says):
        keymgmt.open(site.seal(), keys=site.config(remember_releases=table))


def test_a_table_and_a_path_mean_the_same(tmp_path):
    for value in ("r.json", {"file": "r.json"}):
        config = Config({"policy": {"remember_releases": value}}, path=tmp_path / "k.toml")
        found = config.policy.remember_releases
        assert found is not None
        assert (found.file, found.anchor) == (tmp_path / "r.json", None)
    with pytest.raises(errors.ConfigError):
        Config({"policy": {"remember_releases": {"anchor": "tpm"}}})
