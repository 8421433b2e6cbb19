"""What is tested is what was installed: the wheels, and no more of ours than was asked for.

tox says what it installed in ``KEYMGMT_TEST_EXTRAS``; at a desk, in an editable tree, these are
skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import pkgutil
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

extras = os.environ.get("KEYMGMT_TEST_EXTRAS")
pytestmark = pytest.mark.skipif(extras is None, reason="not run by tox")

DISTRIBUTIONS = {
    "aws": {"keymgmt-aws"},
    "broker": {"keymgmt-broker"},
    "service": {"keymgmt-broker", "keymgmt-broker-service", "keymgmt-tpm2"},
    "file": {"keymgmt-file"},
    "vault": {"keymgmt-vault"},
    "vault-dev": {"keymgmt-vault", "keymgmt-vault-dev"},
    "pkcs11": {"keymgmt-pkcs11"},
    "tpm2": {"keymgmt-tpm2"},
    "onnxruntime": {"keymgmt-onnxruntime"},
    "openvino": {"keymgmt-openvino"},
    "safetensors": {"keymgmt-safetensors"},
    "tokenizers": {"keymgmt-tokenizers"},
    "demo": {"keymgmt-file", "keymgmt-openvino", "keymgmt-openvino-demo"},
    "all": {
        f"keymgmt-{name}"
        for name in ("aws", "broker", "file", "openvino", "pkcs11", "tpm2", "vault")
    },
}


def test_every_module_of_ours_comes_from_site_packages() -> None:
    site = Path(sysconfig.get_path("purelib"))
    packages = [
        module.name
        for module in pkgutil.iter_modules()
        if module.name == "keymgmt" or module.name.startswith("keymgmt_")
    ]
    assert "keymgmt" in packages
    for package in packages:
        spec = PathFinder.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).is_relative_to(site), spec.origin
        assert (Path(spec.origin).parent / "py.typed").is_file()


def test_nothing_more_of_ours_is_installed_than_was_asked_for() -> None:
    names = {each.name for each in importlib.metadata.distributions()}
    ours = {name for name in names if name == "keymgmt" or name.startswith("keymgmt-")}
    wanted: set[str] = set().union(
        *(DISTRIBUTIONS.get(extra, set()) for extra in extras.split(","))
    )
    assert ours == {"keymgmt"} | wanted
