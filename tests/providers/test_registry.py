"""Backends of strangers: found, imported alone, and explained where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import run

from keymgmt import Config
from keymgmt._providers.registry import backends, load_backend, load_evidence
from keymgmt.errors import BackendNotInstalled

Install = Callable[..., Path]
GROUP = "keymgmt.backends"

ACME = """
from keymgmt.backend import Health, KeyProvider, Settings

class AcmeSettings(Settings):
    address: str
    slots: int = 1

class Acme(KeyProvider[AcmeSettings]):
    backend = "acme"
    Settings = AcmeSettings
    def wrap(self, key, dek, context): raise NotImplementedError
    def unwrap(self, wrapped, context): raise NotImplementedError
    def check(self, key=None): return Health(())
"""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    load_backend.cache_clear()
    load_evidence.cache_clear()


def test_a_backend_is_chosen_by_config_alone(install):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    config = Config({"providers": {"hsm": {"backend": "acme", "address": "x"}}})
    provider = config.provider("hsm")
    assert (provider.name, provider.backend, provider.settings.slots) == ("hsm", "acme", 1)
    assert config.provider("hsm") is provider
    (info,) = backends()["acme"]
    assert (info.distribution, info.version) == ("acme-hsm", "1.0")


def test_only_the_named_backend_is_imported(install):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    trap = "raise RuntimeError('imported')"
    install("other-hsm", GROUP, {"other": "other_hsm:Other"}, other_hsm=trap)
    assert {"acme", "other"} <= set(backends())
    load_backend("acme")
    assert "other_hsm" not in sys.modules


@pytest.mark.parametrize(
    ("source", "said", "hint"),
    [
        ("import nothing_of_that_name", "fails to import: ModuleNotFoundError", "pip install"),
        ("raise OSError('no licence')", "OSError: no licence", "pip install"),
        ("Other = 1", "fails to import: AttributeError", "pip install"),
        ("Acme = 1", "is not of class KeyProvider", "author"),
        ("class Acme: pass", "is not of class KeyProvider", "author"),
        (
            ACME.replace('backend = "acme"', 'backend = "acme"; api_version = 0'),
            "speaks version 0 of the provider API, this keymgmt speaks 1",
            "pip install --upgrade acme-hsm",
        ),
        (
            ACME.replace('backend = "acme"', 'backend = "acme"; api_version = 2'),
            "speaks version 2",
            "pip install --upgrade keymgmt",
        ),
        (ACME.replace('backend = "acme"', 'backend = "emca"'), "calls itself 'emca'", "equal"),
    ],
)
def test_a_broken_one_is_explained_and_harms_no_other(install, source, said, hint):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=source)
    good = ACME.replace('"acme"', '"good"')
    install("good-hsm", GROUP, {"good": "good_hsm:Acme"}, good_hsm=good)
    with pytest.raises(BackendNotInstalled, match="the backend 'acme' of acme-hsm") as raised:
        load_backend("acme")
    assert said in str(raised.value)
    assert hint in str(raised.value.hint)
    assert load_backend("good").backend == "good"


def test_a_name_that_two_provide_is_refused_until_one_is_named(install):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    trap = "raise RuntimeError('imported')"
    install("evil-hsm", GROUP, {"acme": "evil_hsm:Acme"}, evil_hsm=trap)
    table = {"backend": "acme", "address": "x"}
    with pytest.raises(BackendNotInstalled, match="provided twice") as raised:
        Config({"providers": {"hsm": table}}).provider("hsm")
    assert "distribution =" in str(raised.value.hint)
    pinned = Config({"providers": {"hsm": table | {"distribution": "acme-hsm"}}})
    assert pinned.provider("hsm").backend == "acme"
    assert "evil_hsm" not in sys.modules


def test_a_package_that_slipped_in_under_the_name_is_refused(install):
    trap = "raise RuntimeError('imported')"
    install("evil-hsm", GROUP, {"acme": "evil_hsm:Acme"}, evil_hsm=trap)
    with pytest.raises(BackendNotInstalled, match="comes from evil-hsm, but the config allows"):
        load_backend("acme", "acme-hsm")
    assert "evil_hsm" not in sys.modules


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nonesuch", "install the distribution that provides it"),
        ("acmee", "did you mean 'acme'?"),
        ("../", "short name"),
    ],
)
def test_a_missing_one_says_what_to_do(install, name, hint):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    with pytest.raises(BackendNotInstalled, match="is not installed") as raised:
        load_backend(name)
    assert hint in str(raised.value.hint)


@pytest.mark.parametrize("name", ["file", "vault", "pkcs11", "tpm2"])
def test_one_of_ours_that_is_missing_says_the_exact_command(name):
    if name in backends():
        pytest.skip("installed")
    with pytest.raises(BackendNotInstalled) as raised:
        load_backend(name)
    assert raised.value.hint == f'pip install "keymgmt[{name}]"'


def test_nothing_is_imported_from_the_working_directory(install, tmp_path, monkeypatch):
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    work = tmp_path / "work"
    work.mkdir()
    for trap in ("acme_hsm", "keymgmt_file", "rich", "typer", "cryptography"):
        (work / f"{trap}.py").write_text("raise SystemExit('a trap')")
    script = Path(sys.executable).with_name("keymgmt")
    command = [script, "backends", "--json"]
    done = run(*command, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "a trap" not in done.stdout + done.stderr
    assert '"acme-hsm"' in done.stdout


EVIDENCE = """
from keymgmt.backend import Evidence, Settings

class Nothing(Settings):
    pass

class Acme(Evidence[Nothing]):
    kind = "acme"
    Settings = Nothing
    def quote(self, report_data): return report_data
"""


def test_a_kind_of_evidence_is_found_as_a_backend_is(install):
    install("acme-proof", "keymgmt.evidence", {"acme": "acme_proof:Acme"}, acme_proof=EVIDENCE)
    kind = load_evidence("acme")
    assert kind(kind.Settings()).quote(b"data") == b"data"


def test_evidence_that_is_missing_or_something_else_is_explained(install):
    with pytest.raises(BackendNotInstalled, match="the evidence 'acmes' is not installed"):
        load_evidence("acmes")
    other = EVIDENCE.replace('"acme"', '"emca"')
    install("acme-other", "keymgmt.evidence", {"other": "acme_other:Acme"}, acme_other=other)
    with pytest.raises(BackendNotInstalled, match=r"the evidence 'other' .* calls itself 'emca'"):
        load_evidence("other")
    install("acme-none", "keymgmt.evidence", {"none": "acme_none:Acme"}, acme_none="Acme = 1")
    with pytest.raises(BackendNotInstalled, match="is not of class Evidence"):
        load_evidence("none")
