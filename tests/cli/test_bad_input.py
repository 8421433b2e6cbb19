"""What is wrong is named, with the way out and the exit code of whose fault it is.

Nothing is changed by it, no traceback is shown, and no secret.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bits import flip_in

Cli = Callable[..., Any]
pytest.importorskip("keymgmt_file")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def no_config(site: Path) -> tuple[object, ...]:
    (site / "keymgmt.toml").unlink()
    return ("keys", "list")


def config_that_is_not_there(site: Path) -> tuple[object, ...]:
    return ("--config", "nothere.toml", "keys", "list")


def config_that_is_a_folder(site: Path) -> tuple[object, ...]:
    return ("--config", "model", "keys", "list")


def config_that_is_not_toml(site: Path) -> tuple[object, ...]:
    (site / "keymgmt.toml").write_text("providers = [")
    return ("keys", "list")


def config_that_others_write(site: Path) -> tuple[object, ...]:
    (site / "keymgmt.toml").chmod(0o666)
    return ("keys", "list")


def config_with_an_unknown_key(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", "publishers", "publisher")
    return ("keys", "list")


def config_with_an_unknown_table(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", "[seal]", "[sealing]")
    return ("keys", "list")


def settings_with_an_unknown_key(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", "path =", "paht =")
    return ("keys", "list")


def settings_of_a_wrong_type(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", 'path = "keys"', "path = 3")
    return ("keys", "list")


def an_unknown_provider(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--to", "locl:models")


def an_unknown_backend(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", 'backend = "file"', 'backend = "fiel"')
    return ("seal", "model", "out.sealed")


def a_backend_that_is_not_installed(site: Path) -> tuple[object, ...]:
    edit(site / "keymgmt.toml", 'backend = "file"\npath = "keys"', 'backend = "nonesuch"')
    return ("seal", "model", "out.sealed")


def an_unknown_key(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--to", "local:modles")


def a_key_of_another_purpose(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--to", "local:publisher")


def a_hostile_key_name(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--to", "local:../../etc/passwd")


def a_group_that_names_a_key_twice(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--to", "local:models+local:models")


def a_keystore_that_others_read(site: Path) -> tuple[object, ...]:
    (site / "keys").chmod(0o755)
    return ("seal", "model", "out.sealed")


def a_key_file_that_others_read(site: Path) -> tuple[object, ...]:
    (site / "keys" / "models.jwks").chmod(0o644)
    return ("seal", "model", "out.sealed")


def a_model_that_is_not_there(site: Path) -> tuple[object, ...]:
    return ("seal", "nothere.xml", "out.sealed")


def a_model_of_no_kind_that_we_know(site: Path) -> tuple[object, ...]:
    (site / "model.bin").write_bytes(b"x")
    return ("seal", "model.bin", "out.sealed")


def a_model_that_is_a_fifo(site: Path) -> tuple[object, ...]:
    os.mkfifo(site / "model.onnx")
    return ("seal", "model.onnx", "out.sealed")


def a_file_name_that_is_not_utf8(site: Path) -> tuple[object, ...]:
    os.close(os.open(os.fsencode(site) + b"/model/\xff.bin", os.O_CREAT, 0o600))
    return ("seal", "model", "out.sealed")


def a_config_where_there_is_a_file(site: Path) -> tuple[object, ...]:
    return ("init", "publisher.pem/here")


def an_xml_without_its_bin(site: Path) -> tuple[object, ...]:
    (site / "net.xml").write_text("<net/>")
    return ("seal", "net.xml", "out.sealed")


def an_output_that_exists(site: Path) -> tuple[object, ...]:
    (site / "out.sealed").mkdir()
    return ("seal", "model", "out.sealed")


def an_output_whose_folder_is_missing(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "nowhere/out.sealed")


def a_bad_model_name(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--name", "../x")


def an_unknown_profile(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--profile", "fast")


def forcing_over_what_is_no_model(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "model", "--force")


def a_publisher_key_that_is_not_there(site: Path) -> tuple[object, ...]:
    return ("seal", "model", "out.sealed", "--sign", "local:publishr")


def a_tree_without_models(site: Path) -> tuple[object, ...]:
    return ("rewrap", "keys")


@pytest.mark.parametrize(
    ("make", "code", "said", "hint"),
    [
        (no_config, 3, "there is no config", "keymgmt init"),
        (config_that_is_not_there, 3, "nothere.toml", "keymgmt init"),
        (config_that_is_a_folder, 3, "model", ""),
        (config_that_is_not_toml, 3, "is not TOML", ""),
        (config_that_others_write, 3, "others can write it", "chmod go-w"),
        (config_with_an_unknown_key, 3, "keymgmt.toml: [policy] publisher", "'publishers'"),
        (config_with_an_unknown_table, 3, "keymgmt.toml: sealing", "'seal'"),
        (settings_with_an_unknown_key, 3, "keymgmt.toml: [providers.local] ", "'path'"),
        (settings_of_a_wrong_type, 3, "keymgmt.toml: [providers.local] path", ""),
        (an_unknown_provider, 3, "no provider named 'locl'", "did you mean 'local'?"),
        (an_unknown_backend, 3, "'fiel' is not installed", "did you mean 'file'?"),
        (a_backend_that_is_not_installed, 3, "'nonesuch' is not installed", "install"),
        (an_unknown_key, 3, "modles", "local:models"),
        (a_key_of_another_purpose, 1, "does not wrap", "one purpose"),
        (a_hostile_key_name, 3, "not a key name", "lower-case"),
        (a_group_that_names_a_key_twice, 3, "twice", "once"),
        (a_keystore_that_others_read, 5, "keys", "chmod"),
        (a_key_file_that_others_read, 5, "models.jwks", "chmod"),
        (a_model_that_is_not_there, 3, "nothere.xml", ""),
        (a_model_of_no_kind_that_we_know, 3, "model.bin", ""),
        (a_model_that_is_a_fifo, 3, "neither a regular file", ""),
        (a_file_name_that_is_not_utf8, 3, "not UTF-8", "rename"),
        (a_config_where_there_is_a_file, 3, "cannot make the folder", ""),
        (an_xml_without_its_bin, 3, "net.bin", ""),
        (an_output_that_exists, 3, "out.sealed exists", "--force"),
        (an_output_whose_folder_is_missing, 3, "nowhere", ""),
        (a_bad_model_name, 3, "../x", ""),
        (an_unknown_profile, 3, "'fast'", "fips"),
        (forcing_over_what_is_no_model, 3, "no sealed model", ""),
        (a_publisher_key_that_is_not_there, 3, "publishr", "local:publisher"),
        (a_tree_without_models, 3, "no sealed model", ""),
    ],
)
def test_it_is_named_with_the_way_out_and_changes_nothing(cli, site, make, code, said, hint):
    arguments = make(site)
    before = snapshot(site)
    ran = cli(*arguments)
    assert ran.code == code, ran.err
    assert said in ran.error
    assert hint in ran.hint
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert snapshot(site) == before


def test_a_hint_names_what_the_command_has(cli, site, sealed):
    (site / "out.sealed").mkdir()
    assert cli("reseal", sealed, "out.sealed").hint == "name another folder"
    edit(site / "keymgmt.toml", "sign =", "# sign =")
    assert cli("sign", sealed).hint == "name it: keymgmt sign MODEL PROVIDER:KEY"
    assert cli("sign", sealed, "local:publisher").code == 0


def flipped_payload(sealed: Path) -> None:
    flip_in(sealed / "payload" / "weights.bin.floe")


def truncated_payload(sealed: Path) -> None:
    os.truncate(sealed / "payload" / "weights.bin.floe", 1000)


def missing_payload(sealed: Path) -> None:
    (sealed / "payload" / "notes.txt.floe").unlink()


def missing_manifest(sealed: Path) -> None:
    (sealed / "manifest.json").unlink()


def changed_manifest(sealed: Path) -> None:
    edit(sealed / "manifest.json", '"release":3', '"release":4')


def newer_format(sealed: Path) -> None:
    found = json.loads((sealed / "manifest.json").read_text())["format"]
    edit(sealed / "manifest.json", found, "keymgmt-sealed/99")


def stripped_signature(sealed: Path) -> None:
    found = json.loads((sealed / "signatures.json").read_text())
    found["signatures"] = []
    (sealed / "signatures.json").write_text(
        json.dumps(found, separators=(",", ":"), sort_keys=True)
    )


def changed_policy(sealed: Path) -> None:
    found = json.loads((sealed / "keys.json").read_text())
    text = json.dumps(found, separators=(",", ":"), sort_keys=True)
    assert text == (sealed / "keys.json").read_text()
    edit(sealed / "keys.json", f'"mac":"{found["mac"][:4]}', '"mac":"0000')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped_payload, "weights.bin"),
        (truncated_payload, "weights.bin"),
        (missing_payload, "notes.txt"),
        (missing_manifest, "manifest.json"),
        (changed_manifest, "signature"),
        (newer_format, "keymgmt-sealed/99"),
        (stripped_signature, "sign"),
        (changed_policy, "keys.json"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "unseal"])
def test_a_damaged_model_is_exit_4_and_nothing_is_written(cli, sealed, damage, said, command):
    damage(sealed)
    before = snapshot(sealed.parent)
    ran = cli(command, sealed, *(["plain"] if command == "unseal" else []))
    assert ran.code == 4, ran.err
    assert said in ran.error
    assert "Traceback" not in ran.err
    assert snapshot(sealed.parent) == before
    assert not (sealed.parent / "plain").exists()


def test_another_publisher_is_exit_4(cli, sealed):
    assert cli("keys", "create", "local:stranger", "--sign").code == 0
    pem = cli("keys", "export", "local:stranger").out
    (sealed.parent / "publisher.pem").write_text(pem)
    ran = cli("verify", sealed)
    assert ran.code == 4
    assert "is signed by nobody that this config trusts" in ran.error


def test_an_older_release_is_exit_4(cli, sealed):
    edit(sealed.parent / "keymgmt.toml", "[policy]", "[policy]\nminimum_release = { resnet50 = 4 }")
    ran = cli("verify", sealed)
    assert ran.code == 4
    assert "release" in ran.error


def test_another_name_than_expected_is_exit_4(cli, sealed):
    ran = cli("verify", sealed, "--name", "resnet51")
    assert ran.code == 4
    assert "resnet51" in ran.error


def test_a_service_that_is_down_is_exit_6_with_a_table_of_reasons(cli, sealed):
    (sealed.parent / "keys").rename(sealed.parent / "elsewhere")
    ran = cli("verify", sealed)
    assert ran.code == 6
    assert "no recipient" in ran.error
    for cell in ("file:models@1", "local", "ProviderUnavailable"):
        assert cell in ran.err


def test_a_key_that_was_lost_is_exit_6_and_one_that_was_retired_exit_5(cli, sealed):
    keys = sealed.parent / "keys"
    (keys / "models.jwks").rename(keys / "models.away")
    lost = cli("verify", sealed)
    assert lost.code == 6
    assert "put it back from a backup" in lost.hint
    (keys / "models.away").rename(keys / "models.jwks")
    assert cli("keys", "rotate", "local:models").code == 0
    assert cli("keys", "retire", "local:models@1").code == 0
    retired = cli("verify", sealed)
    assert retired.code == 5
    assert "KeyRetired" in retired.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("seal",),
        ("seal", "model"),
        ("--no-such-option",),
        ("seal", "a", "b", "--release", "x"),
        ("seal", "a", "b", "--release", "-1"),
        ("keys", "nothing"),
    ],
)
def test_wrong_usage_is_exit_2(cli, arguments):
    ran = cli(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_names_from_a_file_cannot_drive_the_terminal(cli, site):
    ran = cli("verify", "\x1b]0;title\x07.sealed")
    assert ran.code == 3
    assert r"\x1b]0;title\x07.sealed: No such file" in ran.error
    assert "\x1b" not in ran.err
    assert "\x07" not in ran.err


def test_a_secret_written_into_the_config_is_refused_and_not_repeated(cli, site):
    edit(site / "keymgmt.toml", 'path = "keys"', 'path = "keys"\npassphrase = "hunter2-hunter2"')
    ran = cli("keys", "list")
    assert ran.code == 3
    assert "hunter2" not in ran.err


def test_no_key_material_is_ever_printed(cli, sealed):
    secrets = [
        jwk[member]
        for file in (sealed.parent / "keys").glob("*.jwks")
        for jwk in json.loads(file.read_text())["keys"]
        for member in ("k", "d")
        if member in jwk
    ]
    assert len(secrets) == 2
    printed = ""
    for arguments in (
        ("-vv", "verify", sealed),
        ("-vv", "keys", "show", "local:models", "--json"),
        ("-vv", "keys", "list"),
        ("-vv", "doctor"),
        ("-vv", "inspect", sealed, "--json"),
        ("-vv", "keys", "export", "local:publisher"),
        ("-vv", "rewrap", sealed),
    ):
        ran = cli(*arguments)
        printed += ran.out + ran.err
    assert not [secret for secret in secrets if secret in printed]
