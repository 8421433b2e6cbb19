"""What a hostile folder, a busy neighbour or an odd system does to the verbs."""

from __future__ import annotations

import base64
import dataclasses
import os
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from programs import PEAK_KIB, run_python

import keymgmt
import keymgmt.sealed.folder
from keymgmt import errors
from keymgmt._crypto.dek import Dek
from keymgmt._system.strict_json import dump_json, load_json
from keymgmt._trust.recipients import resolve_group
from keymgmt.floe import FloeEncryptor, FloeParameters, ciphertext_length
from keymgmt.sealed.derive import commitment, file_key, payload_aad
from keymgmt.sealed.keys import Group, UnlockPolicy, wrap_group
from keymgmt.sealed.manifest import manifest_hash
from keymgmt.testing._process import in_fork


def edit_manifest(path: Path, change) -> None:
    file = path / "manifest.json"
    data = load_json(file.read_bytes(), "m", 1 << 24)._left
    change(data)
    file.write_bytes(dump_json(data))


def test_more_files_than_descriptors(site, tmp_path, within, tree_of):
    for number in range(200):
        (site.plain / f"part-{number:03}").write_bytes(bytes([number]))

    def work() -> None:
        path = site.seal()
        config = site.config()
        keymgmt.verify(path, keys=config)
        keymgmt.unseal(path, tmp_path / "plain", keys=config)
        assert tree_of(tmp_path / "plain") == tree_of(site.plain)
        with keymgmt.open(path, keys=config) as model:
            assert all(model.read(entry.path) is not None for entry in model.manifest.files)
        keymgmt.reseal(path, to=["local:b"], keys=config)
        keymgmt.verify(path, keys=config)

    within(resource.RLIMIT_NOFILE, 128, work)  # as low as in a login shell


