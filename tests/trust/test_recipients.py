"""Sealing for a device with nothing but its recipient file, and only for a genuine one."""

from __future__ import annotations

import dataclasses

import pytest

import keymgmt
from keymgmt import Config, errors
from keymgmt._providers.recipient_file import Recipient, recipient_message, signatures_file


@pytest.fixture(params=["hpke-p256", "hpke-x25519", "hpke-mlkem768-x25519"])
def device(request, site, tmp_path_factory):
    """Another machine: its provider's config, and the recipient file that it exported."""
    root = tmp_path_factory.mktemp("device")
    (root / "keys").mkdir(mode=0o700)
    (root / "pub.pem").write_bytes((site.root / "pub.pem").read_bytes())
    data = {
        "providers": {"dev": {"backend": "file", "path": str(root / "keys")}},
        "policy": {"publishers": {"pub.pem": ["*"]}},
    }
    config = Config(data, path=root / "keymgmt.toml")
    config.provider("dev").create_key("unlock", request.param, {})
    file = site.root / "device7.recipient"
    config.provider("dev").export_recipient("unlock").save(file)
    return config, file


def test_by_its_fingerprint(site, device):
    config, file = device
    path = site.seal(f"@{file}", fingerprints=[Recipient.load(file).fingerprint.upper()])
    with keymgmt.open(path, keys=config) as model:
        assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=site.config())
    assert isinstance(caught.value.attempts[0].error, errors.WrongKey)


def test_by_a_trusted_signer(site, device):
    config, file = device
    provider = site.provider
    signature = provider.sign("stranger", recipient_message(Recipient.load(file)))
    beside = file.with_name(file.name + ".sig")
    beside.write_bytes(signatures_file([signature]))
    with pytest.raises(errors.UntrustedPublisher):
        site.seal(f"@{file}")
    trusting = site.config(recipient_signers=["stranger.pem"])
    path = site.seal(f"@{file}", keys=trusting)
    keymgmt.open(path, keys=config).close()


def test_the_device_and_a_key_of_the_site_together(site, device):
    config, file = device
    prints = [Recipient.load(file).fingerprint]
    path = site.seal(f"local:a+@{file}", "local:b", fingerprints=prints)
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=config)
    keymgmt.open(path, keys=site.config()).close()


def test_nobody_vouches(site, device):
    _, file = device
    with pytest.raises(errors.UntrustedPublisher, match="genuine") as caught:
        site.seal(f"@{file}")
    assert "--fingerprint" in caught.value.hint
    assert Recipient.load(file).fingerprint[:8] not in caught.value.hint
    assert not (site.root / "m.sealed").exists()


def test_another_fingerprint(site, device):
    _, file = device
    wrong = "0" * 64
    with pytest.raises(errors.UntrustedPublisher):
        site.seal(f"@{file}", fingerprints=[wrong])


def test_an_exchanged_file(site, device):
    """Somebody on the way put his own key in."""
    config, file = device
    known = Recipient.load(file).fingerprint
    config.provider("dev").create_key("other", "hpke-p256", {})
    file.unlink()
    config.provider("dev").export_recipient("other").save(file)
    with pytest.raises(errors.UntrustedPublisher):
        site.seal(f"@{file}", fingerprints=[known])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, errors.ConfigError),
        (b"", errors.FormatError),
        (b"{}", errors.FormatError),
        (b"{" * 100_000, errors.ConfigError),
        (b"x" * 100_000, errors.ConfigError),
        (b'{"format":"keymgmt.recipient/99"}', errors.FormatError),
    ],
)
def test_bad_recipient_files(site, content, error):
    file = site.root / "bad.recipient"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=r"bad\.recipient"):
        site.seal(f"@{file}")
    assert not (site.root / "m.sealed").exists()


def test_rewrap_for_a_device_is_written_and_not_tested(site, device):
    config, file = device
    path = site.seal("local:a")
    done = keymgmt.rewrap(
        path,
        keys=site.config(),
        add=[f"@{file}"],
        fingerprints=[Recipient.load(file).fingerprint],
    )
    added = done.groups[-1]
    assert (added.state, added.tested, added.note) == ("added", False, "written, not tested")
    keymgmt.open(path, keys=config).close()
    again = keymgmt.rewrap(
        path,
        keys=site.config(),
        add=[f"@{file}"],
        fingerprints=[Recipient.load(file).fingerprint],
    )
    assert not again.changed
    keymgmt.rewrap(path, keys=site.config(), drop=[added.group])
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=config)


def test_a_group_of_another_device_stays_when_keys_are_rotated(site, device):
    config, file = device
    path = site.seal("local:a", f"@{file}", fingerprints=[Recipient.load(file).fingerprint])
    site.provider.rotate_key("a")
    done = keymgmt.rewrap(path, keys=site.config())
    assert [(g.state, g.tested) for g in done.groups] == [("moved", True), ("foreign", False)]
    keymgmt.open(path, keys=config).close()


def test_dropping_one_device_of_a_fleet_names_it(site, tmp_path):
    config = site.config()
    files, prints = [], []
    for number in range(2):
        keys = tmp_path / f"device{number}"
        keys.mkdir(mode=0o700)
        table = {"dev": {"backend": "file", "path": str(keys)}}
        provider = Config({"providers": table}, path=tmp_path / "x.toml").provider("dev")
        provider.create_key("unlock", "hpke-x25519", {})
        recipient = provider.export_recipient("unlock")
        files.append(tmp_path / f"{number}.recipient")
        recipient.save(files[-1])
        prints.append(recipient.fingerprint)
    path = site.seal("local:a", *(f"@{file}" for file in files), fingerprints=prints)
    with pytest.raises(errors.ConfigError, match="names 2 groups"):
        keymgmt.rewrap(path, keys=config, drop=["file:unlock"])
    first = keymgmt.inspect(path).groups[1][0]
    keymgmt.rewrap(path, keys=config, drop=[first.replace("@1", "")])
    assert [group[0] for group in keymgmt.inspect(path).groups] == [
        "file:a@1",
        keymgmt.inspect(path).groups[1][0],
    ]
    assert keymgmt.inspect(path).groups[1][0] != first


def test_keys_of_one_name_in_two_services_are_said(site, caplog):
    """Whoever opens the model can tell them apart only by trying, or by what a wrap carries."""
    (site.root / "more").mkdir(mode=0o700)
    data = {
        "providers": {
            "one": {"backend": "file", "path": str(site.root / "keys")},
            "two": {"backend": "file", "path": str(site.root / "more")},
        },
        "policy": {"require_signature": False},
    }
    config = Config(data, path=site.root / "x.toml")
    config.provider("two").create_key("a", "aes256", {})
    keymgmt.seal(site.plain, site.root / "x.sealed", to=["one:a", "two:a"], keys=config)
    # A wrap of the file backend says to its holder alone whose it is.
    assert "one recipient by name" not in caplog.text
    for name in ("one", "two"):
        provider = config.provider(name)
        real = provider.wrap
        provider.wrap = lambda *args, real=real: dataclasses.replace(real(*args), params={})
    keymgmt.seal(site.plain, site.root / "y.sealed", to=["one:a", "two:a"], keys=config)
    assert "the keys a of one and two are one recipient by name (file:a@1)" in caplog.text
