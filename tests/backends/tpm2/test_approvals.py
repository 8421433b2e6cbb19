"""Approvals on real machines: wrong ones beside a good one, PCRs of the key, kernels that sign."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2.policy import _authorize
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._policy import Approver, Counter, PcrState
from programs import run

from keymgmt.backend import AccessDenied, Dek, KeyNotFound, ProviderUnavailable

CONTEXT = b"a context"
MEASURE = "/usr/lib/systemd/systemd-measure"


@pytest.fixture
def dek():
    with Dek.generate() as dek:
        yield dek


@pytest.fixture
def signer():
    return ec.generate_private_key(ec.SECP256R1())


def write_public(key, path: Path) -> Path:
    public = key.public_key()
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def der(key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def approve(signer, state, counter=None) -> Approval:
    approver = Approver(der(signer))
    message = Approval.message(state, counter, approver)
    return Approval(state, counter, approver, signer.sign(message, ec.ECDSA(hashes.SHA256())))


def opens(provider, wrapped) -> bool:
    with provider.unwrap(wrapped, CONTEXT):
        return True


def measure(provider, index: int, data: bytes) -> None:
    """Extend a PCR of the bank sha256."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    union = t.TPMU_HA(sha256=hashlib.sha256(data).digest())
    digests = t.TPML_DIGEST_VALUES([t.TPMT_HA(hashAlg=c.TPM2_ALG.SHA256, digest=union)])
    handle = c.ESYS_TR.parse(f"pcr{index}")
    provider.service.run("extending", lambda tpm: tpm.call("pcr_extend", handle, digests))


