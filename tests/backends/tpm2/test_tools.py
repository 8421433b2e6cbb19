"""A key of ours in the hands of tpm2-tools: it is an ordinary TPM key, and nothing of ours is lost.

With the files of the key directory and the standard tools alone, a data key can be recovered.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess

import pytest

from keymgmt.backend import Dek, hpke_split, open_with_ecdh

CONTEXT = b"a context"


@pytest.fixture
def tool(require_tool, swtpm, tmp_path):
    """Run one of tpm2-tools on the emulator."""
    require_tool("tpm2_getcap", package="tpm2-tools")

    def run(name: str, *arguments: object) -> bytes:
        environment = os.environ | {"TPM2TOOLS_TCTI": swtpm.tcti}
        program = str(require_tool(f"tpm2_{name}", package="tpm2-tools"))
        command = [program, *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert ran.returncode == 0, ran.stderr.decode()
        return ran.stdout

    return run


@pytest.fixture
def blobs(provider, tmp_path):
    """The parts of a key as tpm2_load takes them."""

    def write(key: str) -> tuple:
        version = json.loads((provider.keys.path / f"{key}.json").read_bytes())["versions"][-1]
        paths = []
        for name in ("public", "private"):
            raw = base64.b64decode(version[name])
            path = tmp_path / f"{key}.{name}"
            path.write_bytes(len(raw).to_bytes(2, "big") + raw)
            paths.append(path)
        return tuple(paths)

    return write


def test_unwrapped_with_tpm2_tools(provider, tool, blobs, tmp_path):
    provider.create_key("dev", "ecc-p256", {})
    public, private = blobs("dev")
    context, point, z = (tmp_path / name for name in ("key.ctx", "point", "z"))
    tool("load", "-C", "0x81000001", "-u", public, "-r", private, "-c", context)
    recipient = provider.export_recipient("dev")
    with Dek.generate() as dek:
        wrapped = provider.wrap("dev", dek, CONTEXT)
        enc, ciphertext = hpke_split(wrapped.mechanism, wrapped.blob)
        x, y = enc[1:33], enc[33:]
        point.write_bytes(b"\0\x44\0\x20" + x + b"\0\x20" + y)
        tool("ecdhzgen", "-c", context, "--public", point, "-o", z)
        raw = z.read_bytes()
        # tpm2_ecdhzgen writes a TPM2B_ECC_POINT with or without its own length.
        start = raw.index(b"\0\x20") + 2
        opened = open_with_ecdh(
            wrapped.mechanism,
            raw[start : start + 32],
            enc,
            recipient.public_key,
            ciphertext,
            CONTEXT,
        )
        assert opened == dek
    tool("flushcontext", "-t")


def test_signed_with_tpm2_tools(provider, tool, blobs, tmp_path):
    from keymgmt._crypto.signatures import verify_signature

    provider.create_key("release", "ecdsa-p256", {})
    public, private = blobs("release")
    context, message, signature = (tmp_path / name for name in ("key.ctx", "message", "sig"))
    message.write_bytes(b"a message")
    tool("load", "-C", "0x81000001", "-u", public, "-r", private, "-c", context)
    tool("sign", "-c", context, "-g", "sha256", "-f", "plain", "-o", signature, message)
    assert verify_signature(provider.public_key("release"), b"a message", signature.read_bytes())
    tool("flushcontext", "-t")


def test_a_policy_key_asks_tpm2_tools_for_its_policy_too(provider, tool, blobs, tmp_path):
    provider.create_key("bound", "ecc-p256", {"pcr": "sha256:7,16"})
    public, private = blobs("bound")
    context, session, z, point = (tmp_path / n for n in ("key.ctx", "session", "z", "point"))
    enc = provider.export_recipient("bound").public_key
    point.write_bytes(b"\0\x44\0\x20" + enc[1:33] + b"\0\x20" + enc[33:])
    tool("load", "-C", "0x81000001", "-u", public, "-r", private, "-c", context)
    with pytest.raises(AssertionError, match=r"(?i)auth"):
        tool("ecdhzgen", "-c", context, "--public", point, "-o", z)
    tool("startauthsession", "--policy-session", "-S", session)
    tool("policypcr", "-S", session, "-l", "sha256:7,16")
    tool("ecdhzgen", "-c", context, "-p", f"session:{session}", "--public", point, "-o", z)
    tool("flushcontext", "-t")


def test_the_name_that_setup_shows_is_the_one_of_tpm2_tools(provider, tool):
    shown = tool("readpublic", "-c", "0x81000001").decode()
    assert provider.settings.srk_name in shown