def test_closing_while_others_read(site):
    """A read that has begun ends with the right bytes or says that the model is closed."""
    expected = (site.plain / "model.bin").read_bytes()
    path, config = site.seal(), site.config()
    odd: list[Exception | str] = []

    def read(model: keymgmt.SealedModel, begun: threading.Event) -> None:
        try:
            with model.open("model.bin") as file:
                begun.set()
                while True:
                    file.seek(0)
                    if file.read() != expected or model.read("model.bin") != expected:
                        odd.append("other bytes")
                        return
        except ValueError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            odd.append(error)

    for _ in range(20):
        model, begun = keymgmt.open(path, keys=config), threading.Event()
        threads = [threading.Thread(target=read, args=(model, begun)) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait(20)
        model.close()
        others = [os.open("/dev/zero", os.O_RDONLY) for _ in range(8)]
        for thread in threads:
            thread.join()
        for descriptor in others:
            os.close(descriptor)
    assert odd == []


def test_a_file_of_a_closed_model_is_closed(site):
    with keymgmt.open(site.seal(), keys=site.config()) as model:
        file = model.open("model.xml")
        assert file.read(3) == b"<ne"
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.read(3)


@pytest.mark.parametrize("size", [1 << 36, (1 << 53) - 1])
def test_a_size_that_the_file_does_not_have_costs_no_memory(site, size):
    path = site.seal(sign="local:publisher")
    config = site.config(require_signature=False, publishers={})
    with keymgmt.open(path, keys=config) as model:
        entry = model.manifest.files[0]
        object.__setattr__(entry, "size", size)
        with pytest.raises(errors.IntegrityError, match="bytes"):
            model.read(entry.path)


def test_more_segments_than_floe_has(site):
    path = site.seal()

    def change(data):
        data["files"][0]["size"] = (1 << 53) - 1
        data["segment_length"] = 4096

    edit_manifest(path, change)
    with pytest.raises(errors.FormatError, match="segments"):
        keymgmt.sign(path, key="local:publisher", keys=site.config())


def test_a_date_in_other_digits(site):
    path = site.seal()
    year = "\u0662\u0660\u0662\u0666"
    edit_manifest(path, lambda data: data.update(created=f"{year}-01-01T00:00:00Z"))
    with pytest.raises(errors.FormatError, match="created"):
        keymgmt.inspect(path)


@pytest.mark.parametrize("verb", ["rewrap", "sign"])
def test_a_model_that_is_exchanged_under_the_verb(site, tree_of, monkeypatch, verb):
    """What was made for the old model is not written into the new one."""
    path, config = site.seal(), site.config()
    new = {}
    original = keymgmt.sealed.folder.replace_in

    def exchange_first(*arguments):
        monkeypatch.undo()
        path.rename(site.root / "old.sealed")
        site.seal("local:b")
        new.update(tree_of(path))
        return original(*arguments)

    monkeypatch.setattr("keymgmt.sealed.folder.replace_in", exchange_first)
    more = {"add": ["local:c"]} if verb == "rewrap" else {"key": "local:stranger"}
    with pytest.raises(errors.IntegrityError, match="exchanged"):
        getattr(keymgmt, verb)(path, keys=config, **more)
    assert tree_of(path) == new


def test_reseal_through_a_link(site, tmp_path):
    """The model is replaced, not the link to it."""
    path = site.seal()
    link = tmp_path / "link.sealed"
    link.symlink_to(path)
    old = keymgmt.inspect(path).manifest.id
    before = set(tmp_path.iterdir())
    keymgmt.reseal(link, to=["local:b"], keys=site.config())
    assert link.is_symlink()
    assert keymgmt.inspect(path).manifest.id != old
    assert set(tmp_path.iterdir()) == before


def test_reseal_of_the_working_directory(site, monkeypatch):
    path = site.seal()
    old = keymgmt.inspect(path).manifest.id
    monkeypatch.chdir(path)
    keymgmt.reseal(".", to=["local:b"], keys=site.config())
    assert keymgmt.inspect(path).manifest.id != old


def test_force_on_the_working_directory(site, monkeypatch):
    path = site.seal()
    old = keymgmt.inspect(path).manifest.id
    monkeypatch.chdir(path)
    keymgmt.seal(site.plain, ".", to=["local:a"], keys=site.config(), force=True)
    assert keymgmt.inspect(path).manifest.id != old


def test_reseal_into_a_folder_that_is_not_there(site, tmp_path):
    path = site.seal()
    with pytest.raises(errors.ConfigError, match="does not exist"):
        keymgmt.reseal(path, tmp_path / "no" / "out.sealed", to=["local:b"], keys=site.config())


def test_unseal_to_a_full_disk_does_not_blame_the_model(site, tmp_path, within):
    path, config = site.seal(), site.config()

    def unseal() -> None:
        with pytest.raises(errors.KeymgmtError, match="plain: File too large") as caught:
            keymgmt.unseal(path, tmp_path / "plain", keys=config)
        assert caught.value.exit_code == 1

    within(resource.RLIMIT_FSIZE, 1 << 20, unseal)
    assert not (tmp_path / "plain").exists()


def test_unseal_below_a_file(site, tmp_path):
    with pytest.raises(errors.ConfigError, match="plain: Not a directory"):
        keymgmt.unseal(site.seal(), tmp_path / "pub.pem" / "plain", keys=site.config())


@pytest.mark.parametrize("mode", [0o640, 0o600])
def test_rewrap_keeps_who_may_read(site, mode):
    path = site.seal()
    (path / "keys.json").chmod(mode)
    before = os.umask(0o077)
    try:
        keymgmt.rewrap(path, add=["local:b"], keys=site.config())
    finally:
        os.umask(before)
    assert (path / "keys.json").stat().st_mode & 0o777 == mode


def test_a_signature_file_that_is_a_fifo(site, tmp_path):
    site.provider.create_key("dev", "hpke-x25519", {})
    file = tmp_path / "d.recipient"
    site.provider.export_recipient("dev").save(file)
    os.mkfifo(tmp_path / "d.recipient.sig")
    code = (
        "import sys, keymgmt\n"
        "from keymgmt._trust.recipients import resolve_group\n"
        "from keymgmt import Config\n"
        "try: resolve_group('@' + sys.argv[1], Config({}))\n"
        "except keymgmt.errors.KeymgmtError as error: print(type(error).__name__)\n"
    )
    done = run_python(code, file)
    assert done.stdout.strip() == "ConfigError", done.stderr


def test_a_publisher_key_that_others_can_write(site, tmp_path):
    """Who writes it chooses whom to trust, as who writes the config does."""
    path = site.seal()
    (tmp_path / "pub.pem").chmod(0o666)
    with pytest.raises(errors.ConfigError, match=r"pub\.pem.*others can write"):
        keymgmt.open(path, keys=site.config())


def test_a_remembered_release_that_is_no_number(site, tmp_path):
    memory = tmp_path / "memory"
    memory.write_bytes(b'{"format":"keymgmt-releases/1","releases":{"model":"9"},"time":null}')
    with pytest.raises(errors.ConfigError, match="damaged"):
        keymgmt.open(site.seal(), keys=site.config(remember_releases=str(memory)))


def test_force_looks_again_before_it_replaces(site, tmp_path):
    """What was a sealed model when sealing began may be somebody's folder when it ends."""
    path = site.seal()

    def progress(done, total):
        if (path / "manifest.json").exists():
            path.rename(tmp_path / "elsewhere")
            path.mkdir()
            (path / "thesis.txt").write_text("ten years")

    with pytest.raises(errors.ConfigError, match="no sealed model"):
        site.seal(force=True, progress=progress)
    assert (path / "thesis.txt").read_text() == "ten years"


def test_a_publisher_key_in_no_regular_file(site, tmp_path):
    path = site.seal()
    (tmp_path / "pub.pem").unlink()
    os.mkfifo(tmp_path / "pub.pem")
    with pytest.raises(errors.ConfigError, match="regular"):
        keymgmt.open(path, keys=site.config())


@pytest.mark.parametrize("part", [b"[],", b'{"a":0},', b'"ab",'])
@pytest.mark.parametrize(
    ("name", "start", "size", "most"),
    [
        ("keys.json", b'{"format":"keymgmt-keys/1","groups":[', 60 << 20, 65),
        ("manifest.json", b'{"files":[', 15 << 20, 50),
    ],
)
def test_many_small_parts_cost_little_memory(site, name, start, size, most, part):
    good, path = site.seal(target="good.sealed"), site.seal()
    (path / name).write_bytes((start + part * (size // len(part)))[:-1] + b"]}")
    code = (
        "import sys, keymgmt\n"
        "from keymgmt.errors import FormatError\n"
        "keymgmt.inspect(sys.argv[1])\n"
        "before = peak_kib()\n"
        "try: keymgmt.inspect(sys.argv[2])\n"
        "except FormatError: print(peak_kib() - before)\n"
    )
    done = run_python(PEAK_KIB + code, good, path, timeout=200)
    assert int(done.stdout) < most << 10, done.stderr


@pytest.mark.parametrize(("count", "blob"), [(16384, 2800), (440_000, 3)], ids=["good", "many"])
def test_a_policy_of_64_mib_costs_two_bytes_for_each_of_its_own(tmp_path, count, blob):
    """Until its MAC is known to be wrong: parsed, and serialised again for the MAC."""
    recipient = {"backend": "file", "key": "a", "mechanism": "m", "params": {}, "version": "1"}
    recipient["blob"] = base64.b64encode(bytes(blob)).decode()
    group = dump_json({"nonce": "00" * 16, "recipients": [recipient]})
    empty = {"format": "keymgmt-keys/1", "groups": [], "mac": "00" * 48, "manifest": "00" * 48}
    data = dump_json(empty).replace(b"[]", b"[" + b",".join([group] * count) + b"]")
    assert 60 << 20 < len(data) <= 64 << 20
    (tmp_path / "keys.json").write_bytes(data)
    code = (
        "import sys, keymgmt\n"
        "from keymgmt._crypto.dek import Dek\n"
        "from keymgmt.errors import FormatError, IntegrityError\n"
        "from keymgmt.sealed.folder import SealedFolder\n"
        "from keymgmt.sealed.keys import MAX_KEYS, UnlockPolicy\n"
        "before = peak_kib()\n"
        "try:\n"
        "    data = SealedFolder(sys.argv[1]).read('keys.json', MAX_KEYS)\n"
        "    UnlockPolicy.from_bytes(data).check_mac(Dek(bytes(32)), bytes(16))\n"
        "except (FormatError, IntegrityError) as error: print(type(error).__name__)\n"
        "print(peak_kib() - before)\n"
    )
    done = run_python(PEAK_KIB + code, tmp_path, timeout=200, check=True)
    error, cost = done.stdout.split()
    assert error == ("IntegrityError" if blob > 3 else "FormatError")
    assert int(cost) << 10 < 2 * len(data)


def test_a_payload_of_holes_costs_no_memory_of_its_size(site):
    """Unsigned, from who may wrap to the reader's public key: all but the header is a hole."""
    config = site.config(publishers={}, require_signature=False)
    path, size, dek = site.seal(sign=None, keys=config), 1 << 29, Dek.generate()
    old = keymgmt.inspect(path).manifest
    entries = [dataclasses.replace(old.files[0], size=size)]
    manifest = dataclasses.replace(
        old, commitment=commitment(dek, old.id), files=tuple(entries), main=None
    )
    data = manifest.to_bytes()
    groups = [wrap_group(dek, manifest_hash(data), resolve_group("local:a", config))]
    policy = UnlockPolicy.make(dek, manifest, manifest_hash(data), groups)
    (path / "manifest.json").write_bytes(data)
    (path / "keys.json").write_bytes(policy.to_bytes())
    shutil.rmtree(path / "payload")
    (path / "payload").mkdir()
    name = entries[0].path
    key, aad = file_key(dek, manifest.id, name), payload_aad(manifest.id, name)
    with (path / "payload" / f"{name}.floe").open("wb") as file:
        file.write(FloeEncryptor(key, aad, FloeParameters(manifest.segment_length)).header)
        file.truncate(ciphertext_length(size, manifest.segment_length))
    (site.root / "unsigned.toml").write_text(
        f'[providers.local]\nbackend = "file"\npath = "{site.root / "keys"}"\n'
        "[policy]\nrequire_signature = false\n"
    )
    code = (
        "import sys, keymgmt\n"
        "from keymgmt.errors import IntegrityError\n"
        "with keymgmt.open(sys.argv[1], keys=sys.argv[2]) as model:\n"
        "    before = peak_kib()\n"
        "    try: model.read(sys.argv[3])\n"
        "    except IntegrityError: print(peak_kib() - before)\n"
    )
    done = run_python(PEAK_KIB + code, path, site.root / "unsigned.toml", name, timeout=200)
    assert int(done.stdout) < 32 << 10, done.stderr


def test_a_copied_blob_does_not_stand_before_the_real_one(site):
    """A recipient of another name with the same blob says nothing of the one that opens."""
    path, config = site.seal(), site.config()
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    real = policy.groups[0].recipients[0]
    for fake in (dataclasses.replace(real, key="other"), dataclasses.replace(real, version="9")):
        groups = (Group(bytes(16), (fake,)), *policy.groups)
        (path / "keys.json").write_bytes(dataclasses.replace(policy, groups=groups).to_bytes())
        with pytest.raises(errors.IntegrityError, match="MAC"):
            keymgmt.open(path, keys=config)


def test_a_tree_that_is_nested_deeper_than_a_path_may_be_long(site, tmp_path, monkeypatch):
    """The models beside it are found, and the folder that cannot be reached is told."""
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    site.seal(target="tree/m.sealed")
    monkeypatch.chdir(tree)
    for _ in range(2500):
        Path("a").mkdir(exist_ok=True)
        os.chdir("a")
    monkeypatch.chdir(tmp_path)
    try:
        done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    finally:
        subprocess.run(["rm", "-rf", str(tree)], check=True)
    assert [item.path for item in done if isinstance(item, keymgmt.Rewrapped)] == [
        str(tree / "m.sealed")
    ]
    (failure,) = (item for item in done if isinstance(item, keymgmt.Failure))
    assert "File name too long" in str(failure.error)


@pytest.mark.parametrize("held", ["config", "cache", "model", "file", "file, leaves"])
def test_a_fork_while_another_thread_holds_a_lock(site, held):
    """The child goes on with what its parent had: nobody there would ever let go of the lock."""
    path = site.seal()
    expected = (site.plain / "model.xml").read_bytes()
    data = {
        "providers": {"local": {"backend": "file", "path": str(site.root / "keys")}},
        "policy": site.policy,
        "cache": {"seconds": 60, "uses": 100},
    }
    config = keymgmt.Config(data, path=site.root / "keymgmt.toml")
    with config, keymgmt.open(path, keys=config) as model, model.open("model.xml") as file:
        locks = {
            "config": config._lock,
            "cache": config.cache._lock,
            "model": model._lock,
            "file": file._lock,
            "file, leaves": file._reader._checked_leaves.lock,
        }
        taken, done = threading.Event(), threading.Event()

        def hold():
            with locks[held]:
                taken.set()
                done.wait(60)

        def work() -> str:
            file.seek(0)
            assert file.read() == expected
            assert model.read("model.xml") == expected
            with keymgmt.open(path, keys=config) as again:
                assert again.read("model.xml") == expected
            model.close()
            config.close()
            return "right"

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert taken.wait(60)
            assert in_fork(work, 20) == "right"
        finally:
            done.set()
            thread.join()
        assert work() == "right"
