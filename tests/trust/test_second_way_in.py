"""A provider that does not work here: another group opens, and it is said where machines look."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keymgmt
from keymgmt import Config, errors


@pytest.fixture
def model(site) -> Path:
    """Opens with ``first:a``, else with ``second:b``."""
    folder = site.root / "second"
    shutil.copytree(site.root / "keys", folder)
    for file in (*folder.glob("a.*"), *(site.root / "keys").glob("b.*")):
        file.unlink()
    shutil.copy(site.root / "keys" / "versions.json", site.root / "versions.json")
    for keys in (folder, site.root / "keys"):
        # Neither ever had the other's key.
        (keys / "versions.json").unlink()
    path: Path = site.seal("first:a", "second:b", keys=make(site), sign="second:publisher")
    return path


def make(site: Any, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Config:
    first: dict[str, Any] = {"backend": "file", "path": str(site.root / "keys")}
    data = {
        "providers": {
            "first": first,
            "second": {"backend": "file", "path": str(site.root / "second")},
        },
        "policy": dict(site.policy),
    }
    change(data)
    return Config(data, path=site.root / "keymgmt.toml")


def no_package(site: Any) -> Config:
    def change(data: dict[str, Any]) -> None:
        # The package of another backend that would hold the key is gone.
        data["providers"]["first"] = {"backend": "file", "distribution": "keymgmt-other"} | {
            "path": data["providers"]["first"]["path"]
        }

    return make(site, change)


def no_folder(site: Any) -> Config:
    shutil.rmtree(site.root / "keys")
    return make(site)


def open_folder(site: Any) -> Config:
    (site.root / "keys").chmod(0o755)
    return make(site)


def open_key_file(site: Any) -> Config:
    next((site.root / "keys").glob("a.*")).chmod(0o644)
    return make(site)


def cut_key_file(site: Any) -> Config:
    next((site.root / "keys").glob("a.*")).write_bytes(b'{"keys": [')
    return make(site)


def lost_key_file(site: Any) -> Config:
    # It was here: what remembers the versions of this folder is put back as it was.
    shutil.copy(site.root / "versions.json", site.root / "keys" / "versions.json")
    next((site.root / "keys").glob("a.*")).unlink()
    return make(site)


def no_key_folder_but_a_file(site: Any) -> Config:
    shutil.rmtree(site.root / "keys")
    (site.root / "keys").touch(mode=0o600)
    return make(site)


KINDS = [
    *(no_package, no_folder, open_folder, open_key_file, cut_key_file, lost_key_file),
    no_key_folder_but_a_file,
]


@pytest.mark.parametrize("absence", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_absence(site, model, absence, caplog):
    config = absence(site)
    with (
        caplog.at_level(logging.INFO, "keymgmt"),
        keymgmt.open(model, keys=config) as opened,
    ):
        assert opened.group == 1
        assert opened.opened_by == ("second",)
        (attempt,) = opened.failed
    assert attempt.provider == "first"
    assert isinstance(attempt.error, errors.ProviderError)
    (event,) = [record for record in caplog.records if "event=fallback" in record.getMessage()]
    assert event.levelno == logging.WARNING
    assert event.audit["provider"] == "first"
    assert event.audit["opened_by"] == "second"
    warned = [r.getMessage() for r in caplog.records if r.name == "keymgmt"]
    assert any("the provider first does not work" in message for message in warned)
    proved = keymgmt.verify(model, keys=absence_again(site, config)).to_json()
    assert proved["opened_by"] == ["second"]
    assert proved["failed"][0]["provider"] == "first"
    assert proved["failed"][0]["reason"]
    json.dumps(proved)


def absence_again(site: Any, config: Config) -> Config:
    """The same config, loaded anew: nothing was kept from the open before."""
    data = {"providers": config._tables, "policy": dict(site.policy)}
    return Config(data, path=site.root / "keymgmt.toml")


@pytest.mark.parametrize("absence", KINDS, ids=lambda kind: kind.__name__)
def test_a_config_can_refuse_it(site, model, absence):
    data = {
        "providers": absence(site)._tables,
        "policy": site.policy | {"fallback": "refuse"},
    }
    config = Config(data, path=site.root / "keymgmt.toml")
    with pytest.raises(errors.CannotUnlock, match="refuses a second way in") as caught:
        keymgmt.open(model, keys=config)
    assert "opens with second alone" in str(caught.value).replace("would open", "opens")
    assert caught.value.hint


def test_a_machine_whose_own_key_works_hears_nothing(site, model, caplog):
    with (
        caplog.at_level(logging.INFO, "keymgmt"),
        keymgmt.open(model, keys=make(site)) as opened,
    ):
        assert (opened.opened_by, opened.failed) == (("first",), ())
    assert "fallback" not in caplog.text
    # Another machine's recipient in front is no failure of this one.
    shutil.rmtree(site.root / "keys")
    (site.root / "keys").mkdir(mode=0o700)
    with keymgmt.open(model, keys=make(site)) as opened:
        assert (opened.opened_by, opened.failed) == (("second",), ())


@pytest.mark.parametrize("absence", [no_folder, open_key_file], ids=lambda kind: kind.__name__)
def test_sealing_and_signing_never_fall_back(site, model, absence):
    config = absence(site)
    with pytest.raises(errors.ProviderError):
        site.seal("first:a", "second:b", keys=config, sign="second:publisher", target="n.sealed")
    shutil.rmtree(site.root / "keys", ignore_errors=True)
    with pytest.raises(errors.ProviderError):
        keymgmt.sign(model, key="first:publisher", keys=make(site))


@pytest.mark.parametrize("absence", [make, *KINDS], ids=lambda kind: kind.__name__)
def test_no_error_keeps_the_callers_frames_alive(site, model, absence):
    """Whoever opens a model has its memory in variables, to be wiped when the last user is gone."""

    class Memory:
        pass

    def load(config: Config) -> tuple[weakref.ref[Memory], Any]:
        memory = Memory()
        with keymgmt.open(model, keys=config) as opened:
            return weakref.ref(memory), opened.failed

    config = absence(site)
    gc.collect()
    gc.disable()
    try:
        memory, failed = load(config)
        assert memory() is None
        assert bool(failed) is (absence is not make)
        assert all(attempt.error.__traceback__ is None for attempt in failed)
    finally:
        gc.enable()
