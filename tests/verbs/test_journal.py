"""A rewrap of a tree that goes on where it was: ``--resume``."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import keymgmt
from keymgmt import errors

pytest.importorskip("keymgmt_file")
pytestmark = pytest.mark.once


@pytest.fixture
def tree(site):
    folder = site.root / "tree"
    folder.mkdir()
    first = site.seal("local:a", target="tree/m0.sealed")
    for number in range(1, 6):
        shutil.copytree(first, first.with_name(f"m{number}.sealed"))
    site.provider.rotate_key("a")
    return folder


@pytest.fixture
def run(site, tree):
    """Rewrap the tree with a journal; the names of the models, by what was done with each."""

    def run(*, resume="journal", **options):
        told: dict[str, set[str]] = {}
        options = {"keys": site.config()} | options
        for item in keymgmt.rewrap_tree(tree, resume=site.root / resume, **options):
            if isinstance(item, keymgmt.Failure):
                state = "failed"
            else:
                state = "skipped" if item.skipped else "changed" if item.changed else "looked at"
                state = state if not item.exit_code else "failed"
            told.setdefault(state, set()).add(Path(item.path).stem)
        return told

    return run


ALL = {f"m{number}" for number in range(6)}


def lines(site):
    return [json.loads(line) for line in (site.root / "journal").read_bytes().splitlines()]


def test_what_is_finished_is_passed_over(site, tree, run, monkeypatch):
    assert run() == {"changed": ALL}
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.rewrap_steps", None)
    assert run() == {"skipped": ALL}
    assert [line["path"] for line in lines(site) if "path" in line] != []
    assert stat.S_IMODE((site.root / "journal").stat().st_mode) == 0o600


def test_what_was_changed_since_is_looked_at_again(site, tree, run):
    run()
    keymgmt.rewrap(tree / "m1.sealed", add=["local:b"], keys=site.config())
    data = (tree / "m2.sealed" / "keys.json").read_bytes()
    (tree / "m2.sealed" / "keys.json").write_bytes(data)
    (tree / "m3.sealed").rename(tree / "n3.sealed")
    shutil.rmtree(tree / "m4.sealed")
    shutil.copytree(tree / "m0.sealed", tree / "m4.sealed")
    assert run() == {"looked at": {"m1", "m2", "n3", "m4"}, "skipped": {"m0", "m5"}}
    assert run() == {"skipped": {"m0", "m1", "m2", "n3", "m4", "m5"}}


def test_after_another_rotation_every_model_is_looked_at(site, tree, run):
    run()
    site.provider.rotate_key("a")
    assert run() == {"changed": ALL}
    assert {use.version for use in keymgmt.usage(tree).keys} == {"3"}
    assert run() == {"skipped": ALL}


def test_a_rotation_during_the_run_is_seen_by_the_next(site, tree, run, monkeypatch):
    """Models that were finished before the rotation are not passed over afterwards."""
    models = keymgmt.rewrap_tree(tree, resume=site.root / "journal", keys=site.config())
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.CHUNK", 1)
    next(models)
    site.provider.rotate_key("a")
    list(models)
    monkeypatch.undo()
    before = {use.version: use.opens for use in keymgmt.usage(tree).keys}
    assert set(before) == {"2", "3"}
    done = run()
    assert len(done["changed"]) == before["2"]
    assert {use.version for use in keymgmt.usage(tree).keys} == {"3"}


def test_what_failed_is_tried_again(site, tree, run):
    (tree / "m0.sealed" / "manifest.json").rename(tree / "m0.sealed" / "gone")
    assert run()["failed"] == {"m0"}
    (tree / "m0.sealed" / "gone").rename(tree / "m0.sealed" / "manifest.json")
    assert run() == {"changed": {"m0"}, "skipped": ALL - {"m0"}}


def test_a_key_service_that_is_away_finishes_nothing(site, tree, run):
    (site.root / "keys").rename(site.root / "away")
    assert run() == {"failed": ALL}
    (site.root / "away").rename(site.root / "keys")
    assert run() == {"changed": ALL}
    (site.root / "keys").rename(site.root / "away")
    with pytest.raises(errors.ProviderError):
        run()
    (site.root / "away").rename(site.root / "keys")
    assert run() == {"skipped": ALL}


def test_a_group_that_was_dropped_before_is_no_failure(site, tree, run):
    config = site.config()
    list(keymgmt.rewrap_tree(tree, add=["local:b"], keys=config))
    assert run(drop=["file:b"]) == {"changed": ALL}
    assert run(drop=["file:b"]) == {"skipped": ALL}


@pytest.mark.parametrize(
    ("job", "differs"),
    [
        ({"add": ["local:b"]}, "add"),
        ({"drop": ["file:b"], "shard": None}, "drop"),
        ({"shard": "1/1"}, "shard"),
        ({"to": ["local:a"]}, "add, set"),
        ({"force": True}, "force"),
        ({"exact": True}, "exact"),
    ],
)
def test_a_journal_of_another_job_is_refused(site, tree, run, job, differs):
    run()
    before = (site.root / "journal").read_bytes()
    with pytest.raises(errors.ConfigError, match=f"job: it differs in {differs}$") as caught:
        run(**job)
    assert "name another file" in caught.value.hint
    assert (site.root / "journal").read_bytes() == before


def test_of_another_tree_and_of_other_providers(site, tree, run, tmp_path):
    run()
    journal = site.root / "journal"
    other = shutil.copytree(tree, tmp_path / "other")
    with pytest.raises(errors.ConfigError, match="differs in tree"):
        list(keymgmt.rewrap_tree(other, resume=journal, keys=site.config()))
    config = keymgmt.Config(
        {
            "providers": {
                "local": {"backend": "file", "path": str(site.root / "keys")},
                "more": {"backend": "file", "path": str(tmp_path / "keys")},
            },
            "policy": site.policy,
        },
        path=site.root / "keymgmt.toml",
    )
    with pytest.raises(errors.ConfigError, match="differs in providers"):
        run(keys=config)


def test_the_same_tree_by_another_name(site, tree, run):
    run()
    link = site.root / "link"
    link.symlink_to(tree)
    done = keymgmt.rewrap_tree(link, resume=site.root / "journal", keys=site.config())
    assert all(item.skipped for item in done)


def test_a_line_that_a_kill_tore_is_dropped(site, tree, run):
    run()
    journal = site.root / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    assert [len(names) for _, names in sorted(run().items())] == [1, 5]
    assert len(journal.read_bytes()) == len(whole)
    journal.write_bytes(whole + b"\0" * 4096)
    assert run() == {"skipped": ALL}
    assert journal.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data.replace(b"keymgmt-journal/1", b"keymgmt-journal/2"),
        lambda data: data.replace(b'"path"', b'"paht"', 1),
        lambda data: data + b"\n",
        lambda data: data + b'{"keys": "1", "path": "a", "more": 1}\n',
        lambda data: data + b'{"key": "local:a"}\n',
        lambda data: data + b'{"keys": 1, "path": "a"}\n',
        lambda data: data + b"\0" * (1 << 16) + b"\n",
        lambda data: data + b"a" * (1 << 17),
        lambda data: data.partition(b"\n")[2],
    ],
)
def test_a_damaged_journal_is_refused(site, tree, run, damage):
    run()
    journal = site.root / "journal"
    journal.write_bytes(content := damage(journal.read_bytes()))
    with pytest.raises(errors.ConfigError) as caught:
        run()
    assert str(journal) in str(caught.value)
    assert "remove it" in caught.value.hint
    assert journal.read_bytes() == content


def test_who_else_could_write_it(site, tree, run):
    run()
    (site.root / "journal").chmod(0o666)
    with pytest.raises(errors.ConfigError, match="others can write it"):
        run()
    (site.root / "journal").unlink()
    os.mkfifo(site.root / "journal")
    with pytest.raises(errors.ConfigError, match="not a regular file"):
        run()
    with pytest.raises(errors.ConfigError, match="No such file"):
        run(resume="nowhere/journal")


def test_two_runs_with_one_journal(site, tree, run):
    models = keymgmt.rewrap_tree(tree, resume=site.root / "journal", keys=site.config())
    next(models)
    with pytest.raises(errors.ConfigError, match="another run"):
        run()
    models.close()
    assert set().union(*run().values()) == ALL


def test_a_disk_that_is_full_loses_no_model(site, tree, run, monkeypatch):
    write = os.write

    def full(descriptor, content):
        return write(descriptor, content[:10] if b'"path"' in content else content)

    monkeypatch.setattr("keymgmt._verbs.journal.os.write", full)
    assert run() == {"changed": ALL, "failed": {"journal"}}
    monkeypatch.undo()
    assert run() == {"looked at": ALL}


def test_a_name_that_is_no_text(site, tree, run):
    odd = Path(os.fsdecode(bytes(tree) + b"/\xff\xe9"))
    (tree / "m0.sealed").rename(odd)
    assert len(run()["changed"]) == 6
    with (site.root / "journal").open("ab") as file:
        file.write(b'{"keys": "1", "path": "\\ud800"}\n')
    assert len(run()["skipped"]) == 6


def test_a_job_of_many_words(site, tree, run):
    drop = [f"file:key-{number}" for number in range(8000)]
    assert run(drop=drop, shard="1/1") == {"looked at": ALL}
    assert run(drop=drop, shard="1/1") == {"skipped": ALL}
    with pytest.raises(errors.ConfigError, match="of the journal"):
        run()


def test_nothing_is_resumed_by_a_dry_run(site, tree, run):
    with pytest.raises(errors.ConfigError, match="dry run"):
        run(dry_run=True)
    assert not (site.root / "journal").exists()
