"""What mypy must say of the public names; never run. ``tox -e types`` reads it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, assert_type

import keymgmt
from keymgmt.backend import Dek, KeyProvider, Settings, WrappedKey


def verbs(config: keymgmt.Config) -> None:
    assert_type(keymgmt.load_config("keymgmt.toml"), keymgmt.Config)
    assert_type(keymgmt.seal("m.xml", Path("m.sealed"), to=["a:b"]), keymgmt.Inspection)
    assert_type(keymgmt.inspect("m.sealed"), keymgmt.Inspection)
    assert_type(keymgmt.verify("m.sealed", keys=config), keymgmt.Verification)
    assert_type(keymgmt.rewrap("m.sealed", add=["a:b"], keys="k.toml"), keymgmt.Rewrapped)
    assert_type(keymgmt.usage("models"), keymgmt.Usage)
    assert_type(keymgmt.push("m.sealed", "oci://r.example/m:1", keys=config), keymgmt.Pushed)
    assert_type(keymgmt.pull("oci://r.example/m:1", Path("m.sealed")), keymgmt.Pulled)
    with keymgmt.open("m.sealed", name="m") as model:
        assert_type(model, keymgmt.SealedModel)
        assert_type(model.manifest, keymgmt.Manifest)
        assert_type(model.read("a"), bytearray)
        assert_type(model.open("a"), io.RawIOBase)
        model.read_into("a", memoryview(bytearray(4)))
    keymgmt.seal("m.xml", "m.sealed", to=["a:b"], releases=1)  # type: ignore[call-arg]


class AcmeSettings(Settings):
    address: str


def backend(provider: KeyProvider[AcmeSettings], dek: Dek) -> None:
    assert_type(provider.settings, AcmeSettings)
    wrapped = provider.wrap("key", dek, b"context")
    assert_type(wrapped, WrappedKey)
    assert_type(provider.unwrap(wrapped, b"context"), Dek)
    unwritten: Any = wrapped
    wrapped.key = unwritten  # type: ignore[misc]
