from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_python

import keymgmt
from keymgmt import errors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(site, tree_of):
    path = site.seal(name="resnet50", release=7, metadata={"license": "Apache-2.0"})
    with keymgmt.open(path, keys=site.config(), name="resnet50") as model:
        assert model.manifest.release == 7
        assert model.manifest.metadata == {"license": "Apache-2.0"}
        assert model.publisher == "pub.pem"
        for name, content in tree_of(site.plain).items():
            assert model.read(name) == content
        buffer = bytearray(model.manifest.file("model.bin").size)
        model.read_into("model.bin", buffer)
        assert buffer == (site.plain / "model.bin").read_bytes()
        with model.open("model.bin") as file:
            file.seek(1_500_000)
            assert file.read(10) == (site.plain / "model.bin").read_bytes()[1_500_000:1_500_010]


def test_nothing_plain_is_in_the_sealed_folder(site, tree_of):
    path = site.seal()
    everything = b"".join(tree_of(path).values())
    assert b"<net/>" not in everything
    assert bytes(range(64)) not in everything


def test_a_file_is_hashed_once_for_however_many_opens(site):
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    content = os.urandom(20 << 20)
    (site.plain / "model.bin").write_bytes(content)
    with keymgmt.open(site.seal(), keys=site.config()) as model:
        for place in (0, 5 << 20, 19 << 20):
            before = bytes_read()
            with model.open("model.bin") as file:
                file.seek(place)
                assert file.read(10) == content[place : place + 10]
            assert (bytes_read() - before > 20 << 20) == (place == 0)


def test_what_changed_after_it_was_hashed_is_refused(site):
    path = site.seal()
    with keymgmt.open(path, keys=site.config()) as model:
        with model.open("model.bin") as file:
            assert file.read(1)
        payload = max((path / "payload").iterdir(), key=lambda each: each.stat().st_size)
        genuine = payload.read_bytes()
        payload.write_bytes(genuine[:-1] + bytes([genuine[-1] ^ 1]))
        with model.open("model.bin") as file, pytest.raises(errors.IntegrityError):
            file.read()


def test_a_closed_model_reads_nothing(site):
    model = keymgmt.open(site.seal(), keys=site.config())
    model.close()
    model.close()
    with pytest.raises(ValueError, match=r"wiped|closed"):
        model.read("model.bin")


def test_a_buffer_of_another_length_is_refused(site):
    with (
        keymgmt.open(site.seal(), keys=site.config()) as model,
        pytest.raises(ValueError, match=r"\d"),
    ):
        model.read_into("model.xml", bytearray(3))


@pytest.mark.parametrize("suffix", ["xml", "onnx"])
def test_one_file_models(site, suffix):
    site.plain.joinpath("net.xml").write_bytes(b"<x/>")
    site.plain.joinpath("net.bin").write_bytes(b"w")
    site.plain.joinpath("net.onnx").write_bytes(b"o")
    path = site.root / "one.sealed"
    keymgmt.seal(site.plain / f"net.{suffix}", path, to=["local:a"], keys=site.config())
    manifest = keymgmt.inspect(path).manifest
    assert manifest.main == f"net.{suffix}"
    assert manifest.kind == ("onnx" if suffix == "onnx" else "openvino-ir")
    assert [entry.path for entry in manifest.files] == (
        ["net.onnx"] if suffix == "onnx" else ["net.bin", "net.xml"]
    )


def test_an_xml_without_its_weights(site):
    (site.plain / "alone.xml").write_bytes(b"<x/>")
    with pytest.raises(errors.ConfigError, match=r"alone\.bin is not beside it"):
        keymgmt.seal(site.plain / "alone.xml", site.root / "x", to=["local:a"], keys=site.config())


def test_an_output_that_exists_is_kept(site, tree_of):
    path = site.seal(name="first")
    before = tree_of(path)
    with pytest.raises(errors.ConfigError, match="exists") as caught:
        site.seal(name="second")
    assert "--force" in caught.value.hint
    assert tree_of(path) == before
    site.seal(name="second", force=True)
    assert keymgmt.inspect(path).manifest.name == "second"
    assert not [name for name in names(site.root) if name.endswith(".tmp")]


