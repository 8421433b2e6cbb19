"""Signing: the model is opened first, and whoever signed before is named."""

from __future__ import annotations

import dataclasses
import logging
import shutil

import pytest
from bits import flip_in

import keymgmt
from keymgmt import errors
from keymgmt.sealed.keys import UnlockPolicy


@pytest.fixture
def planted(site):
    """A model whose recipients a stranger changed: it has a right manifest and a wrong MAC."""
    path, other = site.seal(), site.seal("local:b", target="n.sealed")
    (path / "signatures.json").unlink()
    foreign = UnlockPolicy.from_bytes((other / "keys.json").read_bytes()).groups
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    changed = dataclasses.replace(policy, groups=policy.groups + foreign)
    (path / "keys.json").write_bytes(changed.to_bytes())
    return path


def test_what_a_stranger_changed_is_not_signed(site, planted):
    with pytest.raises(errors.IntegrityError, match="MAC"):
        keymgmt.sign(planted, key="local:publisher", keys=site.config())
    assert keymgmt.inspect(planted).signers == ()


def test_what_does_not_open_here_is_signed_only_unopened(site, caplog):
    path = site.seal()
    (path / "signatures.json").unlink()
    (site.root / "keys" / "a.jwks").rename(site.root / "a.jwks")
    with pytest.raises(errors.CannotUnlock):
        keymgmt.sign(path, key="local:publisher", keys=site.config())
    with caplog.at_level(logging.INFO, "keymgmt.audit"):
        keymgmt.sign(path, key="local:publisher", unopened=True, keys=site.config())
    (event,) = [r.audit for r in caplog.records if r.audit["event"] == "signed"]
    assert event["opened"] is False
    assert len(keymgmt.inspect(path).signers) == 1
    shutil.move(site.root / "a.jwks", site.root / "keys" / "a.jwks")
    keymgmt.open(path, keys=site.config()).close()


def test_the_digests_are_checked_all_the_same(site):
    path = site.seal()
    (path / "signatures.json").unlink()
    payload = path / "payload" / "model.bin.floe"
    flip_in(payload)
    for unopened in (False, True):
        with pytest.raises(errors.IntegrityError, match="digest"):
            keymgmt.sign(path, key="local:publisher", unopened=unopened, keys=site.config())
