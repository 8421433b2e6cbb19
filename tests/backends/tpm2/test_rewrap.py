"""The way out after a firmware update or a cleared TPM: a new key version, and ``rewrap``."""

from __future__ import annotations

import pytest

import keymgmt
from keymgmt import Config, rewrap, seal
from keymgmt.errors import CannotUnlock


@pytest.fixture
def desk(settings, tmp_path):
    """A config with this TPM and a second way in, and a model that is sealed to both."""

    def config(srk_name=settings.srk_name, keys=settings.keys):
        providers = {
            "tpm": {
                "backend": "tpm2",
                "keys": str(keys),
                "tcti": settings.tcti,
                "srk_name": srk_name,
                "timeout": 5.0,
            },
            "safe": {"backend": "file", "path": str(tmp_path / "safe")},
        }
        policy = {"require_signature": False}
        return Config({"providers": providers, "policy": policy}, path=tmp_path / "keymgmt.toml")

    model, sealed = tmp_path / "model.onnx", tmp_path / "model.sealed"
    model.write_bytes(b"a model")
    with config() as keys:
        keys.provider("tpm").create_key("dev", "ecc-p256", {"pcr": "16"})
        keys.provider("safe").create_key("breakglass", "aes256", {})
        seal(model, sealed, to=["tpm:dev", "safe:breakglass"], keys=keys)
    return config, sealed


def change_pcr(keys) -> None:
    from tpm2_pytss import constants as c

    pcr = c.ESYS_TR.parse("pcr16")
    provider = keys.provider("tpm")
    provider.service.run("moving", lambda tpm: tpm.call("pcr_event", pcr, b"an update"))


def states(result) -> list[str]:
    return [group.state for group in result.groups]


def opened_by(keys, sealed) -> tuple[str, ...]:
    with keymgmt.open(sealed, keys=keys) as model:
        return model.opened_by


def test_after_a_pcr_change(desk):
    config, sealed = desk
    with config() as keys:
        change_pcr(keys)
        # No newer version yet: it says what it could not, and changes nothing.
        result = rewrap(sealed, keys=keys)
        assert (states(result), result.changed, result.exit_code) == (
            ["denied", "current"],
            False,
            5,
        )
        assert "PCR 16" in str(result.groups[0].error)
        keys.provider("tpm").rotate_key("dev")
        result = rewrap(sealed, keys=keys)
        assert (states(result), result.exit_code) == (["moved", "current"], 0)
        assert result.groups[0].tested
        assert opened_by(keys, sealed) == ("tpm",)
        assert states(rewrap(sealed, keys=keys)) == ["current", "current"]


def test_after_a_cleared_tpm(desk):
    from keymgmt_tpm2._setup import set_up
    from tpm2_pytss import constants as c

    config, sealed = desk
    with config() as keys:
        tpm = keys.provider("tpm")
        tpm.service.run("clearing", lambda tpm: tpm.call("clear", c.ESYS_TR.LOCKOUT))
        result = rewrap(sealed, keys=keys)
        assert (states(result), result.exit_code) == (["unreachable", "current"], 6)
        name = set_up(tpm, create=True).name
    with config(name) as keys:
        # The model is not to blame for a TPM that was cleared.
        result = rewrap(sealed, keys=keys)
        assert (states(result), result.exit_code) == (["unreachable", "current"], 6)
        keys.provider("tpm").rotate_key("dev")
        assert states(rewrap(sealed, keys=keys)) == ["moved", "current"]
        assert opened_by(keys, sealed) == ("tpm",)


def test_another_devices_group_is_left_alone(desk, make_swtpm, set_up, tmp_path):
    """One key name on every device of a fleet: the public key says whose a group is."""
    config, sealed = desk
    theirs = set_up(make_swtpm("two"), keys=tmp_path / "keys-two")
    with config() as keys:
        change_pcr(keys)
        keys.provider("tpm").rotate_key("dev")
        before = (sealed / "keys.json").read_bytes()
    from keymgmt_tpm2 import Tpm2Provider

    with Tpm2Provider("tpm", theirs) as other:
        other.create_key("dev", "ecc-p256", {})
        other.rotate_key("dev")
    changed = {"srk_name": theirs.srk_name, "keys": theirs.keys}
    with config(**changed) as keys:
        result = rewrap(sealed, keys=keys)
        assert (states(result), result.changed) == (["foreign", "current"], False)
    assert (sealed / "keys.json").read_bytes() == before


def test_without_a_second_way_in_nothing_moves(desk, tmp_path):
    config, sealed = desk
    with config() as keys:
        rewrap(sealed, drop=["file:breakglass"], keys=keys)
        change_pcr(keys)
        keys.provider("tpm").rotate_key("dev")
        with pytest.raises(CannotUnlock, match="no recipient") as caught:
            rewrap(sealed, keys=keys)
        assert caught.value.exit_code == 5
