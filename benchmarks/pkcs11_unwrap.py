"""Unwraps a second from SoftHSM: ours against raw calls through ctypes, in turns in one run.

    python benchmarks/pkcs11_unwrap.py [--seconds 20]

Makes a token in a temporary folder. The raw calls are what one would write by hand: a session for
each thread, the key found once, C_DecryptInit and C_Decrypt with structures that are made once. It
has no time limit, no way back from a
lost session, and leaves the key in memory. Both are measured in short turns, one after the other,
so that a busy machine slows both; the figure is the median of the turns, with the quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keymgmt_pkcs11 import Pkcs11Provider, Pkcs11Settings
from keymgmt_pkcs11._cryptoki import CkMechanism
from measure import Run, add_json, finish, in_turns, machine, median, spread, table
from pkcs11 import Attribute, Mechanism

from keymgmt.backend import Dek, SecretSource, WrappedKey

CONTEXT = bytes(32)
PIN = "1234-benchmark"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
KINDS = ("aes256", "aes256-kw", "ecdh-p256", "rsa-oaep")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    parser.add_argument("--module", default=MODULE, help="SoftHSM's library")
    add_json(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokens").mkdir()
        config = directory / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {name}/tokens\nobjectstore.backend = file\n")
        os.environ["SOFTHSM2_CONF"] = str(config)
        command = ["softhsm2-util", "--init-token", "--free", "--label", "bench"]
        command += ["--pin", PIN, "--so-pin", PIN]
        subprocess.run(command, check=True, capture_output=True)
        pin = directory / "pin"
        pin.touch(0o600)
        pin.write_text(PIN)
        settings = Pkcs11Settings(
            module=Path(given.module),
            token="bench",
            pin=SecretSource(file=pin),
            allow_oaep_sha1=True,
        )
        with Pkcs11Provider("bench", settings) as provider:
            runs = measure(provider, given.seconds)
    finish(given.json, machine("keymgmt", "python-pkcs11"), runs)


def measure(provider: Pkcs11Provider, seconds: float) -> dict[str, dict[str, list[Run]]]:
    """Print one line for each way of asking; all turns of each."""
    rows, found = [], {}
    for kind in KINDS:
        provider.create_key(kind, kind, {})
        with Dek.generate() as dek:
            wrapped = provider.wrap(kind, dek, CONTEXT)

            def ours(wrapped: WrappedKey = wrapped) -> Callable[[], int]:
                return lambda: provider.unwrap(wrapped, CONTEXT).wipe() or 1

            cases = {"ours": ours}
            if kind == "aes256":
                cases["raw ctypes"] = lambda w=wrapped: raw(provider, w)
            for threads in (1, 8):
                runs = in_turns(cases, 10, seconds, threads)
                found[f"{wrapped.mechanism}, {threads} threads"] = runs
                rows += [
                    [
                        *(wrapped.mechanism, str(threads), name, spread(each)),
                        f"{median(each, 'cpu_us'):.0f}",
                    ]
                    for name, each in runs.items()
                ]
    print(table(["mechanism", "threads", "how", "/s", "CPU µs"], rows))
    return found


def raw(provider: Pkcs11Provider, wrapped: WrappedKey) -> Callable[[], int]:
    """A session of its own and the key in it; the process is logged in already."""

    def prepare(session: Any) -> tuple[int, int]:
        handle = session.ck.open_session(session.token.slot, writing=False)
        (key,) = session.ck.find(handle, {Attribute.ID: bytes.fromhex(wrapped.version)})
        return handle, key

    handle, key = provider.connection.run("preparing", prepare)
    table = ctypes.c_void_p()
    library = ctypes.CDLL(str(provider.settings.library))
    library.C_GetFunctionList(ctypes.byref(table))
    entries = (ctypes.c_void_p * 68).from_address(table.value + ctypes.sizeof(table))  # type: ignore[operator]
    number, pointer = ctypes.c_ulong, ctypes.c_void_p
    begin = ctypes.CFUNCTYPE(number, number, pointer, number)(entries[33])
    decrypt = ctypes.CFUNCTYPE(number, number, pointer, number, pointer, pointer)(entries[34])
    how = CkMechanism.gcm(Mechanism.AES_GCM, wrapped.blob[:12], CONTEXT)
    given = ctypes.create_string_buffer(wrapped.blob[12:], 48)
    plain, length = ctypes.create_string_buffer(256), ctypes.c_ulong()

    def call() -> int:
        length.value = 256
        assert not begin(handle, how.pointer, key)
        assert not decrypt(handle, given, 48, plain, ctypes.byref(length))
        return 1

    return call


if __name__ == "__main__":
    main()