def only_bank(provider, swtpm, bank: str) -> None:
    """What a firmware's setup does: one PCR bank, from the next start on."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    selection = t.TPML_PCR_SELECTION(
        [
            t.TPMS_PCR_SELECTION(
                hash=c.TPM2_ALG.parse(each),
                sizeofSelect=3,
                pcrSelect=(b"\xff" if each == bank else b"\0") * 3,
            )
            for each in ("sha1", "sha256", "sha384", "sha512")
        ]
    )

    def allocate(tpm):
        tpm.call("pcr_allocate", selection, c.ESYS_TR.PLATFORM)
        tpm.call("shutdown", c.TPM2_SU.CLEAR)

    provider.service.run("allocating", allocate)
    swtpm.restart()


def define(provider, index: int, attributes: int) -> None:
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    area = t.TPMS_NV_PUBLIC(
        nvIndex=index, nameAlg=c.TPM2_ALG.SHA256, attributes=c.TPMA_NV(attributes), dataSize=8
    )
    public = t.TPM2B_NV_PUBLIC(nvPublic=area)
    provider.service.run(
        "defining", lambda tpm: tpm.call("nv_define_space", b"", public, c.ESYS_TR.OWNER)
    )


def test_one_bad_approval_hides_no_good_one(provider, swtpm, dek, signer, tmp_path, monkeypatch):
    """A bank that is gone, an index that is missing, never written or unreadable: in any order."""
    provider.create_key("dev", "ecc-p256", {"approver": str(write_public(signer, tmp_path / "a"))})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    other_bank = provider.pcrs("sha384", [7])
    only_bank(provider, swtpm, "sha256")
    state = provider.pcrs("sha256", [7])
    define(provider, 0x01800101, 0x02060012)  # a counter that was never counted up
    define(provider, 0x01800102, 0x00020012)  # one that only its owner may read
    bad = [
        approve(signer, other_bank),
        approve(signer, state, Counter(0x01800100, 1)),
        approve(signer, state, Counter(0x01800101, 1)),
        approve(signer, state, Counter(0x01800102, 1)),
    ]
    good = approve(signer, state)
    for place in range(len(bad) + 1):
        tried = [*bad[:place], good, *bad[place:]]
        monkeypatch.setattr(
            "keymgmt_tpm2.policy._authorize.installed", lambda path, tried=tried: tried
        )
        assert opens(provider, wrapped)
    monkeypatch.setattr("keymgmt_tpm2.policy._authorize.installed", lambda path: bad)
    with pytest.raises(AccessDenied, match="no approval") as caught:
        provider.unwrap(wrapped, CONTEXT)
    for reason in ("no PCR bank sha384", "no counter 0x01800100", "0x01800101 cannot be read"):
        assert reason in str(caught.value)


def test_pcrs_beside_an_approver_hold_whatever_is_approved(provider, dek, signer, tmp_path):
    from keymgmt_tpm2.policy import _approval

    options = {"approver": str(write_public(signer, tmp_path / "a")), "pcr": "7"}
    provider.create_key("dev", "ecc-p256", options)
    wrapped = provider.wrap("dev", dek, CONTEXT)
    for state in (provider.pcrs("sha256", [8]), PcrState("sha256", {8: extended(b"update")})):
        _approval.install(provider.keys.path, approve(signer, state))
    assert opens(provider, wrapped)
    measure(provider, 8, b"update")
    assert opens(provider, wrapped)
    measure(provider, 7, b"another key")
    with pytest.raises(AccessDenied, match="bound to another boot state: PCR 7"):
        provider.unwrap(wrapped, CONTEXT)
    # Rotation keeps both, with the PCRs of now.
    provider.rotate_key("dev")
    assert opens(provider, provider.wrap("dev", dek, CONTEXT))


def test_the_tpm_refuses_other_pcrs_beside_an_approver(
    provider, dek, signer, tmp_path, monkeypatch
):
    """Not our comparison."""
    from keymgmt_tpm2.policy import _approval

    options = {"approver": str(write_public(signer, tmp_path / "a")), "pcr": "7"}
    provider.create_key("dev", "ecc-p256", options)
    _approval.install(provider.keys.path, approve(signer, provider.pcrs("sha256", [8])))
    wrapped = provider.wrap("dev", dek, CONTEXT)
    measure(provider, 7, b"another key")
    monkeypatch.setattr(_authorize, "compare", lambda wanted, now: "")
    with pytest.raises(AccessDenied, match="policy of the key does not hold"):
        provider.unwrap(wrapped, CONTEXT)


def extended(*measured: bytes) -> bytes:
    value = bytes(32)
    for data in measured:
        value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    return value


# What a kernel image measures: the names and contents of its sections, then the phase of the boot.
KERNEL = (b".linux\0", b"a kernel")


def signed_by_hand(key, tmp_path, tcti) -> str:
    digest = PcrState("sha256", {11: extended(*KERNEL, b"enter-initrd")}).extend(bytes(32))
    signature = key.sign(digest, padding.PKCS1v15(), hashes.SHA256())
    entry = {
        "pcrs": [11],
        "pkfp": hashlib.sha256(
            key.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
        ).hexdigest(),
        "pol": digest.hex(),
        "sig": base64.b64encode(signature).decode(),
    }
    return json.dumps({"sha256": [entry | {"pkfp": "00" * 32}, entry], "sha999": []})


def signed_by_systemd(key, tmp_path, tcti) -> str:
    if not Path(MEASURE).exists():
        pytest.skip("no systemd-measure here")
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "private.pem").write_bytes(private)
    (tmp_path / "kernel").write_bytes(KERNEL[1])
    command = [MEASURE, "sign", f"--linux={tmp_path}/kernel", "--bank=sha256"]
    command += [f"--private-key={tmp_path}/private.pem", f"--public-key={tmp_path}/kernel.pem"]
    command += ["--phase=enter-initrd", f"--tpm2-device={tcti}"]
    return run(*command, check=True).stdout


@pytest.mark.parametrize("sign", [signed_by_hand, signed_by_systemd])
def test_a_unified_kernel_image_brings_its_approval(provider, swtpm, dek, tmp_path, sign):
    key, path = rsa.generate_private_key(65537, 2048), tmp_path / "tpm2-pcr-signature.json"
    pem = write_public(key, tmp_path / "kernel.pem")
    settings = provider.settings.model_copy(update={"pcr_signatures": path})
    with Tpm2Provider("tpm", settings) as device:
        device.create_key("dev", "ecc-p256", {"approver": str(pem)})
        wrapped = device.wrap("dev", dek, CONTEXT)
        with pytest.raises(AccessDenied, match="none of its approver is installed"):
            device.unwrap(wrapped, CONTEXT)
        path.write_text(sign(key, tmp_path, swtpm.tcti))
        with pytest.raises(AccessDenied, match="pcrsig is of another kernel"):
            device.unwrap(wrapped, CONTEXT)
        for data in (*KERNEL, b"enter-initrd"):
            measure(device, 11, data)
        assert opens(device, wrapped)
        measure(device, 11, b"leave-initrd")
        with pytest.raises(AccessDenied, match="pcrsig is of another kernel"):
            device.unwrap(wrapped, CONTEXT)


def test_a_pcrsig_that_is_forged_or_damaged(provider, swtpm, dek, tmp_path, caplog):
    key, path = rsa.generate_private_key(65537, 2048), tmp_path / "signature.json"
    pem = write_public(key, tmp_path / "kernel.pem")
    settings = provider.settings.model_copy(update={"pcr_signatures": path})
    with Tpm2Provider("tpm", settings) as device:
        device.create_key("dev", "ecc-p256", {"approver": str(pem)})
        wrapped = device.wrap("dev", dek, CONTEXT)
        for data in (*KERNEL, b"enter-initrd"):
            measure(device, 11, data)
        said = json.loads(signed_by_hand(key, tmp_path, ""))
        forger = rsa.generate_private_key(65537, 2048)
        pol = bytes.fromhex(said["sha256"][1]["pol"])
        forged = forger.sign(pol, padding.PKCS1v15(), hashes.SHA256())
        said["sha256"][1]["sig"] = base64.b64encode(forged).decode()
        path.write_text(json.dumps(said))
        with pytest.raises(AccessDenied, match="the TPM refused the approval"):
            device.unwrap(wrapped, CONTEXT)
        # Nor does one that no TPM has room for hide another.
        entry = json.loads(signed_by_hand(key, tmp_path, ""))["sha256"][1]
        large = {"sig": base64.b64encode(bytes(600)).decode()}
        for wrong in (large, {"sig": ""}, {"pol": "00"}, {"pol": "00" * 100}):
            path.write_text(json.dumps({"sha256": [entry | wrong, entry]}))
            caplog.clear()
            assert opens(device, wrapped)
            assert "1 entries of another size are passed over" in caplog.text
        for damaged in ("", "[]", "{", '{"sha256":[{}]}', '{"sha256":[{"pkfp":1,"pcrs":7}]}'):
            path.write_text(damaged)
            with pytest.raises((ProviderUnavailable, AccessDenied)):
                device.unwrap(wrapped, CONTEXT)


@pytest.mark.parametrize(
    ("pcr", "said"),
    [
        ("16", "any program can set"),
        ("16,23", "any program can set"),
        ("sha384:0,7", "nothing was measured"),
        ("17", "nothing was measured"),
    ],
)
def test_a_binding_that_keeps_nobody_out_is_said(provider, caplog, pcr, said):
    with caplog.at_level(logging.WARNING, logger="keymgmt.tpm2"):
        info = provider.create_key("dev", "ecc-p256", {"pcr": pcr})
    assert said in caplog.text
    assert said in info.detail["warning"]
    found = provider.check().findings[-1]
    assert (found.status, said in found.detail) == ("warning", True)


def test_a_binding_to_what_was_measured_is_not(provider, caplog):
    measure(provider, 7, b"the keys of secure boot")
    for pcr in ("7", "7,16", "0,7"):
        info = provider.create_key(f"dev{pcr.replace(',', '-')}", "ecc-p256", {"pcr": pcr})
        assert "warning" not in info.detail
    assert caplog.text == ""
    keys = [found for found in provider.check().findings if "key" in found.name]
    assert {found.status for found in keys} == {"ok"}


def test_a_tpm_with_another_bank_alone(provider, swtpm, dek):
    """The way is told where a key is made, and a key of the bank that is gone is named."""
    provider.create_key("old", "ecc-p256", {"pcr": "7"})
    wrapped = provider.wrap("old", dek, CONTEXT)
    only_bank(provider, swtpm, "sha384")
    with pytest.raises(KeyNotFound, match="no PCRs in the bank sha256") as caught:
        provider.create_key("dev", "ecc-p256", {"pcr": "0,7"})
    assert "write sha384:0,7" in str(caught.value.hint)
    provider.create_key("dev", "ecc-p256", {"pcr": "sha384:0,7"})
    assert opens(provider, provider.wrap("dev", dek, CONTEXT))
    with pytest.raises(AccessDenied, match="this TPM has no PCR bank sha256"):
        provider.unwrap(wrapped, CONTEXT)
    findings = {found.name: found for found in provider.check().findings}
    assert findings["PCR banks"].status == "warning"
    assert "no PCR bank sha256" in findings["key old"].detail
