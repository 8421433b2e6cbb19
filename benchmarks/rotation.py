"""Rotation at scale: one tree of many sealed models, and one model for many recipient files.

    python benchmarks/rotation.py [--models 10000] [--recipients 1000 10000]

Needs the file backend. Prints seconds, peak RSS and sizes; the disk's fsync decides much of it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from measure import Run, add_json, finish, machine, table, timed

import keymgmt
from keymgmt import Config
from keymgmt._crypto.hpke import hpke_generate, hpke_public
from keymgmt._crypto.signatures import PublicKey
from keymgmt._providers.recipient_file import Recipient


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


def tree(root: Path, config: Config, count: int) -> dict[str, Run]:
    """Rotate the KEK of many models."""
    first = root / "tree" / "m0.sealed"
    first.parent.mkdir()
    keymgmt.seal(root / "model.onnx", first, to=["local:kek"], keys=config)
    for number in range(1, count):
        shutil.copytree(first, root / "tree" / f"d{number % 100}" / f"m{number}.sealed")
    config.provider("local").rotate_key("kek")

    def rewrap() -> None:
        changed = sum(
            isinstance(item, keymgmt.Rewrapped) and item.changed
            for item in keymgmt.rewrap_tree(root / "tree", keys=config)
        )
        print(f"{changed} of {count} models changed")

    return {
        f"rewrap {count} models": timed(rewrap),
        f"rewrap {count} models again": timed(rewrap),
        f"usage of {count} models": timed(lambda: keymgmt.usage(root / "tree")),
    }


def recipients(root: Path, config: Config, count: int) -> dict[str, Run]:
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
    options = {"to": to, "keys": config, "fingerprints": prints}
    runs = {
        f"seal for {count} recipients": timed(
            lambda: keymgmt.seal(root / "model.onnx", target, **options)
        ),
        f"open one of {count} recipients": timed(lambda: keymgmt.open(target, keys=config).close()),
    }
    size = (target / "keys.json").stat().st_size
    print(f"{count} recipients: keys.json {size / 1e6:.2f} MB, {size / count:.0f} bytes each")
    return runs


def main() -> None:
    """Run both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--recipients", type=int, nargs="*", default=[1_000, 10_000])
    add_json(parser)
    options = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        config = site(root)
        for count in options.recipients:
            runs |= recipients(root, config, count)
        runs |= tree(root, config, options.models)
    rows = [[name, *(f"{run[what]:.2f}" for what in run)] for name, run in runs.items()]
    print(table(["what", "s", "CPU s", "peak MiB"], rows))
    finish(options.json, machine("keymgmt"), {name: [run] for name, run in runs.items()})


if __name__ == "__main__":
    main()