def test_force_replaces_only_sealed_models(site):
    precious = site.root / "m.sealed"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(errors.ConfigError, match="no sealed model"):
        site.seal(force=True)
    assert (precious / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"to": ["local:missing"]}, errors.KeyNotFound, "missing"),
        ({"to": ["elsewhere:a"]}, errors.ConfigError, "elsewhere"),
        ({"to": ["local:a+local:a"]}, errors.ConfigError, "twice"),
        ({"to": ["local:a", "local:a"]}, errors.ConfigError, "twice"),
        ({"to": ["local:../a"]}, errors.ConfigError, "not a key name"),
        ({"to": ["local:a@1"]}, errors.ConfigError, "newest"),
        ({"to": ["local:publisher"]}, errors.ProviderError, "publisher"),
        ({"to": ["local:a"], "sign": "local:a"}, errors.ProviderError, "a"),
        ({"to": ["local:a"], "sign": "local:nobody"}, errors.KeyNotFound, "nobody"),
        ({"to": ["local:a"], "name": "No Name"}, errors.ConfigError, "model name"),
        ({"to": ["local:a"], "release": -1}, errors.ConfigError, "release"),
        ({"to": ["local:a"], "release": 1 << 53}, errors.ConfigError, "integer|range|2\\^53"),
        ({"to": ["local:a"], "profile": "fast"}, errors.ConfigError, "fast"),
        ({"to": ["local:a"], "metadata": {"x": "y" * 5000}}, errors.ConfigError, "metadata"),
    ],
)
def test_bad_arguments_leave_nothing_behind(site, options, error, says):
    before = names(site.root)
    with pytest.raises(error, match=says):
        keymgmt.seal(site.plain, site.root / "m.sealed", keys=site.config(), **options)
    assert names(site.root) == before


def test_no_recipient_at_all(site):
    with pytest.raises(errors.ConfigError, match="no recipient"):
        keymgmt.seal(site.plain, site.root / "x", keys=site.config())


def test_links_are_not_sealed(site):
    (site.plain / "link").symlink_to("model.bin")
    with pytest.raises(errors.ConfigError, match="symbolic link"):
        site.seal()


def test_an_interrupted_seal_leaves_nothing(site):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = names(site.root)
    with pytest.raises(KeyboardInterrupt):
        site.seal(progress=stop)
    assert names(site.root) == before


def test_progress_reaches_the_total(site):
    seen: list[tuple[int, int]] = []
    site.seal(progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in site.plain.iterdir() if file.is_file())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_inspect_needs_no_key_and_proves_nothing(site):
    path = site.seal("local:a+local:b", "local:c")
    found = keymgmt.inspect(path)
    assert found.groups == (("file:a@1", "file:b@1"), ("file:c@1",))
    assert found.to_json()["verified"] is False
    json.dumps(found.to_json())


def test_verify_says_what_it_proved(site):
    path = site.seal()
    full = {f.name: f.status for f in keymgmt.verify(path, keys=site.config()).findings}
    assert set(full.values()) == {"ok"}
    unsigned = site.config(publishers={}, require_signature=False)
    part = {f.name: f.status for f in keymgmt.verify(path, keys=unsigned).findings}
    assert part == {
        "signature": "skipped",
        "digests": "skipped",
        "data key": "ok",
        "segments": "ok",
    }


def test_verify_of_the_signature_alone_asks_no_provider(site):
    path = site.seal()
    (site.root / "keys").rename(site.root / "gone")
    found = keymgmt.verify(path, keys=site.config(), signature_only=True)
    assert {f.name: f.status for f in found.findings} == {
        "signature": "ok",
        "digests": "ok",
        "data key": "skipped",
        "segments": "skipped",
    }


def test_unseal_writes_private_files(site, tree_of):
    path, out = site.seal(), site.root / "out"
    keymgmt.unseal(path, out, keys=site.config())
    assert tree_of(out) == tree_of(site.plain)
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / "model.bin").stat().st_mode & 0o777 == 0o600
    with pytest.raises(errors.ConfigError, match="exists"):
        keymgmt.unseal(path, out, keys=site.config())


