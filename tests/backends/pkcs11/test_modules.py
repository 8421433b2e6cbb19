"""The other modules that can be had: p11-kit's client, tpm2-pkcs11 over swtpm, openCryptoki.

None does every kind of key, so the whole kit is for SoftHSM and NSS. What each does is held here,
and that the other kinds are told as such.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from forks import in_child
from keymgmt_pkcs11 import Pkcs11Provider
from keymgmt_pkcs11._kinds import KINDS
from swtpm import Swtpm
from waiting import until

from keymgmt.backend import Dek, UnsupportedOperation, UnwrapFailed
from keymgmt.testing import ProviderFactory

LIBRARIES = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"
WAIT = 30.0


@contextlib.contextmanager
def running(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WAIT)


def run(*command: object) -> None:
    done = programs.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def p11_kit(new_token, require_tool, tmp_path) -> Iterator[Any]:
    """SoftHSM behind p11-kit's server, by its client."""
    server = require_tool("p11-kit", package="p11-kit")
    client = require_tool(LIBRARIES / "pkcs11" / "p11-kit-client.so", package="p11-kit")
    token = new_token("remote")
    place = tmp_path / "socket"
    with running(
        *(server, "server", "-f", "-n", place, "--provider", token.module),
        f"pkcs11:token={token.label}",
    ):
        until(place.exists)
        os.environ["P11_KIT_SERVER_ADDRESS"] = f"unix:path={place}"
        token.module = client
        yield token
        while token.made:
            token.made.pop().close()


@pytest.fixture
def p11_kit_proxy(new_token, require_tool) -> Iterator[Any]:
    """SoftHSM behind p11-kit's proxy, which has a table and sessions for each that asks it.

    Debian's packages tell the proxy of their modules, SoftHSM's among them.
    """
    proxy = require_tool(LIBRARIES / "p11-kit-proxy.so", package="p11-kit-modules")
    os.environ["TSS2_LOG"] = "all+none"
    token = new_token("proxied")
    token.module = proxy
    yield token
    while token.made:
        token.made.pop().close()


@pytest.fixture
def tpm2_pkcs11(require_tool, tmp_path, token_class) -> Iterator[Any]:
    """tpm2-pkcs11 over tpm2-abrmd over swtpm."""
    module = require_tool(LIBRARIES / "libtpm2_pkcs11.so.1", package="libtpm2-pkcs11-1")
    tool = require_tool("tpm2_ptool", package="libtpm2-pkcs11-tools")
    program = require_tool("swtpm", package="swtpm")
    for name in ("tpm2-abrmd", "dbus-daemon"):
        require_tool(name, package=name)
    (tmp_path / "store").mkdir()
    with contextlib.ExitStack() as stack:
        tpm = stack.enter_context(Swtpm(program, tmp_path / "tpm"))
        bus = stack.enter_context(
            running("dbus-daemon", "--session", "--nofork", "--print-address=1")
        )
        assert bus.stdout is not None
        os.environ["DBUS_SESSION_BUS_ADDRESS"] = next(
            line.strip() for line in bus.stdout if line.startswith("unix:")
        )
        stack.enter_context(
            running("tpm2-abrmd", "--session", "--allow-root", f"--tcti={tpm.tcti}")
        )
        os.environ.update(
            TPM2_PKCS11_STORE=f"{tmp_path}/store",
            TPM2_PKCS11_TCTI="tabrmd:bus_type=session",
            TPM2TOOLS_TCTI="tabrmd:bus_type=session",
            TSS2_LOG="all+none",
            TPM2_PKCS11_LOG_LEVEL="0",
        )
        until(lambda: not subprocess.run(["tpm2_getrandom", "1"], capture_output=True).returncode)
        # Debian's Python has the bindings that its tool needs; a virtual environment has others.
        python = ["/usr/bin/python3", tool]
        store = ["--path", tmp_path / "store"]
        run(*python, "init", *store)
        pins = ("--sopin", "so-pin-5678", "--userpin", token_class.pin)
        run(*python, "addtoken", "--pid", "1", "--label", "tpm", *pins, *store)
        pin = tmp_path / "pin"
        pin.touch(0o600)
        pin.write_text(token_class.pin)
        token = token_class(module, "tpm", pin, tmp_path)
        yield token
        while token.made:
            token.made.pop().close()


