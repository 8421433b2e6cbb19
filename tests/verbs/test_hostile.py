"""What a hostile folder, a busy neighbour or an odd system does to the verbs."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest

import keymgmt
from keymgmt import errors
from keymgmt.sealed.canonical import dump, load


@pytest.fixture
def few_descriptors():
    """A low limit of open files, as a login shell has it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def edit_manifest(path: Path, change) -> None:
    file = path / "manifest.json"
    data = load(file.read_bytes(), "m", 1 << 24)._left
    change(data)
    file.write_bytes(dump(data))


def test_more_files_than_descriptors(site, tmp_path, few_descriptors, tree_of):
    for number in range(200):
        (site.plain / f"part-{number:03}").write_bytes(bytes([number]))
    path = site.seal()
    config = site.config()
    keymgmt.verify(path, keys=config)
    keymgmt.unseal(path, tmp_path / "plain", keys=config)
    assert tree_of(tmp_path / "plain") == tree_of(site.plain)
    with keymgmt.open(path, keys=config) as model:
        assert all(model.read(entry.path) is not None for entry in model.manifest.files)
    keymgmt.reseal(path, to=["local:b"], keys=config)
    keymgmt.verify(path, keys=config)


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
        except Exception as error:
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
