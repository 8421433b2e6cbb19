"""Rotation at scale: one tree of many sealed models, and one model for many recipient files.

    python benchmarks/rotation.py [--models 10000] [--recipients 1000 10000]

Needs the file backend. Prints seconds, peak RSS and sizes; the disk's fsync decides much of it.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import keymgmt
from keymgmt import Config
from keymgmt._hpke import hpke_generate, hpke_public
from keymgmt._recipient import Recipient
from keymgmt._verify import PublicKey


def peak() -> float:
    """Peak RSS of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def site(root: Path) -> Config:
    """A file provider with a KEK and a publisher's key."""
    (root / "keys").mkdir(mode=0o700)
    config = Config(
        {
            "providers": {"local": {"backend": "file", "path": str(root / "keys")}},
            "policy": {"publishers": {"pub.pem": ["*"]}},
            "seal": {"sign": "local:publisher"},
        },
        path=root / "keymgmt.toml",
    )
    provider = config.provider("local")
    provider.create_key("kek", "aes256", {})
    provider.create_key("publisher", "ed25519", {})
    (root / "pub.pem").write_bytes(PublicKey(provider.public_key("publisher")).to_pem())
    (root / "model.onnx").write_bytes(bytes(4096))
    return config


def tree(root: Path, config: Config, count: int) -> None:
    """Rotate the KEK of many models."""
    first = root / "tree" / "m0.sealed"
    first.parent.mkdir()
    keymgmt.seal(root / "model.onnx", first, to=["local:kek"], keys=config)
    for number in range(1, count):
        shutil.copytree(first, root / "tree" / f"d{number % 100}" / f"m{number}.sealed")
    config.provider("local").rotate_key("kek")
    before, start = peak(), time.perf_counter()
    changed = sum(
        isinstance(item, keymgmt.Rewrapped) and item.changed
        for item in keymgmt.rewrap_tree(root / "tree", keys=config)
    )
    took = time.perf_counter() - start
    print(
        f"rewrap of {count} models: {took:.1f} s, {1000 * took / count:.2f} ms each, "
        f"{changed} changed, peak RSS {before:.0f} -> {peak():.0f} MiB"
    )
    start = time.perf_counter()
    changed = sum(
        isinstance(item, keymgmt.Rewrapped) and item.changed
        for item in keymgmt.rewrap_tree(root / "tree", keys=config)
    )
    print(f"again: {time.perf_counter() - start:.1f} s, {changed} changed")
    start = time.perf_counter()
    found = keymgmt.usage(root / "tree")
    print(f"usage: {time.perf_counter() - start:.1f} s, {found.models} models")


def recipients(root: Path, config: Config, count: int) -> None:
    """Seal for a fleet: every device has the same backend and key name."""
    fleet = root / f"fleet{count}"
    fleet.mkdir()
    prints = []
    for number in range(count):
        public = hpke_public("hpke-p256", hpke_generate("hpke-p256"))
        device = Recipient("hpke-p256", "tpm2", "dev", "1", bytes(public))
        device.save(fleet / f"{number}.recipient")
        prints.append(device.fingerprint)
    target = root / f"fleet{count}.sealed"
    to = ["local:kek", *(f"@{fleet}/{number}.recipient" for number in range(count))]
    start = time.perf_counter()
    keymgmt.seal(root / "model.onnx", target, to=to, keys=config, fingerprints=prints)
    sealed = time.perf_counter() - start
    start = time.perf_counter()
    keymgmt.open(target, keys=config).close()
    opened = time.perf_counter() - start
    size = (target / "keys.json").stat().st_size
    print(
        f"seal for {count} recipient files: {sealed:.1f} s, keys.json {size / 1e6:.2f} MB "
        f"({size / count:.0f} bytes each); open: {opened:.2f} s; peak RSS {peak():.0f} MiB"
    )


def main() -> None:
    """Run both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--recipients", type=int, nargs="*", default=[1_000, 10_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        config = site(root)
        for count in options.recipients:
            recipients(root, config, count)
        tree(root, config, options.models)


if __name__ == "__main__":
    main()