@pytest.fixture
def opencryptoki(require_tool, tmp_path, token_class) -> Iterator[Any]:
    """openCryptoki's software token, whose state is the system's: for CI, as root."""
    module = require_tool(
        LIBRARIES / "opencryptoki" / "libopencryptoki.so.0", package="opencryptoki"
    )
    daemon = require_tool("pkcsslotd", package="opencryptoki")
    if os.geteuid() != 0 or not os.environ.get("CI"):
        pytest.skip("openCryptoki keeps its tokens in /var/lib, which is for CI as root alone")
    state = Path("/var/lib/opencryptoki/swtok")
    shutil.rmtree(state, ignore_errors=True)
    (state / "TOK_OBJ").mkdir(parents=True)
    pin = tmp_path / "pin"
    pin.touch(0o600)
    pin.write_text("27182818")
    with running(daemon, "--nodaemon"):
        tool = ["pkcs11-tool", "--module", module, "--slot", "3"]
        so = ["--login", "--login-type", "so", "--so-pin"]
        until(
            lambda: b"Slot" in subprocess.run([*map(str, tool), "-L"], capture_output=True).stdout
        )
        run(*tool, "--init-token", "--so-pin", "87654321", "--label", "octok")
        run(*tool, *so, "87654321", "--change-pin", "--new-pin", "31415926")
        run(*tool, *so, "31415926", "--init-pin", "--new-pin", "27182818")
        token = token_class(module, "octok", pin, tmp_path)
        yield token
        while token.made:
            token.made.pop().close()


# What each does: p11-kit 0.24 passes few mechanisms on, the TPM fixes usages itself.
DOES = {
    "p11_kit": {"rsa-oaep", "ecdsa-p256", "ecdsa-p384", "rsa-pss"},
    "p11_kit_proxy": set(KINDS),
    "tpm2_pkcs11": {"ecdsa-p256", "ecdsa-p384"},
    "opencryptoki": {"rsa-oaep", "rsa-pss"},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", DOES)
def test_what_a_module_does(request, name):
    token = request.getfixturevalue(name)
    provider: Pkcs11Provider = token.provider(timeout=30.0, allow_oaep_sha1=True)
    assert not [f for f in provider.check().findings if f.status == "failed"]
    does = set()
    for kind in KINDS.values():
        options = {"bits": "2048"} if kind.name.startswith("rsa") else {}
        if kind.name not in DOES[name]:
            with pytest.raises(UnsupportedOperation, match=r"makes no key|attributes|not wrap"):
                provider.create_key(kind.name, kind.name, options)
            continue
        provider.create_key(kind.name, kind.name, options)
        does.add(kind.name)
        assert not [f for f in provider.check(kind.name).findings if f.status == "failed"]
        if kind.purpose == "sign":
            assert provider.sign(kind.name, b"message").signature
        else:
            wraps_and_unwraps(lambda: token.provider(timeout=30.0, allow_oaep_sha1=True), kind.name)
    assert {info.key for info in provider.list_keys()} == does


def wraps_and_unwraps(factory: ProviderFactory, key: str) -> None:
    provider = factory()
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        with pytest.raises(UnwrapFailed):
            provider.unwrap(wrapped, b"d")
        wrong: list[str] = []

        def work() -> None:
            for _ in range(5):
                if provider.unwrap(wrapped, b"c") != dek:
                    wrong.append("wrong")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

        def use() -> None:
            assert provider.unwrap(wrapped, b"c") == dek

        in_child(use)
        use()