@pytest.mark.parametrize("inside", ["plain", "payload/plain", "../link/plain"])
def test_unseal_into_the_sealed_model_itself_is_refused(site, tree_of, inside):
    """Whoever ships the folder would ship the plain files with it."""
    path = site.seal()
    (path.parent / "link").symlink_to(path)
    before = tree_of(path)
    with pytest.raises(errors.ConfigError, match="inside of"):
        keymgmt.unseal(path, path / inside, keys=site.config())
    assert tree_of(path) == before


def test_unseal_of_a_damaged_model_leaves_nothing(site):
    path = site.seal()
    payload = path / "payload" / "model.xml.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(errors.IntegrityError):
        keymgmt.unseal(path, site.root / "out", keys=site.config())
    assert not [name for name in names(site.root) if "out" in name]


@pytest.mark.parametrize(
    ("name", "error"), [("missing", errors.ConfigError), ("file", errors.FormatError)]
)
def test_what_is_no_sealed_model(site, name, error):
    (site.root / "file").write_text("x")
    with pytest.raises(error):
        keymgmt.open(site.root / name, keys=site.config())


def test_a_model_of_a_newer_format(site):
    path = site.seal()
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["format"] = "keymgmt-sealed/99"
    (path / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))
    with pytest.raises(errors.FormatError, match="keymgmt-sealed/99") as caught:
        keymgmt.inspect(path)
    assert "upgrade" in caught.value.hint


def test_audit_events_name_no_secret(site, caplog):
    caplog.set_level(logging.INFO, "keymgmt.audit")
    path = site.seal()
    keymgmt.open(path, keys=site.config()).close()
    events = [record.audit["event"] for record in caplog.records]
    assert {"wrap", "sign", "seal", "unwrap", "load"} <= set(events)
    loads = [record.audit for record in caplog.records if record.audit["event"] == "load"]
    assert loads[-1]["name"] == "model"
    assert loads[-1]["outcome"] == "ok"


def test_a_refused_open_is_in_the_audit(site, caplog):
    caplog.set_level(logging.INFO, "keymgmt.audit")
    path = site.seal("local:a")
    (site.root / "keys").rename(site.root / "gone")
    (site.root / "keys").mkdir(mode=0o700)
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=site.config())
    assert caplog.records[-1].audit["event"] == "load"
    assert caplog.records[-1].audit["outcome"] == "CannotUnlock"


@pytest.mark.once
def test_killed_seals_leave_nothing_or_a_whole_model(site, tmp_path):
    """SIGKILL at many points; the next seal sweeps up what was left."""
    script = tmp_path / "seal.py"
    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f'[providers.local]\nbackend = "file"\npath = "{site.root}/keys"\n'
        "[policy]\nrequire_signature = false\n"
    )
    script.write_text(
        "import os, signal, sys, keymgmt\n"
        "calls = int(sys.argv[1])\n"
        "real = os.fsync\n"
        "def fsync(fd):\n"
        "    global calls\n"
        "    calls -= 1\n"
        "    if calls < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(fd)\n"
        "os.fsync = fsync\n"
        f"keymgmt.seal({str(site.plain)!r}, {str(tmp_path / 'k.sealed')!r}, to=['local:a'], "
        f"keys={str(config)!r}, force=True)\n"
    )
    outcomes = []
    for calls in range(0, 20, 3):
        done = subprocess.run(
            [sys.executable, script, str(calls)], capture_output=True, check=False
        )
        target = Path(tmp_path / "k.sealed")
        if target.exists():
            with keymgmt.open(target, keys=config) as model:
                assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
        outcomes.append(done.returncode)
    assert -9 in outcomes
    assert subprocess.run([sys.executable, script, "1000"], check=False).returncode == 0
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_failed_events_stay_off_stderr_unless_somebody_listens(site):
    code = (
        "import keymgmt, keymgmt.errors\n"
        "config = keymgmt.Config({'policy': {'require_signature': False}})\n"
        "try: keymgmt.open('m.sealed', keys=config)\n"
        "except keymgmt.errors.CannotUnlock: print('refused')\n"
    )
    site.seal()
    done = run_python(code, cwd=site.root, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
